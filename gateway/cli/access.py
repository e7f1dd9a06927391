"""`lorikeet tenants`, `keys`, `limits` and `audit`: who may use this installation, how much of it, and who changed that.

They use the registry of this machine's settings. Over HTTP the same is `/v1/organization`.
"""

import time
from typing import Annotated, Any

import typer

from adapters.registry import ApiKey, AuditEntry, LimitKind, Limits, LimitSubject, Scope, Tenant
from adapters.tenancy import ROTATION_OVERLAP_S
from gateway.cli.common import (
    HELP,
    JsonOption,
    command,
    let_the_gateway_notice,
    local_registry,
    out,
    print_json,
    print_table,
    when,
)
from gateway.settings import Settings

DAY_S = 86400
HOUR_S = 3600

tenants_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)
keys_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)
limits_app = typer.Typer(add_completion=False, no_args_is_help=True, context_settings=HELP)


@tenants_app.callback()
def _tenants() -> None:
    """Create, list and archive tenants. A tenant owns adapters and keys and never sees another's.

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


@tenants_app.command("archive")
def archive_tenant(name: Annotated[str, typer.Argument(help="The tenant.")], json: JsonOption = False) -> None:
    """Stop a tenant's keys and adapters for good. What it stored and its name stay. Running requests end normally."""
    settings = Settings()
    tenant = local_registry(settings).archive_tenant(name)
    let_the_gateway_notice(settings)
    if json:
        print_json(tenant_document(tenant))
    else:
        out.print(f"Archived tenant {tenant.name}.")


@keys_app.callback()
def _keys() -> None:
    """Create, list, rotate and revoke API keys. A key is shown once, when it is created; only its hash is kept."""


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
    scopes = scope or [Scope.INFERENCE, Scope.ADAPTERS_READ]
    if tenant is None and Scope.ADMIN not in scopes:
        raise typer.BadParameter(
            "name a tenant, or ask for an operator's key with --scope admin", param_hint="--tenant"
        )
    if tenant is not None and Scope.ADMIN in scopes:
        raise typer.BadParameter("'admin' is for operator's keys, which have no tenant", param_hint="--scope")
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


@keys_app.command("rotate")
def rotate_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="From `lorikeet keys list`.")],
    overlap_hours: Annotated[float, typer.Option(min=0, help="How long the old key still works.")] = (
        ROTATION_OVERLAP_S / HOUR_S
    ),
    json: JsonOption = False,
) -> None:
    """Create a key in another's place and show it, this once. It has the same tenant, scopes, name and limits."""
    settings = Settings()
    key, plaintext = local_registry(settings).rotate_key(key_id, overlap_s=overlap_hours * HOUR_S)
    let_the_gateway_notice(settings)
    if json:
        print_json(key_document(key) | {"key": plaintext})
        return
    out.print(f"Created key {key.id}. {key_id} works for another {overlap_hours:g} h at most.")
    out.print("The new one is shown only this once:\n")
    typer.echo(f"  {plaintext}\n")


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


@limits_app.callback()
def _limits() -> None:
    """Set and list limits of tenants, their keys and their adapters. What is not set is unlimited, or the gateway's default."""


TenantArgument = Annotated[str, typer.Argument(help="The tenant.")]


def number_option(what: str) -> Any:
    return typer.Option(metavar="NUMBER|none", show_default=False, help=what)


