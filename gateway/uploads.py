"""Resumable uploads: a large file sent in parts that survive a broken connection and a gateway restart, until they expire.

Everything is on disk: `uploads/<id>/upload.json`, a file per part, and the whole file once it is complete.
"""

import asyncio
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from adapters.home import Home
from gateway.errors import BodyTooLargeError, InvalidRequestError, UploadNotFoundError
from gateway.settings import UploadSettings

MAX_PART_BYTES = 64 * 1024 * 1024  # OpenAI's
MAX_OPEN = 8  # unfinished uploads of one tenant: each may hold max_bytes on disk
SPARE_FACTOR = 2  # parts on disk against the announced size: room for parts sent twice
SWEEP_S = 60.0
_ID = re.compile(r"upload_[0-9a-f]{24}")
_PART_ID = re.compile(r"part_[0-9a-f]{24}")
COPY_BYTES = 1024 * 1024


class Upload(BaseModel):
    """One upload as it is kept in upload.json."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    filename: str
    bytes: int
    purpose: str
    mime_type: str
    created_at: int  # Unix seconds
    expires_at: int
    status: Literal["pending", "completed", "cancelled"] = "pending"
    expires_after_s: int | None = None  # of the file that a completed upload becomes
    file_id: str | None = None  # that file, once it is kept


class Uploads:
    """All resumable uploads on this machine."""

    def __init__(self, home: Home, settings: UploadSettings, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = home.root / "uploads"
        self._settings = settings
        self._clock = clock

    async def create(
        self,
        tenant: str,
        *,
        filename: str,
        bytes: int,  # noqa: A002
        mime_type: str,
        purpose: str,
        expires_after_s: int | None = None,
    ) -> Upload:
        """Raises BodyTooLargeError for more than is accepted, InvalidRequestError for too many open ones."""
        if bytes > self._settings.max_bytes:
            raise BodyTooLargeError(self._settings.max_bytes)
        now = self._clock()
        upload = Upload(
            id=f"upload_{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            bytes=bytes,
            mime_type=mime_type,
            purpose=purpose,
            created_at=int(now),
            expires_at=int(now + self._settings.part_ttl_s),
            expires_after_s=expires_after_s,
        )
        await asyncio.to_thread(self._create, upload)
        return upload

    @asynccontextmanager
    async def receiving(self, tenant: str, upload_id: str) -> AsyncIterator[Path]:
        """A folder of the upload for one part to arrive in; gone afterwards. Raises UploadNotFoundError."""
        await asyncio.to_thread(self._pending, tenant, upload_id)
        folder = self._folder / upload_id / f"incoming-{secrets.token_hex(8)}"
        await asyncio.to_thread(folder.mkdir)
        try:
            yield folder
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    async def add_part(self, tenant: str, upload_id: str, data: Path) -> str:
        """Keep the file as a part; its id. Raises UploadNotFoundError, BodyTooLargeError."""
        return await asyncio.to_thread(self._add_part, tenant, upload_id, data)

    async def complete(self, tenant: str, upload_id: str, part_ids: Sequence[str], *, md5: str | None = None) -> Upload:
        """Put the parts together in this order. Doing it again with a completed upload changes nothing.

        Raises UploadNotFoundError, InvalidRequestError when a part is missing or the sum is not what was announced.
        """
        return await asyncio.to_thread(self._complete, tenant, upload_id, part_ids, md5)

    async def cancel(self, tenant: str, upload_id: str) -> Upload:
        """Raises UploadNotFoundError."""
        return await asyncio.to_thread(self._cancel, tenant, upload_id)

    async def file(self, tenant: str, upload_id: str) -> Path:
        """The whole file of a completed upload. Raises UploadNotFoundError."""
        upload = await asyncio.to_thread(self._read, tenant, upload_id)
        if upload.status != "completed":
            raise InvalidRequestError(f"The upload '{upload_id}' is not complete yet.", param="upload_id")
        return self._folder / upload_id / "file"

    async def upload(self, tenant: str, upload_id: str) -> Upload:
        """Raises UploadNotFoundError."""
        return await asyncio.to_thread(self._read, tenant, upload_id)

    async def kept(self, upload: Upload, file_id: str) -> Upload:
        """Remember which file the upload became, and drop its bytes."""
        return await asyncio.to_thread(self._kept, upload, file_id)

    async def run(self) -> None:
        """Drop what has expired, for ever."""
        while True:
            await asyncio.to_thread(self.sweep)
            await asyncio.sleep(SWEEP_S)

    def sweep(self) -> None:
        """Drop what has expired."""
        for folder in self._folder.glob("upload_*"):
            upload = _load(folder)
            with suppress(FileNotFoundError):  # cancelled, or swept by another, since it was listed
                expires_at = upload.expires_at if upload else folder.stat().st_mtime + self._settings.part_ttl_s
                if expires_at <= self._clock():
                    shutil.rmtree(folder, ignore_errors=True)

    def _create(self, upload: Upload) -> None:
        self.sweep()
        folders = self._folder.glob("upload_*")
        if sum(other is not None and other.tenant == upload.tenant for other in map(_load, folders)) >= MAX_OPEN:
            raise InvalidRequestError(
                f"{MAX_OPEN} uploads are kept already. Cancel one, or wait until the oldest expires.",
                code="too_many_uploads",
            )
        (self._folder / upload.id).mkdir(parents=True)
        self._save(upload)

    def _add_part(self, tenant: str, upload_id: str, data: Path) -> str:
        upload = self._pending(tenant, upload_id)
        folder = self._folder / upload_id
        kept = sum(part.stat().st_size for part in folder.glob("part_*"))
        if kept + data.stat().st_size > SPARE_FACTOR * upload.bytes:
            raise BodyTooLargeError(upload.bytes)
        part_id = f"part_{secrets.token_hex(12)}"
        data.replace(folder / part_id)
        return part_id

    def _complete(self, tenant: str, upload_id: str, part_ids: Sequence[str], md5: str | None) -> Upload:
        upload = self._read(tenant, upload_id)
        if upload.status == "completed":
            return upload
        folder = self._folder / upload_id
        parts = [folder / part_id for part_id in part_ids]
        for part in parts:
            if not _PART_ID.fullmatch(part.name) or not part.is_file():
                raise InvalidRequestError(f"The upload has no part '{part.name}'.", param="part_ids")
        size_bytes = sum(part.stat().st_size for part in parts)
        if size_bytes != upload.bytes:
            raise InvalidRequestError(
                f"The parts hold {size_bytes:,} bytes; {upload.bytes:,} were announced.", param="part_ids"
            )
        whole = folder / f"incoming-{secrets.token_hex(8)}"
        found = _join(parts, whole)
        if md5 is not None and found != md5.lower():
            whole.unlink()
            raise InvalidRequestError(f"The file's md5 is {found}, not {md5}.", param="md5")
        whole.replace(folder / "file")
        upload = upload.model_copy(update={"status": "completed"})
        self._save(upload)
        for part in folder.glob("part_*"):
            part.unlink(missing_ok=True)
        return upload

    def _kept(self, upload: Upload, file_id: str) -> Upload:
        upload = upload.model_copy(update={"file_id": file_id})
        self._save(upload)
        (self._folder / upload.id / "file").unlink(missing_ok=True)
        return upload

    def _cancel(self, tenant: str, upload_id: str) -> Upload:
        upload = self._read(tenant, upload_id)
        shutil.rmtree(self._folder / upload_id, ignore_errors=True)
        return upload.model_copy(update={"status": "cancelled"})

    def _pending(self, tenant: str, upload_id: str) -> Upload:
        upload = self._read(tenant, upload_id)
        if upload.status != "pending":
            raise InvalidRequestError(f"The upload '{upload_id}' is {upload.status}.", param="upload_id")
        return upload

    def _read(self, tenant: str, upload_id: str) -> Upload:
        """Another tenant's, an expired and an unknown one are all the same."""
        upload = _load(self._folder / upload_id) if _ID.fullmatch(upload_id) else None
        if upload is None or upload.tenant != tenant or upload.expires_at <= self._clock():
            raise UploadNotFoundError(upload_id)
        return upload

    def _save(self, upload: Upload) -> None:
        folder = self._folder / upload.id
        partial = folder / f"upload-{secrets.token_hex(8)}.partial"
        partial.write_text(upload.model_dump_json(), encoding="utf-8")
        partial.replace(folder / "upload.json")


def _load(folder: Path) -> Upload | None:
    try:
        return Upload.model_validate_json((folder / "upload.json").read_bytes())
    except (OSError, ValidationError):
        return None


def _join(parts: Sequence[Path], whole: Path) -> str:
    """Write the parts one after the other; the hex md5 of the sum, which OpenAI's client may send."""
    digest = hashlib.md5(usedforsecurity=False)
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                while piece := source.read(COPY_BYTES):
                    digest.update(piece)
                    target.write(piece)
    return digest.hexdigest()
