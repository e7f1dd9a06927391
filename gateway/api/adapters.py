"""/v1/adapters: upload, look at, promote, roll back and delete adapters. A tenant's names are its own: others' do not exist."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request

from adapters.errors import AdapterNotFoundError, BlobError, InvalidAdapterError, VersionNotFoundError
from adapters.evaluations import AttachedEvaluation, Evaluation
from adapters.licences import PROMOTION
from adapters.manifest import MANIFEST_FILE, licence_sources
from adapters.names import TunedName, check_name, parse_tuned_name
from adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from adapters.registry import AdapterRecord, AdapterVersion, Scope, Snapshot, VersionStatus
from gateway.api.json_body import read_json
from gateway.errors import GatewayError, InvalidRequestError, PermissionDeniedError
from gateway.multipart import Form, receive_form
from gateway.respond import list_object
from gateway.services import CallerDep, Services, ServicesDep
from gateway.tenants import Caller

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

WAIT_S = 300.0  # longest `?wait=true`; the official client gives up after 600 s
WARM_S = 30.0  # longest a promotion waits for the engines to load the version; then the first request does
# Field of the two-file upload -> the file's name in a PEFT folder.
PLAIN_FILES = {"adapter_config": CONFIG_FILE, "adapter_model": WEIGHTS_FILE, "manifest": MANIFEST_FILE}


class Promotion(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(gt=0, le=10**9)
    force: bool = False
    reason: str | None = Field(None, min_length=3, max_length=1000)

    @model_validator(mode="after")
    def _why(self) -> Self:
        if self.force != (self.reason is not None):
            raise ValueError("'force' needs a 'reason', and a reason is for 'force' only")
        return self


class FromUpload(BaseModel):
    """A version from what was uploaded in parts."""

    model_config = ConfigDict(extra="forbid")

    name: str
    upload_id: str


@router.post("", status_code=201)
async def create_version(
    request: Request, response: Response, caller: CallerDep, services: ServicesDep, wait: bool = False
) -> dict[str, Any]:
    """Upload an adapter as a new version: multipart `name` with `file` (zip, tar, tar.gz) or with `adapter_config` and
    `adapter_model` (and `manifest`); or JSON `name` and `upload_id`. With `?wait=true` answers when it is ready or refused.
    """
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    if request.headers.get("content-type", "").startswith("application/json"):
        version, created = await _accept_upload(request, services, caller, tenant.name)
    else:
        version, created = await _accept_form(request, services, caller, tenant.name)
    if wait:
        version = await services.onboarding.wait(tenant.name, version.adapter, version.version, WAIT_S)
        if version.status is VersionStatus.REFUSED:
            raise InvalidAdapterError(version.faults)
    response.status_code = 201 if created else 200
    return version_object(version, await services.directory.refresh(), services)


@router.get("")
async def list_adapters(caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """The tenant's adapters, by name."""
    tenant = caller.require(Scope.ADAPTERS_READ)
    snapshot = await services.directory.refresh()
    return list_object(
        adapter_object(record, snapshot, services)
        for _, record in sorted(snapshot.adapters.items())
        if record.tenant == tenant.name
    )


@router.get("/{name}")
async def get_adapter(name: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.ADAPTERS_READ)
    snapshot = await services.directory.refresh()
    return adapter_object(_record(snapshot, tenant.name, name), snapshot, services)


