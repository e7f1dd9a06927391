"""`/v1/models`: the base model, the caller's own adapters, those shared with it, and what its fine-tuning jobs made."""

from typing import Any

from fastapi import APIRouter

from adapters.errors import AdapterNotFoundError
from adapters.names import parse_reference
from adapters.registry import AdapterRecord, AdapterVersion, Scope
from gateway.errors import PermissionDeniedError
from gateway.resolve import servable, tuned_reference, visible
from gateway.respond import list_object
from gateway.services import CallerDep, Services, ServicesDep

router = APIRouter(prefix="/v1/models")


def base_object(services: Services) -> dict[str, Any]:
    return {
        "id": services.base.name,
        "object": "model",
        "created": services.started_at,
        "owned_by": "lorikeet",
        "licence": services.base.licence,
    }


def adapter_object(
    record: AdapterRecord, version: AdapterVersion, *, tenant: str, services: Services
) -> dict[str, Any]:
    """An adapter as the caller names it, with the provenance a user of its answers may want."""
    return {
        "id": record.name if record.tenant == tenant else f"{record.tenant}/{record.name}",
        "object": "model",
        "created": int(version.created_at),
        "owned_by": record.tenant,
        "parent": services.base.name,
        "version": version.version,
        "digest": version.digest,
    }


@router.get("")
async def list_models(caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.INFERENCE).name
    snapshot = services.directory.snapshot
    objects = [base_object(services)]
    base = services.base.fingerprint.weights_digest
    for record in sorted(
        snapshot.adapters.values(), key=lambda record: (record.tenant != tenant, record.tenant, record.name)
    ):
        version = snapshot.versions.get((record.tenant, record.name, record.production or 0))
        if version is not None and servable(version, base) and visible(record, tenant):
            objects.append(adapter_object(record, version, tenant=tenant, services=services))
    for named in sorted(snapshot.names.values(), key=lambda named: (named.tenant, named.name)):
        version = snapshot.versions.get((named.tenant, named.adapter, named.version))
        if named.tenant == tenant and named.step is None and version is not None and servable(version, base):
            record = snapshot.adapters[named.tenant, named.adapter]
            objects.append(adapter_object(record, version, tenant=tenant, services=services) | {"id": named.name})
    return list_object(objects)


@router.get("/{model:path}")
async def retrieve_model(model: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.INFERENCE).name
    snapshot = services.directory.snapshot
    target = services.resolve(model, tenant)
    services.deployments.find(target)  # raises where the merged form is meant, and there is none
    if target.version is None:
        return base_object(services) | {"id": model}
    record = snapshot.adapters[(target.version.tenant, target.version.adapter)]
    return adapter_object(record, target.version, tenant=tenant, services=services) | {"id": model}


@router.delete("/{model:path}")
async def delete_model(model: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Delete an adapter of one's own, all its versions with it, or the one version named; requests that run end in peace."""
    tenant = caller.require(Scope.ADAPTERS_WRITE).name
    if model in services.base_names:
        raise PermissionDeniedError("The base model cannot be deleted.", param="model")
    snapshot = services.directory.snapshot
    reference = parse_reference(model) or tuned_reference(model, snapshot)
    if reference is None or reference.tenant not in (None, tenant) or (tenant, reference.name) not in snapshot.adapters:
        raise AdapterNotFoundError(model)
    if reference.version is None:
        await services.onboarding.delete_adapter(tenant, reference.name, actor=caller.actor)
    else:
        await services.onboarding.delete_version(tenant, reference.name, reference.version, actor=caller.actor)
    return {"id": model, "object": "model", "deleted": True}
