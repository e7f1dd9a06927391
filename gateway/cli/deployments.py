"""`lorikeet deploy`, `undeploy` and `deployments`: engines of their own for merged versions, on the gateway's own machine."""

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adapters.base import find_base, read_base
from adapters.blobs import BlobStore, materialise
from adapters.cli import progress
from adapters.errors import ConflictError
from adapters.merged_store import INCOMING, bring_in, remove_merged
from adapters.names import parse_reference
from adapters.promotion import load_policy
from adapters.records import AdapterVersion, MergedForm, VersionStatus
from adapters.registry import Registry
from adapters.stored import find_version
from gateway import daemon
from gateway.cli.common import (
    JsonOption,
    OperatorKeyOption,
    command,
    err,
    local_registry,
    operator_for,
    out,
    print_json,
    print_table,
)
from gateway.client import CommandError, GatewayClient, RefusedError, operator_client
from gateway.engines.profile import load_profile
from gateway.settings import Settings

POLL_S = 0.3
GONE_S = 180.0  # running answers may end first, then the engine
MIB = 1024 * 1024

ReferenceArgument = Annotated[
    str,
    typer.Argument(metavar="NAME[@VERSION]", help="Such as support@3 or acme/support@3; else the production version."),
]


@dataclass(frozen=True)
class Place:
    """What the commands work on: this machine's store, and the gateway that runs on it."""

    settings: Settings
    registry: Registry
    version: AdapterVersion

    @property
    def reference(self) -> str:
        return f"{self.version.adapter}@{self.version.version}"

    @property
    def path(self) -> str:
        return f"/v1/deployments/{self.version.adapter}/{self.version.version}"


def deploy(
    reference: ReferenceArgument,
    merged: Annotated[
        bool, typer.Option("--merged", help="Its merged form: the only one that gets an engine of its own.")
    ] = True,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A merged or quantized model's folder; else the version is merged now.", exists=True
        ),
    ] = None,
    share: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of its requests that go to the engine; the others go to base + adapter."
        ),
    ] = 1.0,
    profile: Annotated[
        str | None,
        typer.Option(help="Engine profile: a name or a YAML file. Default: the gateway's own, without LoRA."),
    ] = None,
    parity: Annotated[
        Literal["full", "weights"],
        typer.Option(help="How a merge made here is proven; weights: without the model in memory."),
    ] = "full",
    force: Annotated[bool, typer.Option("--force", help="Although its licences forbid it. Needs --reason.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; it goes into the audit log.", show_default=False)] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the engine.")] = 900,
    tenant: Annotated[str | None, typer.Option(help="Its owner, where several own the name.")] = None,
    key: OperatorKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Give a version an engine of its own, folded into the base, and wait until it answers.

    Requests reach it by the same names as before, by --share; the same command with another --share changes it while both
    run. While the engine is away base + adapter answer. What cannot be started is taken down again.
    """
    del merged
    if force != bool(reason):
        raise typer.BadParameter("--force and --reason TEXT belong together", param_hint="--force")
    place = find_place(reference, tenant)
    with closing(operator_for(place.settings, key, place.version.tenant)) as client:
        before = current(client, place)
        form = chosen_form(place, before, source=source, parity=parity, forced=reason)
        wanted = {
            "adapter": place.version.adapter,
            "version": place.version.version,
            "digest": form.digest,
            "share": share,
        }
        if profile is not None:
            wanted["profile"] = load_profile(profile).model_dump(mode="json")
        client.post("/v1/deployments", wanted)
        found = wait_until_ready(client, place, timeout_s=timeout_s, new=before is None)
    if json:
        print_json(found)
    else:
        tell(found)


def undeploy(
    reference: ReferenceArgument,
    delete: Annotated[bool, typer.Option("--delete", help="Also delete the merged form's files.")] = False,
    tenant: Annotated[str | None, typer.Option(help="Its owner, where several own the name.")] = None,
    key: OperatorKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Take a version's own engine down: no new requests, those that run may end, then nothing of it is left.

    Its names go on answering, by base + adapter. The merged form is kept for the next time, unless --delete.
    """
    place = find_place(reference, tenant)
    with closing(operator_for(place.settings, key, place.version.tenant)) as client:
        before = client.get(place.path)
        take_down(client, place)
    if delete:
        for form in place.registry.forms(*key_of(place.version)):
            if form.digest == before["digest"]:
                place.registry.remove_form(form)
                remove_merged(place.settings.home.merged, form.folder)
    if json:
        print_json({"id": place.reference, "undeployed": True, "files_deleted": delete})
    else:
        kept = "deleted" if delete else "kept"
        out.print(f"[bold]{place.reference}[/bold] has no engine of its own any more; its merged form is {kept}.")


