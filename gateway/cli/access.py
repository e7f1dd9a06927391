"""`lorikeet tenants` and `lorikeet keys`: who may use this installation. They write the registry of this machine's settings."""

import time
from typing import Annotated, Any

import typer

from adapters.registry import ApiKey, Scope, Tenant
from gateway.cli.common import (
    HELP,
    JsonOption,
    let_the_gateway_notice,
    local_registry,
    out,
    print_json,
    print_table,
    when,
)
from gateway.settings import Settings

DAY_S = 86400

tenants_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)
keys_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)


@tenants_app.callback()
def _tenants() -> None:
    """Create and list tenants. A tenant owns adapters and keys and never sees another's.

    Works on the registry of this machine's settings, whether or not a gateway runs; a running one notices at once.
    """


@tenants_app.command("create")
def create_tenant(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, '.', '_' or '-'.")],
    max_in_flight: Annotated[
        int | None, typer.Option(min=1, help="Most requests open at once.", show_default="the gateway's setting")
    ] = None,
    weight: Annotated[float, typer.Option(min=0.01, help="Share of a busy engine, relative to other tenants.")] = 1.0,
    json: JsonOption = False,
) -> None:
    """Create a tenant. Give it a key next: lorikeet keys create --tenant NAME"""
    settings = Settings()
    tenant = local_registry(settings).create_tenant(
        name, limits={"max_in_flight": max_in_flight} if max_in_flight else None, weight=weight
    )
    let_the_gateway_notice(settings)
    if json:
        print_json(tenant_document(tenant))
    else:
        out.print(f"Created tenant [bold]{tenant.name}[/bold]. Next: lorikeet keys create --tenant {tenant.name}")


@tenants_app.command("list")
def list_tenants(json: JsonOption = False) -> None:
    """List the tenants."""
    tenants = local_registry(Settings()).tenants()
    if json:
        print_json({"object": "list", "data": [tenant_document(tenant) for tenant in tenants]})
        return
    print_table(
        ("Tenant", "Created", "Weight"),
        [(t.name, when(t.created_at), f"{t.weight:g}") for t in tenants],
        empty="No tenant yet. Create one with: lorikeet tenants create NAME",
    )


@keys_app.callback()
def _keys() -> None:
    """Create, list and revoke API keys. A key is shown once, when it is created; only its hash is kept."""


@keys_app.command("create")
def create_key(
    tenant: Annotated[
        str | None, typer.Option(help="The tenant the key is bound to. Left out: an operator's key (scope admin).")
    ] = None,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What the key may do; may be repeated.", show_default="inference, adapters:read"),
    ] = None,
    name: Annotated[str, typer.Option(help="A label for people, such as 'ci'.")] = "",
    expires_days: Annotated[float | None, typer.Option(min=0.001, help="The key ends after this many days.")] = None,
    json: JsonOption = False,
) -> None:
    """Create a key and show it, this once.

    lorikeet keys create --tenant acme --scope inference --scope adapters:write
    """
    if tenant is None and not scope:
        raise typer.BadParameter(
            "name a tenant, or ask for an operator's key with --scope admin", param_hint="--tenant"
        )
    if tenant is not None and scope and Scope.ADMIN in scope:
        raise typer.BadParameter("'admin' is for operator's keys, which have no tenant", param_hint="--scope")
    scopes = scope or [Scope.INFERENCE, Scope.ADAPTERS_READ]
    expires_at = time.time() + expires_days * DAY_S if expires_days else None
    settings = Settings()
    key, plaintext = local_registry(settings).create_key(tenant, scopes, name=name, expires_at=expires_at)
    let_the_gateway_notice(settings)
    if json:
        print_json(key_document(key) | {"key": plaintext})
        return
    out.print(f"Created key {key.id} for {tenant or 'the operator'}: {', '.join(sorted(key.scopes))}.")
    out.print("It is shown only this once:\n")
    typer.echo(f"  {plaintext}\n")


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's keys.")] = None, json: JsonOption = False
) -> None:
    """List keys: what they may do and their last characters, never the key."""
    keys = local_registry(Settings()).keys(tenant)
    if json:
        print_json({"object": "list", "data": [key_document(key) for key in keys]})
        return
    now = time.time()
    print_table(
        ("Id", "Tenant", "Name", "Scopes", "Ends in", "Created", "State"),
        [
            (
                k.id,
                k.tenant or "(operator)",
                k.name,
                " ".join(sorted(k.scopes)),
                f"…{k.hint}",
                when(k.created_at),
                state,
            )
            for k in keys
            for state in [key_state(k, now)]
        ],
        empty="No keys. Create one with: lorikeet keys create --tenant NAME",
    )


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="From `lorikeet keys list`.")], json: JsonOption = False
) -> None:
    """Revoke a key for good. Requests that already run with it end normally."""
    settings = Settings()
    key = local_registry(settings).revoke_key(key_id)
    let_the_gateway_notice(settings)
    if json:
        print_json(key_document(key))
    else:
        out.print(f"Revoked {key.id}.")


def key_state(key: ApiKey, now: float) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "active" if key.valid_at(now) else "expired"


def tenant_document(tenant: Tenant) -> dict[str, Any]:
    return {
        "object": "tenant",
        "name": tenant.name,
        "created_at": int(tenant.created_at),
        "weight": tenant.weight,
    }


def key_document(key: ApiKey) -> dict[str, Any]:
    return {
        "object": "api_key",
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "hint": key.hint,
        "created_at": int(key.created_at),
        "expires_at": int(key.expires_at) if key.expires_at is not None else None,
        "revoked_at": int(key.revoked_at) if key.revoked_at is not None else None,
    }
