"""/v1/uploads: resumable uploads in OpenAI's shapes.

Those with one of the purposes of `/v1/files` become a file there when they are completed; those with the purpose `adapter`,
ours, are handed to `POST /v1/adapters` by their id.
"""

import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from adapters.registry import Scope
from gateway.api.files import ExpiresAfter, file_object
from gateway.api.json_body import read_json
from gateway.errors import BodyTooLargeError, InvalidRequestError
from gateway.files import NewFile
from gateway.multipart import receive_form
from gateway.services import CallerDep, Services, ServicesDep
from gateway.tenants import Caller
from gateway.uploads import MAX_PART_BYTES, Upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


ADAPTER = "adapter"


class NewUpload(BaseModel):
    model_config = ConfigDict(extra="ignore")

    filename: str = Field(min_length=1, max_length=255)
    bytes: int = Field(gt=0)
    mime_type: str = Field("application/octet-stream", max_length=255)
    purpose: str = Field(ADAPTER, max_length=64)
    expires_after: ExpiresAfter | None = None


class Completion(BaseModel):
    model_config = ConfigDict(extra="ignore")

    part_ids: Annotated[list[str], Field(min_length=1, max_length=1000)]
    md5: str | None = None


@router.post("")
async def create_upload(request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Begin an upload of a known size: `filename`, `bytes`, `mime_type`, `purpose`, `expires_after` of the file."""
    _require_some(caller)
    new = await read_json(request, NewUpload)
    tenant = _require(caller, new.purpose)
    expires_after_s = new.expires_after.seconds if new.expires_after else None
    if new.purpose != ADAPTER:
        NewFile(new.filename, new.purpose, expires_after_s).checked()
        if new.bytes > services.settings.files.max_bytes:
            raise BodyTooLargeError(services.settings.files.max_bytes)
    upload = await services.uploads.create(
        tenant,
        filename=new.filename,
        bytes=new.bytes,
        mime_type=new.mime_type,
        purpose=new.purpose,
        expires_after_s=expires_after_s,
    )
    return upload_object(upload)


@router.post("/{upload_id}/parts")
async def add_part(upload_id: str, request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Add up to 64 MiB, as the multipart field `data`; parts may be sent at the same time and in any order."""
    tenant = await _owner(upload_id, caller, services)
    async with services.uploads.receiving(tenant, upload_id) as folder:
        form = await receive_form(request, folder, files=["data"], max_bytes=MAX_PART_BYTES)
        if "data" not in form.files:
            raise InvalidRequestError(
                "Send the part as the multipart field 'data'.", param="data", code="missing_value"
            )
        part_id = await services.uploads.add_part(tenant, upload_id, form.files["data"])
    return {"id": part_id, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload_id}


@router.post("/{upload_id}/complete")
async def complete_upload(upload_id: str, request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Put the parts together in the order of the body's `part_ids`; `md5` is compared where it is given."""
    tenant = await _owner(upload_id, caller, services)
    completion = await read_json(request, Completion)
    upload = await services.uploads.complete(tenant, upload_id, completion.part_ids, md5=completion.md5)
    if upload.purpose == ADAPTER:
        return upload_object(upload)
    if upload.file_id is None:
        new = NewFile(upload.filename, upload.purpose, upload.expires_after_s)
        path = await services.uploads.file(tenant, upload_id)
        file = await services.intake.keep(tenant, path, new, actor=caller.actor)
        upload = await services.uploads.kept(upload, file.id)
    else:
        file = await services.intake.file(tenant, upload.file_id)
    return upload_object(upload) | {"file": file_object(file)}


@router.post("/{upload_id}/cancel")
async def cancel_upload(upload_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Drop an upload and its parts."""
    tenant = await _owner(upload_id, caller, services)
    return upload_object(await services.uploads.cancel(tenant, upload_id))


def _require_some(caller: Caller) -> str:
    """The tenant of a key that may upload something. Raises PermissionDeniedError."""
    return caller.require(Scope.JOBS if caller.allows(Scope.JOBS) else Scope.ADAPTERS_WRITE).name


def _require(caller: Caller, purpose: str) -> str:
    return caller.require(Scope.ADAPTERS_WRITE if purpose == ADAPTER else Scope.JOBS).name


async def _owner(upload_id: str, caller: Caller, services: Services) -> str:
    """The tenant, when the key may do something with this upload. Raises PermissionDeniedError, UploadNotFoundError."""
    upload = await services.uploads.upload(_require_some(caller), upload_id)
    return _require(caller, upload.purpose)


def upload_object(upload: Upload) -> dict[str, Any]:
    """OpenAI's `upload`. The file of one that holds an adapter has the upload's own id."""
    file = {
        "id": upload.id,
        "object": "file",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": "processed",
    }
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file if upload.status == "completed" else None,
    }
