"""Uploaded files: rows in the registry's database, bytes in a blob store of their own.

Like the registry synchronous and safe to use from several threads, processes and machines.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters import audit
from adapters.blobs import BlobStore
from adapters.database import reading, take_turns, writing
from adapters.errors import StoredFileNotFoundError
from adapters.models import FileRow
from adapters.records import NO_LIMITS, Limits
from adapters.rows import require_byte_room, require_tenant, tenant_limits
from adapters.training_files import FileFacts, Form

ABANDONED_S = 3600.0  # a row without its bytes is by then what a killed process left


@dataclass(frozen=True)
class StoredFile:
    """One upload, which never changes. Times are Unix seconds."""

    id: str
    tenant: str
    filename: str  # as its owner calls it: never a path of ours
    purpose: str
    size_bytes: int
    digest: str  # hex sha256
    created_at: float
    expires_at: float | None
    rows: int | None  # of a file to train on
    form: Form | None


def open_file_blobs(location: str | Path) -> BlobStore:
    """The store of files' bytes, below the adapters': neither deletes what only the other names. Raises BlobError."""
    return BlobStore.open(f"{str(location).rstrip('/')}/files")


class Files:
    """Every tenant's files."""

    def __init__(
        self,
        engine: sa.Engine,
        blobs: BlobStore,
        *,
        default_limits: Limits = NO_LIMITS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """blobs: see `open_file_blobs`. default_limits: of tenants."""
        self._engine = engine
        self._blobs = blobs
        self._default_limits = default_limits
        self._clock = clock

    def create(
        self,
        tenant: str,
        path: Path,
        *,
        filename: str,
        purpose: str,
        digest: str,
        facts: FileFacts | None = None,
        expires_after_s: float | None = None,
        actor: str = "operator",
    ) -> StoredFile:
        """Keep a file's bytes. digest: their hex sha256; facts: of a file to train on.

        Raises TenantNotFoundError, RoomError when the tenant may not store so much, BlobError.
        """
        now = self._clock()
        row_id = f"file-{secrets.token_hex(12)}"
        with writing(self._engine) as session:
            require_tenant(session, tenant)
            take_turns(session)
            size_bytes = path.stat().st_size
            most = tenant_limits(session, tenant, self._default_limits).max_stored_bytes
            require_byte_room(session, tenant, size_bytes, most)
            session.add(
                FileRow(
                    id=row_id,
                    tenant=tenant,
                    filename=filename,
                    purpose=purpose,
                    size_bytes=size_bytes,
                    digest=digest,
                    created_at=now,
                    expires_at=now + expires_after_s if expires_after_s is not None else None,
                    rows=facts.rows if facts else None,
                    form=facts.form.value if facts else None,
                    stored=False,
                )
            )
        try:
            self._blobs.put(path)  # the row is there before: who deletes an equal file leaves the bytes
        except BaseException:
            with writing(self._engine) as session:
                session.execute(sa.delete(FileRow).where(FileRow.id == row_id))
            raise
        with writing(self._engine) as session:
            row = session.get(FileRow, row_id)
            if row is None:  # swept: storing it took longer than ABANDONED_S
                raise StoredFileNotFoundError(row_id)
            row.stored = True
            audit.append(session, self._clock(), actor, "file.create", tenant=tenant, subject=row_id, bytes=size_bytes)
            return _file(row)

    def file(self, file_id: str, *, tenant: str) -> StoredFile:
        """Raises StoredFileNotFoundError: another tenant's, an expired and an unknown one are all the same."""
        with reading(self._engine) as session:
            return _file(self._require(session, file_id, tenant))

    def files(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 100,
        oldest_first: bool = False,
    ) -> list[StoredFile]:
        """The newest first. after: only those that follow this one. Raises StoredFileNotFoundError."""
        with reading(self._engine) as session:
            query = sa.select(FileRow).where(FileRow.tenant == tenant, FileRow.stored, self._alive())
            if purpose is not None:
                query = query.where(FileRow.purpose == purpose)
            place = sa.tuple_(FileRow.created_at, FileRow.id)
            if after is not None:
                last = self._require(session, after, tenant)
                bound = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
                query = query.where(place > bound if oldest_first else place < bound)
            order = (FileRow.created_at, FileRow.id)
            query = query.order_by(*(order if oldest_first else (column.desc() for column in order)))
            return [_file(row) for row in session.scalars(query.limit(limit))]

    def fetch(self, file: StoredFile, dest: Path) -> None:
        """Write its bytes to `dest`, whole or not at all. Raises BlobError."""
        self._blobs.fetch(file.digest, dest)

    def delete(self, file_id: str, *, tenant: str, actor: str = "operator") -> None:
        """The row and, unless an equal file needs them, the bytes. Raises StoredFileNotFoundError."""
        with writing(self._engine) as session:
            take_turns(session)
            row = self._require(session, file_id, tenant)
            self._drop(session, row)
            audit.append(session, self._clock(), actor, "file.delete", tenant=tenant, subject=file_id)

    def sweep(self) -> int:
        """Delete what has expired, and what a killed process began to store; how many."""
        now = self._clock()
        with writing(self._engine) as session:
            take_turns(session)
            abandoned = sa.and_(~FileRow.stored, FileRow.created_at < now - ABANDONED_S)
            rows = session.scalars(sa.select(FileRow).where(sa.or_(~self._alive(), abandoned))).all()
            for row in rows:
                self._drop(session, row)
            return len(rows)

    def _drop(self, session: Session, row: FileRow) -> None:
        session.delete(row)
        session.flush()
        if session.scalar(sa.select(FileRow.id).where(FileRow.digest == row.digest).limit(1)) is None:
            self._blobs.delete(row.digest)

    def _require(self, session: Session, file_id: str, tenant: str) -> FileRow:
        query = sa.select(FileRow).where(FileRow.id == file_id, FileRow.tenant == tenant, FileRow.stored, self._alive())
        row = session.scalar(query)
        if row is None:
            raise StoredFileNotFoundError(file_id)
        return row

    def _alive(self) -> sa.ColumnElement[bool]:
        return sa.or_(FileRow.expires_at.is_(None), FileRow.expires_at > self._clock())


def _file(row: FileRow) -> StoredFile:
    return StoredFile(
        id=row.id,
        tenant=row.tenant,
        filename=row.filename,
        purpose=row.purpose,
        size_bytes=row.size_bytes,
        digest=row.digest,
        created_at=row.created_at,
        expires_at=row.expires_at,
        rows=row.rows,
        form=Form(row.form) if row.form else None,
    )
