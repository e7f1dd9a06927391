"""`/v1/organization`: tenants, their keys and limits, operators' keys and the audit log, after OpenAI's organization API.

For operators' keys only. A tenant is a project, whose id is its name.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from adapters.errors import KeyNotFoundError
from adapters.records import NO_LIMITS, ApiKey, AuditFilter, LimitKind, LimitSubject, Scope
from adapters.tenancy import ROTATION_OVERLAP_S
from gateway.api import organization_objects as objects
from gateway.api.json_body import read_json
from gateway.api.usage import Parameters
from gateway.errors import InvalidRequestError
from gateway.services import CallerDep, ServicesDep
from gateway.tenants import Caller

T = TypeVar("T")
YEAR_S = 366 * 86400


def operator(caller: CallerDep) -> Caller:
    caller.require_operator()
    return caller


OperatorDep = Annotated[Caller, Depends(operator)]
After = Annotated[str | None, Query()]
Limit = Annotated[int, Query(ge=1, le=100)]
router = APIRouter(prefix="/v1/organization", tags=["organization"], dependencies=[Depends(operator)])


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewProject(_Body):
    name: str
    weight: float = Field(1.0, ge=0.01, le=1000)


class ProjectChange(_Body):
    name: str | None = None
    weight: float | None = Field(None, ge=0.01, le=1000)


class NewServiceAccount(_Body):
    name: str
    expires_in_seconds: int | None = Field(None, gt=0, le=100 * YEAR_S)
    scopes: list[Scope] = Field(default=[Scope.INFERENCE, Scope.ADAPTERS_READ], min_length=1)


class Rotation(_Body):
    overlap_seconds: int = Field(int(ROTATION_OVERLAP_S), ge=0, le=YEAR_S)


class NewAdminKey(_Body):
    name: str
    expires_in_seconds: int | None = Field(None, gt=0, le=100 * YEAR_S)


class LimitChange(_Body):
    """Null takes a limit away; one that is not named stays."""

    max_requests_per_1_minute: int | None = None
    max_tokens_per_1_minute: int | None = None
    max_in_flight: int | None = None
    max_adapters: int | None = None
    max_stored_bytes: int | None = None
    max_running_jobs: int | None = None
    max_queued_jobs: int | None = None
    monthly_budget: float | None = None


async def written(services: ServicesDep, change: Callable[[], T]) -> T:
    """Make a change in the registry; it is in force here when this returns."""
    result = await asyncio.to_thread(change)
    await services.directory.refresh()
    return result


# Projects


@router.get("/projects")
async def list_projects(
    services: ServicesDep, after: After = None, limit: Limit = 20, include_archived: bool = False
) -> dict[str, Any]:
    tenants = await asyncio.to_thread(services.registry.tenants, include_archived=include_archived)
    return objects.page([objects.project_object(tenant) for tenant in tenants], after=after, limit=limit)


@router.post("/projects")
async def create_project(request: Request, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    sent = await read_json(request, NewProject)
    registry = services.registry
    tenant = await written(services, lambda: registry.create_tenant(sent.name, weight=sent.weight, actor=caller.actor))
    return objects.project_object(tenant)


@router.get("/projects/{project}")
async def get_project(project: str, services: ServicesDep) -> dict[str, Any]:
    return objects.project_object(await asyncio.to_thread(services.registry.tenant, project))


@router.post("/projects/{project}")
async def change_project(project: str, request: Request, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    sent = await read_json(request, ProjectChange)
    registry = services.registry
    weight = sent.weight if sent.weight is not None else (await asyncio.to_thread(registry.tenant, project)).weight
    if sent.name not in (None, project):
        raise InvalidRequestError("A project's name is its id here, and stays.", param="name")
    return objects.project_object(
        await written(services, lambda: registry.update_tenant(project, weight=weight, actor=caller.actor))
    )


@router.post("/projects/{project}/archive")
async def archive_project(project: str, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    """Its keys and adapters stop for good; running requests end in peace."""
    registry = services.registry
    return objects.project_object(await written(services, lambda: registry.archive_tenant(project, actor=caller.actor)))


# Service accounts and keys


@router.get("/projects/{project}/service_accounts")
async def list_accounts(project: str, services: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    return objects.page(objects.accounts(await _keys(project, services)), after=after, limit=limit)


@router.post("/projects/{project}/service_accounts")
async def create_account(project: str, request: Request, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    """The account and its key, which is shown this once."""
    sent = await read_json(request, NewServiceAccount)
    if Scope.ADMIN in sent.scopes:
        raise InvalidRequestError("'admin' is for operators' keys, which have no project.", param="scopes")
    registry, expires_at = services.registry, _ends_at(sent.expires_in_seconds)
    key, plaintext = await written(
        services,
        lambda: registry.create_key(project, sent.scopes, name=sent.name, expires_at=expires_at, actor=caller.actor),
    )
    return objects.new_account_object(key, plaintext)


@router.get("/projects/{project}/service_accounts/{account}")
async def get_account(project: str, account: str, services: ServicesDep) -> dict[str, Any]:
    return _account(account, await _keys(project, services))


@router.delete("/projects/{project}/service_accounts/{account}")
async def delete_account(project: str, account: str, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    """Revokes all its keys."""
    _account(account, await _keys(project, services))
    registry = services.registry
    await written(services, lambda: registry.revoke_account(project, account, actor=caller.actor))
    return {"id": account, "object": "organization.project.service_account.deleted", "deleted": True}


@router.get("/projects/{project}/api_keys")
async def list_keys(project: str, services: ServicesDep, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Those that were not revoked."""
    keys = await _keys(project, services)
    owners = {one["id"]: one for one in objects.accounts(keys)}
    live = [objects.key_object(key, owners.get(key.account)) for key in keys if key.revoked_at is None]
    return objects.page(live, after=after, limit=limit)


