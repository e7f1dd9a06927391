"""`lorikeet serve`, `up`, `down`, `status` and `engine`: starting, stopping and looking at the gateway of this machine."""

import json as jsonlib
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Annotated, Any

import httpx
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from adapters.base import INFO_FILE, load_spec, prepare_base
from adapters.records import Scope
from gateway import daemon, logs
from gateway.cli.common import JsonOption, OperatorKeyOption, command, err, local_registry, out, print_json, print_table
from gateway.client import CommandError, GatewayClient, gateway_url, operator_client, read_operator_key
from gateway.settings import Settings

FIRST_TENANT = "default"
TENANT_SCOPES = (Scope.INFERENCE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE, Scope.JOBS)
STOP_S = 45  # for the engine to end, after the running answers have
POLL_S = 0.2
QUESTION = "What is the capital of France?"


def serve() -> None:
    """Run gateway and engine in the foreground until Ctrl-C or SIGTERM; answers that are being written may end first.

    A second signal ends them at once.
    """
    from gateway import server  # here, so that the other commands start sooner
    from gateway.app import create_app
    from gateway.services import chosen_profile

    settings = Settings()
    logs.configure(settings.log_level)
    chosen_profile(settings)  # a wrong one is told in a line now, and not in the middle of the start
    ensure_base(settings)
    with listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        settings = settings.model_copy(update={"host": host, "port": port})
        with daemon.hold(settings.home, gateway_url(settings, ignore_environment=True)):
            started = server.run(create_app(settings), listener, grace_s=settings.failure.drain_s)
    if not started:
        raise CommandError("The gateway did not start; the reason is in the lines above.")


def up(
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the first real answer.")] = 600,
    worker: Annotated[bool, typer.Option("--worker", help="Also start a worker that trains fine-tuning jobs.")] = False,
    json: JsonOption = False,
) -> None:
    """Start gateway and engine in the background and wait until the model has really answered.

    Prepares the base model on first use, and creates the tenant 'default' with a key, shown once, where there is no tenant
    yet. Starting again what already runs only says so. Stop it with: lorikeet down
    """
    from gateway.services import chosen_profile

    settings = Settings()
    chosen_profile(settings)
    began = time.monotonic()
    running = daemon.find(settings.home)
    ensure_base(settings)
    tenant, key = first_tenant(settings)
    if key and not json:
        out.print(f"Created tenant [bold]{tenant}[/bold]. Its API key, shown only this once:\n")
        typer.echo(f"  {key}\n")
    url = running.url if running else gateway_url(settings, ignore_environment=True)
    process = None
    try:
        process = None if running else start(settings)
        status = wait_until_answering(settings, url, tenant, process, timeout_s=timeout_s, began=began)
    except BaseException:
        if process is not None:
            daemon.stop(settings.home, patience_s=10)
            process.wait()
        if key and json:  # there will be no document, and no other chance to see it
            typer.echo(f"Created tenant {tenant}. Its API key, shown only this once: {key}", err=True)
        raise
    if worker:
        daemon.start_worker(settings.home, url)
    took_s = time.monotonic() - began
    log_files = [str(daemon.log_file(settings.home)), *map(str, sorted(settings.home.logs.glob("engine*.log")))]
    if json:
        document = {
            "url": url,
            "ready": True,
            "started": running is None,
            "base_model": status["base_model"],
            "tenant": tenant,
            "logs": log_files,
            "took_s": round(took_s, 1),
        }
        print_json(document | ({"key": key} if key else {}))
        return
    state = "was running already" if running else f"answered its first question after {took_s:.1f} s"
    out.print(f"[green]Lorikeet {state}.[/green]\n")
    for label, value in (
        ("Address", f"{url}/v1"),
        ("Model", status["base_model"]),
        *(("Log", log) for log in log_files),
    ):
        out.print(f"  {label:8} {value}", highlight=False, soft_wrap=True)
    if not key:
        out.print(f"\nA key: lorikeet keys create --tenant {tenant}", highlight=False)
    typer.echo("\nTry it:\n\n" + curl_line(url, key, status["base_model"]) + "\n\nStop it: lorikeet down")