@router.get("/{name}/versions")
async def list_versions(name: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Every version that was not deleted, the newest first."""
    tenant = caller.require(Scope.ADAPTERS_READ)
    snapshot = await services.directory.refresh()
    _record(snapshot, tenant.name, name)
    attached = await asyncio.to_thread(services.registry.evaluations, tenant.name, name)
    versions = list(reversed(_versions(snapshot, tenant.name, name)))
    licences = await asyncio.to_thread(lambda: [_licences(version, services) for version in versions])
    return list_object(
        version_object(version, snapshot, services) | _evaluated(version, attached) | judged
        for version, judged in zip(versions, licences, strict=True)
    )


@router.get("/{name}/versions/{number}")
async def get_version(name: str, number: int, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.ADAPTERS_READ)
    snapshot = await services.directory.refresh()
    version = _version(snapshot, tenant.name, name, number)
    attached = await asyncio.to_thread(services.registry.evaluations, tenant.name, name, number)
    licences = await asyncio.to_thread(_licences, version, services)
    return version_object(version, snapshot, services) | _evaluated(version, attached) | licences


@router.post("/{name}/versions/{number}/evaluations", status_code=201)
async def attach_evaluation(
    name: str, number: int, request: Request, caller: CallerDep, services: ServicesDep
) -> dict[str, Any]:
    """Attach what was measured of a version as it is served. Nothing attached is ever changed; the gate reads all of it."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    evaluation = await read_json(request, Evaluation)
    attached = await asyncio.to_thread(
        services.registry.add_evaluation, tenant.name, name, number, evaluation, actor=caller.actor
    )
    return evaluation_object(attached)


@router.get("/{name}/versions/{number}/evaluations")
async def list_evaluations(name: str, number: int, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Everything attached to a version, the oldest first."""
    tenant = caller.require(Scope.ADAPTERS_READ)
    found = await asyncio.to_thread(services.registry.evaluations, tenant.name, name, number)
    return list_object(evaluation_object(one) for one in found)


@router.get("/{name}/versions/{number}/gate")
async def ask_the_gate(name: str, number: int, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """What the promotion policy says of a version now, with its reasons. Nothing is recorded."""
    tenant = caller.require(Scope.ADAPTERS_READ)
    decision = await asyncio.to_thread(services.registry.decide, tenant.name, name, number, services.promotion_policy)
    return {
        "object": "adapter.gate",
        "id": f"{name}@{number}",
        "allowed": decision.allowed,
        "reasons": list(decision.reasons),
        "passed": list(decision.passed),
    }


@router.post("/{name}/promote")
async def promote(name: str, request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Let the version of the body's `version` answer to the name. It is loaded first, so that no request waits for that.

    `force` with a `reason` passes a gate that says no; both go into the audit log.
    """
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    wanted = await read_json(request, Promotion)
    number = wanted.version
    snapshot = await services.directory.refresh()
    await _warm(services, _version(snapshot, tenant.name, name, number))
    record = await asyncio.to_thread(
        services.registry.promote,
        tenant.name,
        name,
        number,
        policy=services.promotion_policy,
        forced=wanted.reason,
        actor=caller.actor,
    )
    return adapter_object(record, await services.directory.refresh(), services)


@router.post("/{name}/rollback")
async def rollback(name: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Back to the production version before."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    snapshot = await services.directory.refresh()
    previous = _record(snapshot, tenant.name, name).previous
    if previous is not None:
        await _warm(services, _version(snapshot, tenant.name, name, previous))
    record = await asyncio.to_thread(services.registry.rollback, tenant.name, name, actor=caller.actor)
    return adapter_object(record, await services.directory.refresh(), services)


@router.delete("/{name}")
async def delete_adapter(name: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Delete an adapter with all its versions. Requests that are running keep theirs to their end."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    await services.onboarding.delete_adapter(tenant.name, name, actor=caller.actor)
    return {"id": name, "object": "adapter", "deleted": True}


@router.delete("/{name}/versions/{number}")
async def delete_version(name: str, number: int, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    await services.onboarding.delete_version(tenant.name, name, number, actor=caller.actor)
    return {"id": f"{name}@{number}", "object": "adapter.version", "deleted": True}


def adapter_object(record: AdapterRecord, snapshot: Snapshot, services: Services) -> dict[str, Any]:
    versions = _versions(snapshot, record.tenant, record.name)
    return {
        "id": record.name,
        "object": "adapter",
        "name": record.name,
        "tenant": record.tenant,
        "created_at": int(record.created_at),
        "production": record.production,
        "previous": record.previous,
        "latest": versions[-1].version if versions else None,
        "versions": len(versions),
        "status": versions[-1].status.value if versions else None,
        "shared_with": sorted(record.shared_with),
        "base_model": services.base.name,
    }


def version_object(version: AdapterVersion, snapshot: Snapshot, services: Services) -> dict[str, Any]:
    record = snapshot.adapters.get((version.tenant, version.adapter))
    known = version.status is not VersionStatus.QUARANTINED  # of another, nothing is known of the content
    return {
        "id": f"{version.adapter}@{version.version}",
        "object": "adapter.version",
        "adapter": version.adapter,
        "version": version.version,
        "digest": version.digest if known else None,
        "status": version.status.value,
        "created_at": int(version.created_at),
        "rank": version.rank if known else None,
        "alpha": version.alpha if known else None,
        "size_bytes": version.size_bytes if known else None,
        "production": record is not None and record.production == version.version,
        "base_model": services.base.name,
        "licence": services.base.licence,
        "warnings": list(version.warnings),
        "faults": [fault.as_dict() for fault in version.faults],
        "probe": dict(version.probe) if version.probe is not None else None,
    }


def _evaluated(version: AdapterVersion, attached: Sequence[AttachedEvaluation]) -> dict[str, Any]:
    """What was attached to the version: when, by whom, on which tasks. All of it: GET …/evaluations."""
    return {
        "evaluations": [
            {
                "id": f"eval-{one.id}",
                "created_at": int(one.created_at),
                "created_by": one.actor,
                "tasks": sorted({score.task for score in one.evaluation.scores}),
                "sheet": one.evaluation.sheet is not None,
            }
            for one in attached
            if one.version == version.version
        ]
    }


def _licences(version: AdapterVersion, services: Services) -> dict[str, Any]:
    """What the terms of base, data and teachers mean, by the gate's policy. Reads the manifest from the database.

    The base's terms are the served base's, whatever the manifest says of them. None: the version brought no manifest, so
    nothing is known of its data.
    """
    if version.status is VersionStatus.QUARANTINED or (manifest := version.manifest) is None:
        return {"licences": None}
    policy = services.promotion_policy.licence if services.promotion_policy else PROMOTION
    verdict = manifest.judge_licences(policy, base_licence=services.base.licence)
    sources = licence_sources(manifest.base.model, services.base.licence, manifest.data)
    return {
        "licences": {
            "level": verdict.level,
            "sources": [source.model_dump(mode="json") for source in sources],
            "findings": [finding.model_dump(mode="json") for finding in verdict.findings],
            "terms": [term.model_dump(mode="json") for term in verdict.terms],
        }
    }


def evaluation_object(attached: AttachedEvaluation) -> dict[str, Any]:
    return {
        "id": f"eval-{attached.id}",
        "object": "adapter.evaluation",
        "created_at": int(attached.created_at),
        "created_by": attached.actor,
        **attached.evaluation.model_dump(mode="json"),
    }


async def _accept_form(
    request: Request, services: Services, caller: Caller, tenant: str
) -> tuple[AdapterVersion, bool]:
    async with services.onboarding.quarantine() as folder:
        form = await receive_form(
            request, folder, files=["file", *PLAIN_FILES], max_bytes=services.settings.uploads.max_bytes
        )
        name = check_name(_field(form, "name"))
        unknown = form.fields.keys() - {"name", "model_name"}
        if unknown:
            field = min(unknown)
            raise InvalidRequestError(f"Unknown field '{field}'.", param=field, code="unknown_parameter")
        if "file" in form.files:
            if len(form.files) > 1:
                raise InvalidRequestError("Send either 'file' or the files one by one, not both.", param="file")
            tuned = _tuned_name(form, caller, tenant, name)
            return await _accept(services, caller, tenant, name, form.files["file"], model_name=tuned)
        if not form.files:
            raise InvalidRequestError(
                "Send the adapter as 'file' (zip, tar or tar.gz), or as 'adapter_config' and 'adapter_model'.",
                param="file",
                code="missing_value",
            )
        peft = folder / "peft"
        await asyncio.to_thread(peft.mkdir)
        for field, path in form.files.items():
            await asyncio.to_thread(path.replace, peft / PLAIN_FILES[field])
        return await _accept(services, caller, tenant, name, peft)


async def _accept_upload(
    request: Request, services: Services, caller: Caller, tenant: str
) -> tuple[AdapterVersion, bool]:
    sent = await read_json(request, FromUpload)
    name = check_name(sent.name)
    archive = await services.uploads.file(tenant, sent.upload_id)
    return await _accept(services, caller, tenant, name, archive)


async def _accept(
    services: Services,
    caller: Caller,
    tenant: str,
    name: str,
    source: Path,
    *,
    model_name: TunedName | None = None,
) -> tuple[AdapterVersion, bool]:
    templates = caller.allows(Scope.CHAT_TEMPLATE)
    return await services.onboarding.accept(
        tenant, name, source, actor=caller.actor, templates=templates, model_name=model_name
    )


def _tuned_name(form: Form, caller: Caller, tenant: str, name: str) -> TunedName | None:
    """What else a fine-tuning job's result is called. For workers, which come with an operator's key."""
    text = form.fields.get("model_name")
    if text is None:
        return None
    if not caller.is_operator:
        raise PermissionDeniedError("Only an operator's key may give a version a `model_name`.", param="model_name")
    tuned = parse_tuned_name(text)
    if tuned is None or (tuned.tenant, tuned.adapter) != (tenant, name):
        raise InvalidRequestError(f"'{text}' is no name of a version of {tenant}/{name}.", param="model_name")
    return tuned


async def _warm(services: Services, version: AdapterVersion) -> None:
    """Best effort: the promotion itself is the registry's decision, and an engine that is away loads the version later."""
    if version.status is VersionStatus.READY:
        with suppress(GatewayError, BlobError, TimeoutError):
            async with asyncio.timeout(WARM_S):
                await services.fleet.warm(version)


def _field(form: Form, name: str) -> str:
    if name not in form.fields:
        raise InvalidRequestError(f"You must provide '{name}'.", param=name, code="missing_value")
    return form.fields[name]


def _record(snapshot: Snapshot, tenant: str, name: str) -> AdapterRecord:
    record = snapshot.adapters.get((tenant, name))
    if record is None:
        raise AdapterNotFoundError(name)
    return record


def _version(snapshot: Snapshot, tenant: str, name: str, number: int) -> AdapterVersion:
    _record(snapshot, tenant, name)
    version = snapshot.versions.get((tenant, name, number))
    if version is None:
        raise VersionNotFoundError(name, number)
    return version


def _versions(snapshot: Snapshot, tenant: str, name: str) -> list[AdapterVersion]:
    """The oldest first."""
    return sorted(
        (version for (owner, of, _), version in snapshot.versions.items() if (owner, of) == (tenant, name)),
        key=lambda version: version.version,
    )
