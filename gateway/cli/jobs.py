"""`lorikeet jobs`: fine-tuning jobs over HTTP, for this machine's gateway or any other (LORIKEET_URL)."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli.common import (
    HELP,
    JsonOption,
    KeyOption,
    TenantOption,
    out,
    print_json,
    print_table,
    tenant_client,
    when,
)
from gateway.settings import Settings

jobs_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)
PATH = "/v1/fine_tuning/jobs"

JobArgument = Annotated[str, typer.Argument(metavar="ID", help="Such as ftjob-9f2c41d0….")]
LimitOption = Annotated[int, typer.Option(min=1, max=1000, help="Most that are shown.")]


@jobs_app.callback()
def _jobs() -> None:
    """Look at fine-tuning jobs, cancel, pause and resume them. `lorikeet worker` trains them.

    They are created over the API, with a file of rows: see the README.
    """


@jobs_app.command("list")
def list_jobs(
    limit: LimitOption = 20, tenant: TenantOption = None, key: KeyOption = None, json: JsonOption = False
) -> None:
    """List a tenant's jobs, the newest first."""
    with tenant_client(Settings(), key, tenant) as client:
        found = client.get(f"{PATH}?limit={limit}")
    if json:
        print_json(found)
        return
    print_table(
        ("Job", "State", "Created", "Of", "Result"),
        [(j["id"], state(j), when(j["created_at"]), j["model"], outcome(j)) for j in found["data"]],
        empty="No jobs yet.",
    )


@jobs_app.command("show")
def show_job(job: JobArgument, tenant: TenantOption = None, key: KeyOption = None, json: JsonOption = False) -> None:
    """Show one job and its checkpoints."""
    path = f"{PATH}/{quote(job, safe='')}"
    with tenant_client(Settings(), key, tenant) as client:
        found = client.get(path)
        checkpoints = client.get(f"{path}/checkpoints?limit=1000")["data"]
    if json:
        print_json(found | {"checkpoints": checkpoints})
        return
    told = {
        "State": state(found),
        "Of": found["model"],
        "Method": found["method"]["type"],
        "Hyperparameters": ", ".join(f"{name} {value}" for name, value in found["hyperparameters"].items()),
        "File": found["training_file"],
        "Created": when(found["created_at"]),
        "Ended": when(found["finished_at"]),
        "Result": outcome(found),
    }
    for label, value in told.items():
        out.print(f"{label:16} {value}", highlight=False, markup=False, soft_wrap=True)
    for checkpoint in checkpoints:
        line = f"Checkpoint       {checkpoint['fine_tuned_model_checkpoint']}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@jobs_app.command("events")
def list_events(
    job: JobArgument,
    limit: LimitOption = 100,
    tenant: TenantOption = None,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Show what happened to a job, the oldest first."""
    with tenant_client(Settings(), key, tenant) as client:
        found = client.get(f"{PATH}/{quote(job, safe='')}/events?limit={limit}")
    if json:
        print_json(found)
        return
    for event in reversed(found["data"]):
        line = f"{when(event['created_at'])}  {event['level']:5}  {event['message']}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@jobs_app.command("cancel")
def cancel_job(job: JobArgument, tenant: TenantOption = None, key: KeyOption = None, json: JsonOption = False) -> None:
    """End a job. One that runs ends as soon as its worker notices."""
    _change("cancel", job, tenant, key, json)


@jobs_app.command("pause")
def pause_job(job: JobArgument, tenant: TenantOption = None, key: KeyOption = None, json: JsonOption = False) -> None:
    """Put a job aside. One that runs stops at its next checkpoint."""
    _change("pause", job, tenant, key, json)


@jobs_app.command("resume")
def resume_job(job: JobArgument, tenant: TenantOption = None, key: KeyOption = None, json: JsonOption = False) -> None:
    """Let a paused job wait for a worker again."""
    _change("resume", job, tenant, key, json)


def _change(what: str, job: str, tenant: str | None, key: str | None, json: bool) -> None:
    with tenant_client(Settings(), key, tenant) as client:
        found = client.post(f"{PATH}/{quote(job, safe='')}/{what}")
    if json:
        print_json(found)
    else:
        out.print(f"{found['id']} is {state(found)}.", highlight=False)


def state(job: dict[str, Any]) -> str:
    return "paused" if job.get("paused") else str(job["status"])


def outcome(job: dict[str, Any]) -> str:
    """The model's name, or why there is none."""
    return str(job["fine_tuned_model"] or (job["error"] or {}).get("message") or "")