def down(
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", help="Seconds to wait before killing: failure.drain_s and 45 more.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Stop gateway and engine. Answers being written may end first; no process, socket or shared memory is left."""
    settings = Settings()
    with err.status("Stopping"):
        stopped = daemon.stop(
            settings.home, patience_s=settings.failure.drain_s + STOP_S if timeout_s is None else timeout_s
        )
    if json:
        print_json(
            {
                "stopped": stopped.was_running or stopped.killed > 0,
                "killed": stopped.killed,
                "left": list(stopped.left),
                "took_s": round(stopped.took_s, 1),
            }
        )
    elif stopped.was_running:
        killed = f"; {stopped.killed} of its processes had to be killed" if stopped.killed else ""
        out.print(f"Stopped in {stopped.took_s:.1f} s{killed}.", highlight=False)
    elif stopped.killed:
        out.print(f"No gateway ran; killed {stopped.killed} processes that an earlier one had left.", highlight=False)
    else:
        out.print("Nothing was running.")
    if stopped.left:
        raise CommandError(f"Still there: {', '.join(stopped.left)}")


def status(key: OperatorKeyOption = None, json: JsonOption = False) -> None:
    """Is it ready, and what does each engine hold? Exit code 0 when it is ready, 1 when not."""
    with operator_client(Settings(), key) as client:
        found = client.get("/lorikeet/status")
    if json:
        fields = ("id", "state", "slots", "resident", "serves")
        engines = [{field: e[field] for field in fields if field in e} for e in found["engines"]]
        print_json(
            {"url": found["url"], "ready": found["ready"], "base_model": found["base_model"], "engines": engines}
        )
    else:
        ready = "[green]ready[/green]" if found["ready"] else "[yellow]not ready[/yellow]"
        out.print(f"{found['url']} is {ready}. Base model: {found['base_model']}", highlight=False, soft_wrap=True)
        print_engines(found)
    if not found["ready"]:
        raise typer.Exit(1)


def engine(key: OperatorKeyOption = None, json: JsonOption = False) -> None:
    """State, LoRA slots, load and resident adapters of each engine."""
    with operator_client(Settings(), key) as client:
        found = client.get("/lorikeet/status")
    if json:
        print_json({"object": "list", "data": found["engines"]})
    else:
        print_engines(found)


def print_engines(found: dict[str, Any]) -> None:
    print_table(
        ("Engine", "State", "Breaker", "Slots", "Running", "Waiting", "Resident adapters"),
        [
            (
                e["id"],
                e["state"],
                e.get("breaker"),
                e["slots"],
                e.get("in_flight"),
                e.get("waiting"),
                f"{e['serves']}, merged" if "serves" in e else "\n".join(e["resident"]) or "none",
            )
            for e in found["engines"]
        ],
        empty="No engines.",
    )


@contextmanager
def listen(settings: Settings) -> Iterator[socket.socket]:
    """The gateway's socket, bound before anything slow is begun."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as exc:
        raise CommandError(
            f"Cannot listen on {settings.host}:{settings.port}: {exc.strerror}. Choose another port with LORIKEET_PORT."
        ) from exc
    with closing(listener):
        yield listener


def ensure_base(settings: Settings) -> None:
    """Prepare the base model unless it is there, with its progress on stderr. Raises BaseModelError."""
    from gateway.services import base_folder

    if (base_folder(settings) / INFO_FILE).is_file():
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(f"Preparing {settings.base}", total=None)

        def report(step: str, done: int, total: int) -> None:
            progress.update(task, description=f"Preparing {settings.base}: {step}", completed=done, total=total or None)

        folder = prepare_base(load_spec(settings.base), settings.home.create().models, report)
    err.print(f"Prepared {settings.base} in {folder}", highlight=False, soft_wrap=True)


def first_tenant(settings: Settings) -> tuple[str, str | None]:
    """A tenant to try the gateway with; where there is none, a new one and its key."""
    registry = local_registry(settings)
    tenants = registry.tenants()
    if tenants:
        return min(tenants, key=lambda tenant: tenant.created_at).name, None
    registry.create_tenant(FIRST_TENANT)
    _, key = registry.create_key(FIRST_TENANT, TENANT_SCOPES, name="first key")
    return FIRST_TENANT, key


def start(settings: Settings) -> daemon.Process:
    """The background process, once it is sure that nothing else has the port."""
    with listen(settings):
        pass
    return daemon.start(settings.home)


def wait_until_answering(
    settings: Settings, url: str, tenant: str, process: daemon.Process | None, *, timeout_s: float, began: float
) -> dict[str, Any]:
    """The status, once the gateway says it is ready and the base model has answered a question.

    Raises CommandError with the end of the log when the process ends first, or time is up.
    """
    shown = ""
    with err.status("Starting") as spinner:
        while True:
            elapsed_s = time.monotonic() - began
            if process is not None and process.poll() is not None:
                raise CommandError(start_failure(settings, f"The gateway ended with exit code {process.returncode}."))
            if elapsed_s > timeout_s:
                raise CommandError(
                    start_failure(settings, f"No answer within {timeout_s:g} s (was: {shown or 'preparing'}).")
                )
            stage = look(url)
            if stage != shown and not err.is_terminal:
                err.print(f"{elapsed_s:6.1f} s  {stage}", highlight=False)
            shown = stage
            spinner.update(f"{stage} [dim]{elapsed_s:.0f} s[/dim]")
            if stage.endswith(": failed"):
                raise CommandError(start_failure(settings, "The engine could not be started."))
            if stage == READY:
                key = read_operator_key(settings)
                if key is None:
                    raise CommandError(
                        f"{url} is not the gateway of {settings.home.root}: it has written no operator key."
                    )
                with (
                    closing(GatewayClient(url, key)) as operator,
                    closing(GatewayClient(url, key, tenant=tenant)) as caller,
                ):
                    found: dict[str, Any] = operator.get("/lorikeet/status")
                    spinner.update("Asking the model a first question")
                    ask(caller, found["base_model"], timeout_s=max(5.0, timeout_s - elapsed_s))
                return found
            time.sleep(POLL_S)


READY = "Ready"


def look(url: str) -> str:
    """What the gateway is at, in words."""
    try:
        response = httpx.get(f"{url}/readyz", timeout=5)
        body = response.json()
    except (httpx.HTTPError, ValueError):
        return "Starting the gateway"
    if response.is_success:
        return READY
    states = ", ".join(f"engine {name}: {state}" for name, state in body.get("engines", {}).items())
    return f"Gateway up, {states}" if states else "Gateway up"


def ask(client: GatewayClient, model: str, *, timeout_s: float) -> None:
    """One real answer. Raises CommandError."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/chat/completions", body, timeout_s=timeout_s)
    if not answer["choices"][0]["message"].get("content"):
        raise CommandError(f"The engine is up, but {model} gave an empty answer. Its log is in the data folder's logs.")


def start_failure(settings: Settings, what: str) -> str:
    """The reason with the ends of the logs."""
    parts = [what]
    for log in (daemon.log_file(settings.home), *sorted(settings.home.logs.glob("engine*.log"))):
        end = daemon.tail(log)
        if end:
            parts.append(f"--- the end of {log}\n{end}")
    return "\n".join(parts)


def curl_line(url: str, key: str | None, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32, "temperature": 0}
    header = f"Authorization: Bearer {key}" if key else "Authorization: Bearer $LORIKEET_API_KEY"
    quoted = shlex.quote(header) if key else f'"{header}"'
    return (
        f"curl {url}/v1/chat/completions \\\n  -H {quoted} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(jsonlib.dumps(body))}"
    )


serve_app = command(serve)
up_app = command(up)
down_app = command(down)
status_app = command(status)
engine_app = command(engine)
