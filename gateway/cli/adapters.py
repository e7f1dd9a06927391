"""`lorikeet push`, `adapters`, `promote` and `rollback`: over HTTP, for this machine's gateway or any other (LORIKEET_URL)."""

import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from adapters.errors import Fault
from adapters.names import parse_reference
from gateway.cli.common import (
    JsonOption,
    KeyOption,
    TenantOption,
    command,
    err,
    out,
    print_json,
    print_table,
    tenant_client,
    when,
)
from gateway.client import CommandError, RefusedError
from gateway.settings import Settings

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "manifest.json")


def push(
    path: Annotated[
        Path,
        typer.Argument(
            help="A PEFT folder (adapter_config.json + adapter_model.safetensors) or a zip, tar or tar.gz of one.",
            exists=True,
        ),
    ],
    name: Annotated[str, typer.Option(help="The adapter's name. A name that exists gets a new version.")],
    tenant: TenantOption = None,
    wait: Annotated[bool, typer.Option(help="Wait until the engine has tried it: ready or refused.")] = True,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Upload an adapter as a new version.

    The gateway checks every file and every shape, then tries the adapter on the engine. The first ready version of a name
    answers to the name at once; later ones wait for: lorikeet promote NAME@VERSION
    """
    settings = Settings()
    with (
        tenant_client(settings, key, tenant) as client,
        tempfile.TemporaryDirectory(prefix="lorikeet-push-") as scratch,
    ):
        archive = path if path.is_file() else zip_adapter(path, Path(scratch) / "adapter.zip")
        size_bytes = archive.stat().st_size
        with (
            Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TimeElapsedColumn(),
                console=err,
                transient=True,
            ) as progress,
            archive.open("rb") as file,
        ):
            task = progress.add_task(f"Uploading {name}", total=size_bytes)
            with progress.wrap_file(file, task_id=task, total=size_bytes) as body:
                try:
                    version = client.upload(name, body, wait=wait)
                except RefusedError as exc:
                    progress.stop()
                    if exc.faults:
                        report_refusal(exc, json=json)
                    raise
    if json:
        print_json(version)
        return
    reference = f"{version['adapter']}@{version['version']}"
    out.print(
        f"[bold]{reference}[/bold] is {version['status']}. Digest {str(version['digest'])[:12]}.", highlight=False
    )
    for warning in version.get("warnings") or ():
        out.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
    if version.get("production") is False and version["status"] == "ready":
        out.print(f"To let it answer to the name: lorikeet promote {reference}", highlight=False)


def list_adapters(
    name: Annotated[str | None, typer.Argument(help="Show the versions of this adapter.")] = None,
    tenant: TenantOption = None,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """List a tenant's adapters, or the versions of one."""
    path = f"/v1/adapters/{quote(name, safe='')}/versions" if name else "/v1/adapters"
    with tenant_client(Settings(), key, tenant) as client:
        listing = client.get(path)
    if json:
        print_json(listing)
    elif name:
        print_versions(listing["data"])
    else:
        print_table(
            ("Adapter", "Production", "Previous", "Created"),
            [(a["name"], a.get("production"), a.get("previous"), when(a.get("created_at"))) for a in listing["data"]],
            empty="No adapters yet. Upload one with: lorikeet push FOLDER --name NAME",
        )


def promote(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="Such as support@2.")],
    force: Annotated[
        bool, typer.Option("--force", help="Promote it although the gate says no. Needs --reason.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; it goes into the audit log.", show_default=False)] = None,
    tenant: TenantOption = None,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Let a version answer to the name. Running requests end on the version they began with.

    Refused without an evaluation that passes the promotion policy: lorikeet eval CONFIG --model NAME@VERSION --attach
    """
    if force != bool(reason):
        raise typer.BadParameter("--force and --reason TEXT belong together", param_hint="--force")
    parsed = parse_reference(reference)
    if parsed is None or parsed.version is None:
        raise typer.BadParameter("write the adapter and its version, such as support@2", param_hint="NAME@VERSION")
    with tenant_client(Settings(), key, parsed.tenant or tenant) as client:
        body = {"version": parsed.version} | ({"force": True, "reason": reason} if force else {})
        adapter = client.post(f"/v1/adapters/{parsed.name}/promote", body, timeout_s=300)
    report_move(parsed.name, adapter, json=json)


def rollback(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    tenant: TenantOption = None,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Go back to the production version before."""
    with tenant_client(Settings(), key, tenant) as client:
        adapter = client.post(f"/v1/adapters/{quote(name, safe='')}/rollback", timeout_s=300)
    report_move(name, adapter, json=json)


