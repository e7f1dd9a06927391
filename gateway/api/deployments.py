"""/v1/deployments: engines of their own for merged versions. Operators deploy and take down; a tenant sees its own."""

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from adapters.errors import DeploymentNotFoundError
from adapters.records import Deployment
from adapters.registry import Scope
from adapters.wording import one_line
from gateway.api.json_body import read_json
from gateway.deployments import Dedicated
from gateway.engines.footprint import Footprint, footprint
from gateway.engines.profile import EngineProfile
from gateway.errors import InvalidRequestError, PermissionDeniedError
from gateway.resolve import ADAPTER, MERGED
from gateway.respond import list_object
from gateway.services import CallerDep, Services, ServicesDep
from gateway.tenants import Caller

router = APIRouter(prefix="/v1/deployments", tags=["deployments"])


class Wanted(BaseModel):
    """An engine of its own for one merged form that is stored on the gateway's machine; of one that is there, the share."""

    model_config = ConfigDict(extra="forbid")

    adapter: str
    version: int = Field(gt=0, le=10**9)
    digest: str = Field(description="Of the checkpoint, as `lorikeet deploy` stored it.")
    share: float = Field(1.0, ge=0, le=1, description="Of the version's requests; the others go to base + adapter.")
    profile: dict[str, Any] | None = Field(None, description="An engine profile, whole; else one for a merged version.")


@router.post("", status_code=201)
async def deploy(request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Want an engine for a version, or change its share. It is started in the background: ask for its `state`."""
    tenant = _operator_for(caller)
    wanted = await read_json(request, Wanted)
    if wanted.profile is not None:
        try:
            EngineProfile.model_validate(wanted.profile)
        except ValidationError as exc:
            raise InvalidRequestError(f"The engine profile is not valid: {one_line(exc)}", param="profile") from exc
    deployment = await asyncio.to_thread(
        services.registry.deploy,
        tenant,
        wanted.adapter,
        wanted.version,
        digest=wanted.digest,
        share=wanted.share,
        profile=wanted.profile,
        actor=caller.actor,
    )
    await services.directory.refresh()
    return deployment_object(deployment, caller, services)


@router.get("")
async def list_deployments(caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """The tenant's, or every tenant's for an operator who names none; with engines on their way out until they are gone."""
    only = None if caller.is_operator and caller.tenant is None else caller.require(Scope.ADAPTERS_READ).name
    snapshot = await services.directory.refresh()
    found = {one.deployment.key: one.deployment for one in services.deployments.running} | dict(snapshot.deployments)
    shown = [one for key, one in sorted(found.items()) if only in (None, one.tenant)]
    return list_object([await _measured(one, caller, services) for one in shown])


@router.get("/{name}/{version}")
async def get_deployment(name: str, version: int, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.ADAPTERS_READ)
    snapshot = await services.directory.refresh()
    found = snapshot.deployments.get((tenant.name, name, version))
    if found is None:
        raise DeploymentNotFoundError(name, version)
    return await _measured(found, caller, services)


@router.delete("/{name}/{version}")
async def undeploy(name: str, version: int, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Its engine takes no new requests, ends those it has, and goes. The merged form is kept."""
    tenant = _operator_for(caller)
    await asyncio.to_thread(services.registry.undeploy, tenant, name, version, actor=caller.actor)
    await services.directory.refresh()
    return {"id": f"{name}@{version}", "object": "deployment", "deleted": True}


def deployment_object(
    deployment: Deployment, caller: Caller, services: Services, memory: Footprint | None = None
) -> dict[str, Any]:
    """What an operator may know besides: why the engine did not start, and what it takes of the machine."""
    one = next((one for one in services.deployments.running if one.deployment.key == deployment.key), None)
    told = {
        "id": f"{deployment.adapter}@{deployment.version}",
        "object": "deployment",
        "tenant": deployment.tenant,
        "adapter": deployment.adapter,
        "version": deployment.version,
        "form": MERGED,
        "scheme": deployment.scheme,
        "digest": deployment.digest,
        "share": deployment.share,
        "state": _state(one, deployment, services),
        "engine": deployment.engine_id,
        "in_flight": one.replica.admission.in_flight if one else 0,
        "waiting": one.replica.admission.waiting if one else 0,
        "requests": {form: one.answered[form] if one else 0 for form in (MERGED, ADAPTER)},
        "created_at": int(deployment.created_at),
        "created_by": deployment.actor,
    }
    if not caller.is_operator:
        return told
    problem = one.problem if one is not None else services.deployments.problems.get(deployment.key)
    return told | {"problem": problem, "memory": memory.as_dict() if memory is not None else None}


async def _measured(deployment: Deployment, caller: Caller, services: Services) -> dict[str, Any]:
    memory = None
    if caller.is_operator:
        memory = await asyncio.to_thread(footprint, services.settings.home.run, deployment.engine_id)
    return deployment_object(deployment, caller, services, memory)


def _state(one: Dedicated | None, deployment: Deployment, services: Services) -> str:
    """That of its engine; `elsewhere` where the checkpoint's files are not on this gateway's machine."""
    if one is not None:
        return one.state
    if deployment.key in services.deployments.problems:
        return "failed"
    here = (services.settings.home.merged / deployment.folder).is_dir()
    return "starting" if here else "elsewhere"


def _operator_for(caller: Caller) -> str:
    """The tenant an operator acts for. An engine takes a machine's memory, which is not a tenant's to give away."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    if not caller.is_operator:
        raise PermissionDeniedError("Only an operator's key may start or stop engines.")
    return tenant.name
