"""/v1/uploads: resumable uploads in OpenAI's shapes. What is completed here is handed to `POST /v1/adapters` by its id."""

import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from adapters.registry import Scope
from gateway.api.json_body import read_json
from gateway.errors import InvalidRequestError
from gateway.multipart import receive_form
from gateway.services import CallerDep, ServicesDep
from gateway.uploads import MAX_PART_BYTES, Upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


class NewUpload(BaseModel):
    model_config = ConfigDict(extra="ignore")

    filename: str = Field(min_length=1, max_length=255)
    bytes: int = Field(gt=0)
    mime_type: str = Field("application/octet-stream", max_length=255)
    purpose: str = Field("adapter", max_length=64)


class Completion(BaseModel):
    model_config = ConfigDict(extra="ignore")

    part_ids: Annotated[list[str], Field(min_length=1, max_length=1000)]
    md5: str | None = None


@router.post("")
async def create_upload(request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Begin an upload of a known size: `filename`, `bytes`, `mime_type`, `purpose`."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    new = await read_json(request, NewUpload)
    return upload_object(
        await services.uploads.create(
            tenant.name, filename=new.filename, bytes=new.bytes, mime_type=new.mime_type, purpose=new.purpose
        )
    )


@router.post("/{upload_id}/parts")
async def add_part(upload_id: str, request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Add up to 64 MiB, as the multipart field `data`; parts may be sent at the same time and in any order."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    async with services.uploads.receiving(tenant.name, upload_id) as folder:
        form = await receive_form(request, folder, files=["data"], max_bytes=MAX_PART_BYTES)
        if "data" not in form.files:
            raise InvalidRequestError(
                "Send the part as the multipart field 'data'.", param="data", code="missing_value"
            )
        part_id = await services.uploads.add_part(tenant.name, upload_id, form.files["data"])
    return {"id": part_id, "object": "upload.part", "created_at": int(time.time()), "upload_id": upload_id}


@router.post("/{upload_id}/complete")
async def complete_upload(upload_id: str, request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Put the parts together in the order of the body's `part_ids`."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    completion = await read_json(request, Completion)
    return upload_object(
        await services.uploads.complete(tenant.name, upload_id, completion.part_ids, md5=completion.md5)
    )


@router.post("/{upload_id}/cancel")
async def cancel_upload(upload_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Drop an upload and its parts."""
    tenant = caller.require(Scope.ADAPTERS_WRITE)
    return upload_object(await services.uploads.cancel(tenant.name, upload_id))


def upload_object(upload: Upload) -> dict[str, Any]:
    """OpenAI's `upload`."""
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