def deployments(key: OperatorKeyOption = None, json: JsonOption = False) -> None:
    """Versions with an engine of their own: share, state, load, requests by form, memory."""
    with operator_client(Settings(), key) as client:
        found = client.get("/v1/deployments")
    if json:
        print_json(found)
        return
    print_table(
        ("Version", "Saved as", "Share", "State", "Engine", "Running", "Merged / adapter", "Memory"),
        [
            (
                f"{one['tenant']}/{one['id']}",
                one["scheme"],
                f"{one['share']:.0%}",
                one["state"],
                one["engine"],
                one["in_flight"],
                f"{one['requests']['merged']} / {one['requests']['adapter']}",
                memory_text(one["memory"]),
            )
            for one in found["data"]
        ],
        empty="No version has an engine of its own. Give one to it with: lorikeet deploy NAME@VERSION --merged",
    )


def find_place(reference: str, tenant: str | None) -> Place:
    """Raises AdapterError for a version that is not there, not ready, or made for another base than this machine serves."""
    settings = Settings()
    parsed = parse_reference(reference)
    if parsed is None:
        raise typer.BadParameter(
            "write an adapter and maybe its version, such as support@3", param_hint="NAME[@VERSION]"
        )
    registry = local_registry(settings)
    version = find_version(registry, reference if parsed.tenant or tenant is None else f"{tenant}/{reference}")
    place = Place(settings, registry, version)
    if version.status is not VersionStatus.READY:
        raise ConflictError(f"'{place.reference}' is {version.status}; only a ready version can be deployed.")
    base = read_base(base_folder(settings))
    if not version.fits(base.fingerprint.weights_digest):
        raise ConflictError(f"'{place.reference}' was made for another base than {base.name}, which is served here.")
    return place


def base_folder(settings: Settings) -> Path:
    return find_base(settings.base, settings.home.models)


def key_of(version: AdapterVersion) -> tuple[str, str, int]:
    return version.tenant, version.adapter, version.version


def current(client: GatewayClient, place: Place) -> dict[str, Any] | None:
    """The version's deployment as it is. Also tells before anything slow is begun that no gateway runs."""
    try:
        found: dict[str, Any] = client.get(place.path)
    except RefusedError as exc:
        if exc.code == "deployment_not_found":
            return None
        raise
    return found


def chosen_form(
    place: Place,
    before: Mapping[str, Any] | None,
    *,
    source: Path | None,
    parity: Literal["full", "weights"],
    forced: str | None,
) -> MergedForm:
    """The folder's, the one that is deployed, the newest that is stored, or one that is merged now."""
    if source is not None:
        with progress() as report:
            return _enter(place, source.absolute(), forced, report)
    stored = [
        form
        for form in place.registry.forms(*key_of(place.version))
        if (place.settings.home.merged / form.folder).is_dir()
    ]
    if before is not None:
        stored = [form for form in stored if form.digest == before["digest"]] or stored
    return stored[0] if stored else merge_now(place, parity, forced)


def merge_now(place: Place, parity: Literal["full", "weights"], forced: str | None) -> MergedForm:
    from adapters.merge import merge_adapter

    merged = place.settings.home.merged
    merged.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=INCOMING, dir=merged) as temporary, progress() as report:
        store = BlobStore.open(place.settings.blob_location)
        adapter = materialise(store, place.version.files, Path(temporary) / "adapter")
        made = Path(temporary) / "made"
        merge_adapter(base_folder(place.settings), adapter, made, parity=parity, report=report)
        return _enter(place, made, forced, report)