@limits_app.command("set")
def set_limits(
    tenant: TenantArgument,
    key: Annotated[str | None, typer.Option(metavar="ID", help="Of this key of the tenant's.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Of this adapter of the tenant's, whoever calls it.")] = None,
    requests_per_minute: Annotated[str | None, number_option("Generation requests.")] = None,
    tokens_per_minute: Annotated[str | None, number_option("Prompt and output tokens together.")] = None,
    max_in_flight: Annotated[str | None, number_option("Requests open at once.")] = None,
    max_adapters: Annotated[str | None, number_option("Adapters of the tenant.")] = None,
    max_stored_bytes: Annotated[
        str | None, number_option("Sum of the versions and files that the tenant keeps.")
    ] = None,
    max_running_jobs: Annotated[str | None, number_option("Fine-tuning jobs that run at once.")] = None,
    max_queued_jobs: Annotated[str | None, number_option("Fine-tuning jobs that wait or are paused.")] = None,
    monthly_budget: Annotated[str | None, number_option("In the currency of the prices; of a tenant or key.")] = None,
    json: JsonOption = False,
) -> None:
    """Set a tenant's limits, or those of one key or adapter. `none` takes one away; what is not named stays.

    lorikeet limits set acme --requests-per-minute 600 --tokens-per-minute 100000
    """
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_in_flight": max_in_flight,
        "max_adapters": max_adapters,
        "max_stored_bytes": max_stored_bytes,
        "max_running_jobs": max_running_jobs,
        "max_queued_jobs": max_queued_jobs,
        "monthly_budget": monthly_budget,
    }
    changes = {name: limit_number(name, text) for name, text in given.items() if text is not None}
    if not changes:
        raise typer.BadParameter("name at least one limit, such as --requests-per-minute 600")
    if key is not None and adapter is not None:
        raise typer.BadParameter("name a key or an adapter, not both", param_hint="--adapter")
    settings = Settings()
    subject = LimitSubject(LimitKind.TENANT, tenant)
    if key is not None:
        subject = LimitSubject(LimitKind.KEY, tenant, key)
    if adapter is not None:
        subject = LimitSubject(LimitKind.ADAPTER, tenant, adapter)
    limits = local_registry(settings).set_limits(subject, changes)
    let_the_gateway_notice(settings)
    if json:
        print_json(limits_document(subject, limits))
    else:
        out.print(f"Limits of {subject}: {limits_line(limits)}.")


@limits_app.command("list")
def list_limits(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """List what was set."""
    found = local_registry(Settings()).limits(tenant)
    if json:
        print_json({"object": "list", "data": [limits_document(*one) for one in found.items()]})
        return
    print_table(
        ("Of", "Limits"),
        [(subject, limits_line(limits)) for subject, limits in found.items()],
        empty="No limits. Set some with: lorikeet limits set TENANT --requests-per-minute 600",
    )


def audit(
    tenant: Annotated[str | None, typer.Option(help="Only what concerns this tenant.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most entries shown.")] = 50,
    json: JsonOption = False,
) -> None:
    """Show who changed what, the newest first. Entries are never changed or deleted."""
    entries = local_registry(Settings()).audit(limit, tenant)
    if json:
        print_json({"object": "list", "data": [audit_document(entry) for entry in entries]})
        return
    print_table(
        ("When", "Who", "What", "Tenant", "Of", "Details"),
        [(when(e.time), e.actor, e.action, e.tenant or "", e.subject, details_line(e)) for e in entries],
        empty="Nothing has happened yet.",
    )


audit_app = command(audit)


def limit_number(name: str, text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        hint = "--" + name.replace("_", "-")
        raise typer.BadParameter(f"'{text}' is neither a number nor 'none'", param_hint=hint) from None


def limits_line(limits: Limits) -> str:
    found = [f"{name} {value:,}" for name, value in vars(limits).items() if value is not None]
    return ", ".join(found).replace("_", " ") or "none"


def details_line(entry: AuditEntry) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.details.items() if value not in (None, "", []))


def key_state(key: ApiKey, now: float) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "active" if key.valid_at(now) else "expired"


def tenant_document(tenant: Tenant) -> dict[str, Any]:
    return {
        "object": "tenant",
        "name": tenant.name,
        "created_at": int(tenant.created_at),
        "archived_at": int(tenant.archived_at) if tenant.archived_at is not None else None,
        "weight": tenant.weight,
    }


def limits_document(subject: LimitSubject, limits: Limits) -> dict[str, Any]:
    return {
        "object": "limits",
        "of": subject.kind.value,
        "tenant": subject.tenant,
        "name": subject.name or None,
        **vars(limits),
    }


def audit_document(entry: AuditEntry) -> dict[str, Any]:
    return {
        "object": "audit_entry",
        "id": entry.id,
        "time": int(entry.time),
        "actor": entry.actor,
        "action": entry.action,
        "tenant": entry.tenant,
        "subject": entry.subject,
        "details": dict(entry.details),
    }


def key_document(key: ApiKey) -> dict[str, Any]:
    return {
        "object": "api_key",
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "hint": key.hint,
        "account": key.account,
        "created_at": int(key.created_at),
        "expires_at": int(key.expires_at) if key.expires_at is not None else None,
        "revoked_at": int(key.revoked_at) if key.revoked_at is not None else None,
    }