@router.get("/projects/{project}/api_keys/{key_id}")
async def get_key(project: str, key_id: str, services: ServicesDep) -> dict[str, Any]:
    keys = await _keys(project, services)
    key = _live(key_id, keys)
    return objects.key_object(key, _account(key.account or "", keys))


@router.delete("/projects/{project}/api_keys/{key_id}")
async def delete_key(project: str, key_id: str, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    _live(key_id, await _keys(project, services))
    registry = services.registry
    await written(services, lambda: registry.revoke_key(key_id, actor=caller.actor))
    return {"id": key_id, "object": "organization.project.api_key.deleted", "deleted": True}


@router.post("/projects/{project}/api_keys/{key_id}/rotate")
async def rotate_key(
    project: str, key_id: str, request: Request, caller: OperatorDep, services: ServicesDep
) -> dict[str, Any]:
    """A new key of the same account, shown this once; the old one ends after the overlap. Ours, not OpenAI's."""
    overlap_s = (await read_json(request, Rotation)).overlap_seconds
    _live(key_id, await _keys(project, services))
    registry = services.registry
    key, plaintext = await written(
        services, lambda: registry.rotate_key(key_id, overlap_s=overlap_s, actor=caller.actor)
    )
    return objects.new_key_object(key, plaintext)


# Limits


@router.get("/projects/{project}/rate_limits")
async def list_limits(project: str, services: ServicesDep, after: After = None, limit: Limit = 100) -> dict[str, Any]:
    """Of the project, each of its adapters and each of its keys. What is null is the gateway's default, or unlimited."""
    keys = await _keys(project, services)
    found = await asyncio.to_thread(services.registry.limits, project)
    adapters = await asyncio.to_thread(services.registry.adapters, project)
    subjects = [
        LimitSubject(LimitKind.TENANT, project),
        *(LimitSubject(LimitKind.ADAPTER, project, adapter.name) for adapter in adapters),
        *(LimitSubject(LimitKind.KEY, project, key.id) for key in keys if key.revoked_at is None),
    ]
    data = [objects.limit_object(subject, found.get(subject, NO_LIMITS)) for subject in subjects]
    return objects.page(data, after=after, limit=limit)


@router.post("/projects/{project}/rate_limits/{limit_id}")
async def change_limit(
    project: str, limit_id: str, request: Request, caller: OperatorDep, services: ServicesDep
) -> dict[str, Any]:
    sent = await read_json(request, LimitChange)
    subject = objects.limit_subject(project, limit_id)
    if subject is None:
        raise InvalidRequestError(f"There is no rate limit '{limit_id}'.", param="rate_limit_id")
    changes = {objects.RATE_LIMITS.get(name, name): getattr(sent, name) for name in sent.model_fields_set}
    registry = services.registry
    limits = await written(services, lambda: registry.set_limits(subject, changes, actor=caller.actor))
    return objects.limit_object(subject, limits)


# Operators' keys


@router.get("/admin_api_keys")
async def list_admin_keys(
    services: ServicesDep, after: After = None, limit: Limit = 20, order: str = Query("asc", pattern="^(asc|desc)$")
) -> dict[str, Any]:
    keys = await asyncio.to_thread(services.registry.keys)
    live = [objects.admin_key_object(key) for key in keys if key.tenant is None and key.revoked_at is None]
    return objects.page(live[::-1] if order == "desc" else live, after=after, limit=limit)


@router.post("/admin_api_keys")
async def create_admin_key(request: Request, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    """The key, which is shown this once."""
    sent = await read_json(request, NewAdminKey)
    registry, expires_at = services.registry, _ends_at(sent.expires_in_seconds)
    key, plaintext = await written(
        services,
        lambda: registry.create_key(None, [Scope.ADMIN], name=sent.name, expires_at=expires_at, actor=caller.actor),
    )
    return objects.admin_key_object(key) | {"value": plaintext}


@router.get("/admin_api_keys/{key_id}")
async def get_admin_key(key_id: str, services: ServicesDep) -> dict[str, Any]:
    return objects.admin_key_object(await _admin_key(key_id, services))


@router.delete("/admin_api_keys/{key_id}")
async def delete_admin_key(key_id: str, caller: OperatorDep, services: ServicesDep) -> dict[str, Any]:
    await _admin_key(key_id, services)
    registry = services.registry
    await written(services, lambda: registry.revoke_key(key_id, actor=caller.actor))
    return {"id": key_id, "object": "organization.admin_api_key.deleted", "deleted": True}


# What happened

EFFECTIVE = {"gte": ("since", 0), "gt": ("since", 1), "lt": ("until", 0), "lte": ("until", 1)}


@router.get("/audit_logs")
async def list_audit_logs(request: Request, services: ServicesDep) -> dict[str, Any]:
    """The newest first. after: an older page; before: a newer one."""
    times = {f"effective_at[{name}]": bound for name, bound in EFFECTIVE.items()}
    lists = ("project_ids", "actor_ids", "event_types", "resource_ids")
    asked = Parameters(request.query_params, [*times, *lists, "after", "before", "limit"])
    bounds = {
        bound: asked.number(name, 0, at_least=0, at_most=10**12) + add
        for name, (bound, add) in times.items()
        if name in request.query_params
    }
    after, before = request.query_params.get("after"), request.query_params.get("before")
    limit = asked.number("limit", 20, at_least=1, at_most=100)
    where = AuditFilter(
        tenants=asked.several("project_ids") or (),
        actors=[actor for one in asked.several("actor_ids") or () for actor in (one, f"key:{one}")],
        actions=[objects.ACTIONS.get(event, event) for event in asked.several("event_types") or ()],
        subjects=asked.several("resource_ids") or (),
        since=bounds.get("since"),
        until=bounds.get("until"),
        older_than=objects.entry_number(after, param="after") if after else None,
        newer_than=objects.entry_number(before, param="before") if before else None,
    )
    found = await asyncio.to_thread(services.registry.audit, limit + 1, where=where)
    kept = found[-limit:] if before else found[:limit]
    return objects.list_object([objects.audit_object(entry) for entry in kept], has_more=len(found) > limit)


# Parts of the above


async def _keys(project: str, services: ServicesDep) -> list[ApiKey]:
    """Every key of a project that exists, the oldest first. Raises TenantNotFoundError."""
    await asyncio.to_thread(services.registry.tenant, project)
    return await asyncio.to_thread(services.registry.keys, project)


def _live(key_id: str, keys: list[ApiKey]) -> ApiKey:
    found = next((key for key in keys if key.id == key_id and key.revoked_at is None), None)
    if found is None:
        raise KeyNotFoundError(key_id)
    return found


def _account(account: str, keys: list[ApiKey]) -> dict[str, Any]:
    found = next((one for one in objects.accounts(keys) if one["id"] == account), None)
    if found is None:
        raise KeyNotFoundError(account)
    return found


async def _admin_key(key_id: str, services: ServicesDep) -> ApiKey:
    key = await asyncio.to_thread(services.registry.key, key_id)
    if key.tenant is not None or key.revoked_at is not None:
        raise KeyNotFoundError(key_id)
    return key


def _ends_at(seconds: int | None) -> float | None:
    return time.time() + seconds if seconds is not None else None
