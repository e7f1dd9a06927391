"""What every gateway command shares: options, how a document or a table is printed, the registry on this machine."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gateway import daemon
from gateway.client import CommandError, GatewayClient, gateway_url, no_key_message, read_operator_key
from gateway.settings import Settings

if TYPE_CHECKING:
    from adapters.registry import Registry

out = Console()
err = Console(stderr=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", help="API key. Default: LORIKEET_API_KEY, then this machine's operator key.", show_default=False
    ),
]
OperatorKeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", help="Operator's key. Default: this machine's own, then LORIKEET_API_KEY.", show_default=False
    ),
]
TenantOption = Annotated[
    str | None,
    typer.Option(
        help="Act for this tenant (with an operator's key). Default: the only one there is.", show_default=False
    ),
]

HELP = {"help_option_names": ["-h", "--help"]}


def command(function: Callable[..., None]) -> typer.Typer:
    """An app with one command, as `lorikeet` mounts them."""
    app = typer.Typer(add_completion=False, context_settings=HELP)
    app.command()(function)
    return app


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    if not rows:
        out.print(empty, markup=False, soft_wrap=True)
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    out.print(table)


def when(unix_s: float | None) -> str:
    """A time for people, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix_s)) if unix_s is not None else ""


def local_registry(settings: Settings) -> "Registry":
    """The registry the settings name; it is made where there is none yet. Raises DatabaseError."""
    # Here, so that commands over HTTP start half a second sooner.
    from adapters.registry import Registry, load_secret, open_database

    home = settings.home.create()
    return Registry(open_database(settings.registry_url), secret=load_secret(home.secret))


def let_the_gateway_notice(settings: Settings) -> None:
    """Return when this machine's gateway, if it runs, has read the registry again: the next command may rely on it."""
    if daemon.find(settings.home) is not None:
        time.sleep(2 * settings.refresh_s)


def tenant_client(settings: Settings, key: str | None, tenant: str | None) -> closing[GatewayClient]:
    """A client that acts for one tenant: by a key of the tenant's own, or by the operator's key and the tenant's name.

    Raises CommandError when there is no key, or the operator's key could mean several tenants.
    """
    chosen = key or os.environ.get("LORIKEET_API_KEY")
    if not chosen:
        chosen = read_operator_key(settings)
        if not chosen:
            raise CommandError(no_key_message(settings))
        tenant = tenant or _only_tenant(settings)
    return closing(GatewayClient(gateway_url(settings), chosen, tenant=tenant))


def operator_for(settings: Settings, key: str | None, tenant: str) -> GatewayClient:
    """A client with an operator's key that acts for the tenant: --key, else this machine's own, else LORIKEET_API_KEY."""
    chosen = key or read_operator_key(settings) or os.environ.get("LORIKEET_API_KEY")
    if not chosen:
        raise CommandError(no_key_message(settings))
    return GatewayClient(gateway_url(settings), chosen, tenant=tenant)


def _only_tenant(settings: Settings) -> str:
    names = [tenant.name for tenant in local_registry(settings).tenants()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise CommandError("There is no tenant yet. Create one with: lorikeet tenants create NAME")
    raise CommandError(f"Which tenant? Pass --tenant with one of: {', '.join(names)}")