def _enter(place: Place, source: Path, forced: str | None, report: Callable[[str, int, int], None]) -> MergedForm:
    """Check the folder, bring it in, and note it in the registry."""
    settings, version = place.settings, place.version
    arrived = bring_in(
        source,
        version,
        read_base(base_folder(settings)),
        settings.home.merged,
        policy=load_policy(settings.promotion_policy).licence,
        forced=forced,
        report=report,
    )
    return place.registry.add_form(
        *key_of(version),
        digest=arrived.digest,
        scheme=arrived.scheme,
        size_bytes=arrived.size_bytes,
        report=arrived.report,
        licences=arrived.licences.model_dump(mode="json") if arrived.licences is not None else None,
        forced=forced,
    )


def wait_until_ready(client: GatewayClient, place: Place, *, timeout_s: float, new: bool) -> dict[str, Any]:
    """The deployment once its engine answers. new: take down again what does not come up. Raises CommandError."""
    try:
        return _wait_until_ready(client, place, timeout_s=timeout_s)
    except BaseException:
        if new:
            take_down(client, place)
        raise


def _wait_until_ready(client: GatewayClient, place: Place, *, timeout_s: float) -> dict[str, Any]:
    began_s = time.monotonic()
    shown = ""
    with err.status("Starting the engine") as spinner:
        while True:
            found: dict[str, Any] = client.get(place.path)
            took_s = time.monotonic() - began_s
            if found["state"] == "ready":
                return found
            stage = f"Engine {found['engine']}: {found['state']}"
            if stage != shown and not err.is_terminal:
                err.print(f"{took_s:6.1f} s  {stage}", highlight=False)
            shown = stage
            spinner.update(f"{stage} [dim]{took_s:.0f} s[/dim]")
            if found["problem"]:
                raise CommandError(f"{place.reference} cannot be deployed. {found['problem']}")
            if found["state"] == "elsewhere":
                raise CommandError(
                    f"The gateway at {client.url} does not use this machine's data folder. Deploy on its own."
                )
            if took_s > timeout_s:
                log = place.settings.home.logs / f"{found['engine']}.log"
                end = daemon.tail(log, 12)
                raise CommandError(
                    f"{place.reference} did not answer within {timeout_s:g} s ({found['state']}). The end of {log}:\n{end}"
                )
            time.sleep(POLL_S)


def take_down(client: GatewayClient, place: Place) -> None:
    """Return when nothing of its engine is left. Raises CommandError when that takes too long."""
    client.delete(place.path)
    ends_s = time.monotonic() + GONE_S
    with err.status("Taking the engine down"):
        while any(one["id"] == place.reference for one in client.get("/v1/deployments")["data"]):
            if time.monotonic() > ends_s:
                raise CommandError(
                    f"The engine of {place.reference} is still there after {GONE_S:g} s: lorikeet deployments"
                )
            time.sleep(POLL_S)


def tell(found: Mapping[str, Any]) -> None:
    takes = f"{found['scheme']}, memory {memory_text(found['memory'])}"
    out.print(
        f"[green]{found['id']}[/green] answers on {found['engine']} ({takes}): {found['share']:.0%} of its requests go there, "
        "the others to base + adapter.",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"\nOne form by name: {found['adapter']}@{found['version']}#merged, {found['adapter']}@{found['version']}#adapter"
        f"\nAnother share:    lorikeet deploy {found['id']} --merged --share 0.1"
        f"\nWhich pays:       lorikeet choose {found['id']}"
        f"\nTake it down:     lorikeet undeploy {found['id']}",
        highlight=False,
    )


def memory_text(memory: Mapping[str, Any] | None) -> str:
    """Host memory as its share of the machine's, and that of GPUs where there are any."""
    if memory is None:
        return "not known"
    gpu = f" + {memory['gpu_bytes'] / MIB:,.0f} MiB GPU" if memory["gpu_bytes"] is not None else ""
    return f"{memory['pss_bytes'] / MIB:,.0f} MiB{gpu}"


deploy_app = command(deploy)
undeploy_app = command(undeploy)
deployments_app = command(deployments)
