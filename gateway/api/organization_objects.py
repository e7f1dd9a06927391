"""What the registry's tenants, keys, limits and audit log look like in OpenAI's organization API. Pure.

A tenant is a project; the account that a key is rotated within is a service account. What has no name over there goes by ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapters.records import ApiKey, AuditEntry, LimitKind, Limits, LimitSubject, Tenant
from gateway.errors import InvalidRequestError

# OpenAI's name of a limit -> ours; the others have the same in both.
RATE_LIMITS = {"max_requests_per_1_minute": "requests_per_minute", "max_tokens_per_1_minute": "tokens_per_minute"}
# Our name of an act -> OpenAI's, where there is one.
EVENT_TYPES = {
    "tenant.create": "project.created",
    "tenant.update": "project.updated",
    "tenant.archive": "project.archived",
    "key.create": "api_key.created",
    "key.rotate": "api_key.updated",
    "key.revoke": "api_key.deleted",
    "limits.set": "rate_limit.updated",
}
ACTIONS = {event: action for action, event in EVENT_TYPES.items()}
_ENTRY = "audit_log-"
_LIMIT_IDS = {LimitKind.ADAPTER: "rl-adapter-", LimitKind.KEY: "rl-key-"}
_PROJECT_LIMIT = "rl-project"


def page(objects: Sequence[Mapping[str, Any]], *, after: str | None, limit: int) -> dict[str, Any]:
    """Those that follow the one whose id is `after`. Raises InvalidRequestError when none is."""
    start = 0
    if after is not None:
        ids = [one["id"] for one in objects]
        if after not in ids:
            raise InvalidRequestError(f"There is no '{after}' in this list.", param="after")
        start = ids.index(after) + 1
    return list_object(objects[start : start + limit], has_more=len(objects) > start + limit)


def list_object(objects: Sequence[Mapping[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": list(objects),
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }


def project_object(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.name,
        "object": "organization.project",
        "name": tenant.name,
        "created_at": int(tenant.created_at),
        "archived_at": _seconds(tenant.archived_at),
        "status": "active" if tenant.archived_at is None else "archived",
        "weight": tenant.weight,
    }


def accounts(keys: Iterable[ApiKey]) -> list[dict[str, Any]]:
    """The service accounts of one tenant that have a key left, the oldest first. keys: all of the tenant's."""
    grouped: dict[str, list[ApiKey]] = {}
    for key in keys:
        if key.account is not None:
            grouped.setdefault(key.account, []).append(key)
    return [
        _account(account, name=own[-1].name, created_at=own[0].created_at)
        for account, own in grouped.items()
        if any(key.revoked_at is None for key in own)
    ]


def _account(account: str | None, *, name: str, created_at: float) -> dict[str, Any]:
    return {
        "id": account,
        "object": "organization.project.service_account",
        "name": name,
        "role": "member",
        "created_at": int(created_at),
    }


def new_account_object(key: ApiKey, plaintext: str) -> dict[str, Any]:
    return _account(key.account, name=key.name, created_at=key.created_at) | {"api_key": new_key_object(key, plaintext)}


def new_key_object(key: ApiKey, plaintext: str) -> dict[str, Any]:
    """The only object that shows a key."""
    return {
        "id": key.id,
        "object": "organization.project.service_account.api_key",
        "name": key.name,
        "value": plaintext,
        "created_at": int(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "scopes": sorted(key.scopes),
    }


def key_object(key: ApiKey, account: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "organization.project.api_key",
        "name": key.name,
        "redacted_value": redacted(key),
        "created_at": int(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "last_used_at": None,
        "owner": {"type": "service_account", "service_account": account},
        "owner_project_access": "active",
        "scopes": sorted(key.scopes),
    }


def admin_key_object(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "organization.admin_api_key",
        "name": key.name,
        "redacted_value": redacted(key),
        "created_at": int(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "last_used_at": None,
        "owner": {"type": "user", "object": "organization.user", "id": "operator", "name": "operator", "role": "owner"},
    }


def redacted(key: ApiKey) -> str:
    return f"lk-…{key.hint}"


def limit_id(subject: LimitSubject) -> str:
    return _PROJECT_LIMIT if subject.kind is LimitKind.TENANT else _LIMIT_IDS[subject.kind] + subject.name


def limit_subject(tenant: str, limit_id: str) -> LimitSubject | None:
    """What a rate limit's id speaks of; None for what is no such id."""
    if limit_id == _PROJECT_LIMIT:
        return LimitSubject(LimitKind.TENANT, tenant)
    for kind, prefix in _LIMIT_IDS.items():
        if limit_id.startswith(prefix):
            return LimitSubject(kind, tenant, limit_id.removeprefix(prefix))
    return None


def limit_object(subject: LimitSubject, limits: Limits) -> dict[str, Any]:
    """None is no limit. model: the adapter, or `*` for all."""
    found = {
        "id": limit_id(subject),
        "object": "project.rate_limit",
        "model": subject.name if subject.kind is LimitKind.ADAPTER else "*",
        "api_key_id": subject.name if subject.kind is LimitKind.KEY else None,
    }
    ours = {name: openai for openai, name in RATE_LIMITS.items()}
    return found | {ours.get(name, name): value for name, value in vars(limits).items()}


def audit_object(entry: AuditEntry) -> dict[str, Any]:
    """The details stand under the event's own name, as over there."""
    event = EVENT_TYPES.get(entry.action, entry.action)
    return {
        "id": f"{_ENTRY}{entry.id}",
        "type": event,
        "effective_at": int(entry.time),
        "project": {"id": entry.tenant, "name": entry.tenant} if entry.tenant is not None else None,
        "actor": _actor(entry.actor),
        event: {"id": entry.subject, **_details(entry)},
    }


def entry_number(audit_id: str, *, param: str) -> int:
    """Raises InvalidRequestError for what is no id of an entry."""
    number = audit_id.removeprefix(_ENTRY)
    if number == audit_id or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise InvalidRequestError(f"There is no '{audit_id}' in this list.", param=param)
    return int(number)


def _details(entry: AuditEntry) -> dict[str, Any]:
    if entry.action in ("tenant.create", "key.create"):
        return {"data": dict(entry.details)}
    return {"changes_requested": dict(entry.details)} if entry.details else {}


def _actor(actor: str) -> dict[str, Any]:
    """A key, or who sat at the machine."""
    if actor.startswith("key:"):
        return {"type": "api_key", "api_key": {"id": actor.removeprefix("key:"), "type": "service_account"}}
    return {"type": "session", "session": {"user": {"id": actor}}}


def _seconds(time: float | None) -> int | None:
    return int(time) if time is not None else None