def zip_adapter(folder: Path, target: Path) -> Path:
    """The adapter's files in an archive, streamed. A folder that lacks one goes whole: the gateway names its faults."""
    complete = all((folder / name).is_file() for name in ADAPTER_FILES[:2])
    files = (
        [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
        if complete
        else [file for file in sorted(folder.iterdir()) if file.is_file()]
    )
    if not files:
        raise CommandError(f"{folder} holds no files. An adapter's folder has adapter_config.json in it.")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # weights do not get smaller
        for file in files:
            archive.write(file, file.name)
    return target


def report_refusal(refusal: RefusedError, *, json: bool) -> None:
    """Every fault with its fix, as a table or as the JSON document of a refusal."""
    if json:
        print_json(
            {"error": {"message": str(refusal), "code": refusal.code, "faults": [f.as_dict() for f in refusal.faults]}}
        )
    else:
        err.print(fault_table(refusal.faults))


def fault_table(faults: tuple[Fault, ...]) -> Table:
    table = Table("Where", "What is wrong", "How to mend it", header_style="bold", show_lines=True)
    for fault in faults:
        table.add_row(fault.where, f"{fault.message}\n[dim]{fault.code}[/dim]", fault.fix)
    return table


def print_versions(versions: list[Mapping[str, Any]]) -> None:
    print_table(
        ("Version", "Status", "Production", "Rank", "Size", "Digest", "Licences", "Created"),
        [
            (
                f"{v['adapter']}@{v['version']}",
                v["status"],
                "yes" if v.get("production") else "",
                v.get("rank"),
                f"{v['size_bytes'] / 1e6:.1f} MB" if v.get("size_bytes") else "",
                (v.get("digest") or "")[:12],
                (v.get("licences") or {"level": "not told"})["level"],
                when(v.get("created_at")),
            )
            for v in versions
        ],
        empty="No versions.",
    )
    if versions:
        print_licences(versions[0])


def print_licences(version: Mapping[str, Any]) -> None:
    """What the newest version is made from, what speaks against using it, and what has to go along with it."""
    reference, found = f"{version['adapter']}@{version['version']}", version.get("licences")
    if not found:
        out.print(f"{reference} came without a manifest: the licences of its data are not known.", highlight=False)
        return
    sources = "; ".join(f"{one['kind']} {one['name']}: {one['licence']}" for one in found["sources"])
    out.print(f"Licences of {reference}: {escape(sources)}", highlight=False, soft_wrap=True)
    colours = {"ok": "green", "warn": "yellow", "block": "red"}
    for one in found["findings"]:
        because = f" (excepted: {one['excepted']})" if one["excepted"] else ""
        text = escape(f"{one['source']} ({one['licence']}): {one['what']}{because}")
        out.print(f"  [{colours[one['level']]}]{one['level']}[/] {text}", highlight=False, soft_wrap=True)
    for term in found["terms"]:
        text = escape(f"{term['what']} ({', '.join(term['sources'])})")
        out.print(f"  carries on: {text}", highlight=False, soft_wrap=True)


def report_move(name: str, adapter: Mapping[str, Any], *, json: bool) -> None:
    if json:
        print_json(adapter)
    else:
        out.print(f"[bold]{name}[/bold] is now answered by version {adapter.get('production')}.", highlight=False)


push_app = command(push)
adapters_app = command(list_adapters)
promote_app = command(promote)
rollback_app = command(rollback)
