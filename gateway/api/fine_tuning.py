"""/v1/fine_tuning/jobs: fine-tuning in OpenAI's shapes. A job waits here for a `lorikeet worker`.

What over there is one model name is two things here: `ft:<base>:<tenant>:<suffix>:<id>` means one version of the adapter
`<suffix>` for good; the plain name `<suffix>` means its production version, which moves only through the gate.
"""

import asyncio
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler
from starlette.requests import Request

from adapters.errors import InvalidNameError, StoredFileNotFoundError
from adapters.files import StoredFile
from adapters.jobs import Checkpoint, Job, JobEvent, JobStatus
from adapters.names import check_name
from adapters.registry import Scope
from adapters.training_files import Form
from gateway.api.json_body import read_json
from gateway.api.pages import page
from gateway.errors import InvalidRequestError, PermissionDeniedError
from gateway.files import FINE_TUNE
from gateway.services import CallerDep, Services, ServicesDep

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
METADATA = re.compile(r"metadata\[(.{1,64})\]")
MAX_SEED = 2**31 - 1
FORMS = {"supervised": (Form.CHAT, Form.COMPLETION), "dpo": (Form.PREFERENCE,)}


def _auto(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    return value if value == "auto" else handler(value)


Auto = WrapValidator(_auto)
Epochs = Annotated[Annotated[int, Field(ge=1, le=50)], Auto]
BatchSize = Annotated[Annotated[int, Field(ge=1, le=256)], Auto]
Multiplier = Annotated[Annotated[float, Field(gt=0, le=100)], Auto]
Beta = Annotated[Annotated[float, Field(gt=0, le=2)], Auto]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Hyperparameters(_Body):
    """`auto` leaves a value to the recipe and the size of the file."""

    n_epochs: Epochs = "auto"  # type: ignore[assignment]
    batch_size: BatchSize = "auto"  # type: ignore[assignment]
    learning_rate_multiplier: Multiplier = "auto"  # type: ignore[assignment]


class DpoHyperparameters(Hyperparameters):
    beta: Beta = "auto"  # type: ignore[assignment]


class Supervised(_Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(_Body):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(_Body):
    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None


class NewJob(_Body):
    model: str = Field(min_length=1)
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # OpenAI's older place for those of a supervised job
    suffix: str | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(None, max_length=16)
    integrations: list[Any] | None = None


@router.post("")
async def create_job(request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Fine-tune the base model, or an adapter of one's own further, on an uploaded file."""
    tenant = caller.require(Scope.JOBS)
    sent = await read_json(request, NewJob)
    method, hyperparameters = _method(sent)
    if sent.integrations:
        raise InvalidRequestError(
            "Integrations are not served here. Follow the job by its events, or look into the worker's run folder.",
            param="integrations",
            code="unsupported_value",
        )
    target = services.resolve(sent.model, tenant.name)
    version = target.version
    if version is not None and version.tenant != tenant.name:
        raise PermissionDeniedError("Only an adapter of one's own can be trained further.", param="model")
    files = {}
    for param, file_id in (("training_file", sent.training_file), ("validation_file", sent.validation_file)):
        if file_id is not None:
            files[param] = await _training_file(services, tenant.name, file_id, param, method)
    spec = {
        "model": sent.model,
        "base": services.base.slug,
        "further": {"adapter": version.adapter, "version": version.version} if version is not None else None,
        **{param: file.id for param, file in files.items()},
        "method": method,
        "hyperparameters": hyperparameters,
        "suffix": _suffix(sent.suffix),
        "seed": sent.seed if sent.seed is not None else secrets.randbelow(MAX_SEED),
        "metadata": sent.metadata,
        "promote": caller.allows(Scope.ADAPTERS_WRITE),  # whether its result may be offered to the gate
    }
    digest = services.base.fingerprint.weights_digest
    job = await asyncio.to_thread(services.jobs.create, tenant.name, spec, base=digest, actor=caller.actor)
    return job_object(job)


@router.get("")
async def list_jobs(
    request: Request,
    caller: CallerDep,
    services: ServicesDep,
    after: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> dict[str, Any]:
    """The newest first. `metadata[key]=value` asks for jobs with that pair, `metadata=null` for those without any."""
    tenant = caller.require(Scope.JOBS)
    asked = request.query_params
    metadata = {match[1]: value for name, value in asked.items() if (match := METADATA.fullmatch(name))}
    if asked.get("metadata") not in (None, "null"):
        raise InvalidRequestError("Filter by metadata[key]=value, or by metadata=null.", param="metadata")
    found = await asyncio.to_thread(
        services.jobs.jobs,
        tenant.name,
        limit=limit + 1,
        after=after,
        metadata=metadata,
        without_metadata=asked.get("metadata") == "null",
    )
    return page([job_object(job) for job in found], limit)


@router.get("/{job_id}")
async def get_job(job_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.JOBS)
    return job_object(await asyncio.to_thread(services.jobs.job, job_id, tenant=tenant.name))


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """A running job ends as soon as its worker notices."""
    tenant = caller.require(Scope.JOBS)
    job = await asyncio.to_thread(services.jobs.cancel, job_id, tenant=tenant.name, actor=caller.actor)
    return job_object(job)


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """A running job is put aside at its next checkpoint."""
    tenant = caller.require(Scope.JOBS)
    job = await asyncio.to_thread(services.jobs.pause, job_id, tenant=tenant.name, actor=caller.actor)
    return job_object(job)


@router.post("/{job_id}/resume")
async def resume_job(job_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """From the checkpoint at which it was paused."""
    tenant = caller.require(Scope.JOBS)
    job = await asyncio.to_thread(services.jobs.resume, job_id, tenant=tenant.name, actor=caller.actor)
    return job_object(job)


@router.get("/{job_id}/events")
async def list_events(
    job_id: str,
    caller: CallerDep,
    services: ServicesDep,
    after: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> dict[str, Any]:
    """The newest first."""
    tenant = caller.require(Scope.JOBS)
    found = await asyncio.to_thread(services.jobs.events, job_id, tenant=tenant.name, after=after, limit=limit + 1)
    return page([event_object(event) for event in found], limit)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str,
    caller: CallerDep,
    services: ServicesDep,
    after: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
) -> dict[str, Any]:
    """The newest first. Each can be called by its `fine_tuned_model_checkpoint`, while the job still runs too."""
    tenant = caller.require(Scope.JOBS)
    found = await asyncio.to_thread(services.jobs.checkpoints, job_id, tenant=tenant.name, after=after, limit=limit + 1)
    return page([checkpoint_object(checkpoint) for checkpoint in found], limit)


def job_object(job: Job) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`. It knows no paused job: one is `queued` with `paused` true."""
    spec, result = job.spec, job.result or {}
    hyperparameters = dict(job.progress.get("hyperparameters") or spec.get("hyperparameters") or {})
    method = str(spec.get("method", "supervised"))
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "error": _failure(job),
        "fine_tuned_model": result.get("model"),
        "finished_at": int(job.finished_at) if job.finished_at is not None else None,
        "hyperparameters": {name: value for name, value in hyperparameters.items() if name != "beta"},
        "model": spec.get("model"),
        "organization_id": job.tenant,
        "result_files": result.get("files", []),
        "seed": spec.get("seed"),
        "status": _status(job),
        "paused": job.status is JobStatus.PAUSED,
        "trained_tokens": result.get("trained_tokens"),
        "training_file": spec.get("training_file"),
        "validation_file": spec.get("validation_file"),
        "estimated_finish": job.progress.get("estimated_finish") if job.status is JobStatus.RUNNING else None,
        "integrations": [],
        "metadata": spec.get("metadata"),
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
    }


def _failure(job: Job) -> dict[str, Any] | None:
    if job.failure is None:
        return None
    return {
        "code": job.failure.code,
        "message": job.failure.message,
        "param": job.failure.param,
        "line": job.failure.line,
    }


def _status(job: Job) -> str:
    if job.status is JobStatus.RUNNING and job.progress.get("phase") == "validating":
        return "validating_files"
    return JobStatus.QUEUED.value if job.status is JobStatus.PAUSED else job.status.value


def event_object(event: JobEvent) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.event`."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data if event.data is not None else {},
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.checkpoint`."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": checkpoint.job,
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
    }


def _method(sent: NewJob) -> tuple[str, Mapping[str, Any]]:
    """The method and its hyperparameters, wherever they stand. Raises InvalidRequestError."""
    method = sent.method or Method(type="supervised")
    for other in ("supervised", "dpo"):
        if other != method.type and getattr(method, other) is not None:
            raise InvalidRequestError(f"The method is {method.type}; leave '{other}' out.", param=f"method.{other}")
    own = method.dpo if method.type == "dpo" else method.supervised
    if sent.hyperparameters is not None and (own is not None or method.type == "dpo"):
        raise InvalidRequestError("Give hyperparameters in `method` alone.", param="hyperparameters")
    found = own.hyperparameters if own is not None else sent.hyperparameters
    found = found or (DpoHyperparameters() if method.type == "dpo" else Hyperparameters())
    return method.type, found.model_dump(warnings=False)


def _suffix(suffix: str | None) -> str:
    """Raises InvalidRequestError for what cannot be an adapter's name."""
    if not suffix:
        return ""
    try:
        return check_name(suffix.lower(), what="suffix")
    except InvalidNameError as exc:
        raise InvalidRequestError(str(exc), param="suffix", code="invalid_name") from exc


async def _training_file(services: Services, tenant: str, file_id: str, param: str, method: str) -> StoredFile:
    """Raises InvalidRequestError when there is no such file, or it is of no use for the method."""
    try:
        file = await services.intake.file(tenant, file_id)
    except StoredFileNotFoundError as exc:
        raise InvalidRequestError(str(exc), param=param, code="file_not_found") from exc
    if file.purpose != FINE_TUNE or file.form is None:
        message = f"'{file_id}' was uploaded with the purpose '{file.purpose}'; upload it with '{FINE_TUNE}'."
        raise InvalidRequestError(message, param=param, code=f"invalid_{param}")
    if file.form not in FORMS[method]:
        wanted = " or ".join(FORMS[method])
        message = f"'{file_id}' holds {file.form} rows; the method '{method}' needs {wanted} rows."
        raise InvalidRequestError(message, param=param, code=f"invalid_{param}")
    return file
