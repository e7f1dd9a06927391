"""/v1/files: what a tenant uploads to train on, in OpenAI's shapes. Files belong to their tenant: others' do not exist."""

import asyncio
import re
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import StreamingResponse

from adapters.files import StoredFile
from adapters.registry import Scope
from gateway.api.pages import page
from gateway.errors import InvalidRequestError
from gateway.files import NewFile
from gateway.multipart import Form, receive_form
from gateway.services import CallerDep, ServicesDep

router = APIRouter(prefix="/v1/files", tags=["files"])
COPY_BYTES = 1024 * 1024
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"] = "created_at"
    seconds: int


@router.post("")
async def create_file(request: Request, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Upload a file: multipart `file`, `purpose` and, if it is to go by itself, `expires_after[seconds]`.

    With the purpose `fine-tune` it is a `.jsonl` file, refused with the number of the first line that cannot be trained on.
    """
    tenant = caller.require(Scope.JOBS)
    async with services.onboarding.quarantine() as folder:
        form = await receive_form(request, folder, files=["file"], max_bytes=services.settings.files.max_bytes)
        new = _new_file(form).checked()
        file = await services.intake.keep(tenant.name, form.files["file"], new, actor=caller.actor)
    return file_object(file)


@router.get("")
async def list_files(
    caller: CallerDep,
    services: ServicesDep,
    after: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    purpose: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    tenant = caller.require(Scope.JOBS)
    found = await asyncio.to_thread(
        services.intake.files.files,
        tenant.name,
        purpose=purpose,
        after=after,
        limit=limit + 1,
        oldest_first=order == "asc",
    )
    return page([file_object(file) for file in found], limit)


@router.get("/{file_id}")
async def get_file(file_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    return file_object(await services.intake.file(caller.require(Scope.JOBS).name, file_id))


@router.get("/{file_id}/content")
async def get_content(file_id: str, caller: CallerDep, services: ServicesDep) -> StreamingResponse:
    """The bytes as they were sent."""
    file = await services.intake.file(caller.require(Scope.JOBS).name, file_id)
    async with services.onboarding.quarantine() as folder:
        await asyncio.to_thread(services.intake.files.fetch, file, folder / "file")
        stream = await asyncio.to_thread(
            (folder / "file").open, "rb"
        )  # readable to its end, although its name goes now
    headers = {
        "content-length": str(file.size_bytes),
        "content-disposition": f'attachment; filename="{plain_name(file.filename)}"',
    }
    return StreamingResponse(pieces(stream), media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
async def delete_file(file_id: str, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    tenant = caller.require(Scope.JOBS)
    await asyncio.to_thread(services.intake.files.delete, file_id, tenant=tenant.name, actor=caller.actor)
    return {"id": file_id, "object": "file", "deleted": True}


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's `file`, and how many rows are in one to train on."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "expires_at": int(file.expires_at) if file.expires_at is not None else None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "rows": file.rows,
    }


def pieces(stream: BinaryIO) -> Iterator[bytes]:
    with stream:
        while piece := stream.read(COPY_BYTES):
            yield piece


def plain_name(filename: str) -> str:
    """For the header of a download."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", filename)


def _new_file(form: Form) -> NewFile:
    unknown = form.fields.keys() - set(FIELDS)
    if unknown:
        field = min(unknown)
        raise InvalidRequestError(f"Unknown field '{field}'.", param=field, code="unknown_parameter")
    for name, where in (("file", form.files), ("purpose", form.fields)):
        if name not in where:
            raise InvalidRequestError(f"You must provide '{name}'.", param=name, code="missing_value")
    if form.fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise InvalidRequestError("The anchor can only be created_at.", param="expires_after.anchor")
    seconds = form.fields.get("expires_after[seconds]")
    if seconds is not None and not (seconds.isascii() and seconds.isdigit() and len(seconds) < 10):
        raise InvalidRequestError("Give whole seconds.", param="expires_after.seconds")
    return NewFile(form.filenames["file"], form.fields["purpose"], int(seconds) if seconds is not None else None)
