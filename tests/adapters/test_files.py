"""Uploaded files, on SQLite and on Postgres."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.blobs import BlobStore
from adapters.database import writing
from adapters.errors import BlobError, RoomError, StoredFileNotFoundError
from adapters.files import ABANDONED_S, Files, StoredFile, open_file_blobs
from adapters.models import FileRow
from adapters.peft_format import file_digest
from adapters.records import Limits
from adapters.registry import Registry
from adapters.training_files import FileFacts, Form


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return open_file_blobs(tmp_path / "blobs")


@pytest.fixture
def files(registry: Registry, database: sa.Engine, blobs: BlobStore, clock: Any) -> Files:
    return Files(database, blobs, clock=clock)


def stored(files: Files, tmp_path: Path, content: bytes = b"rows", tenant: str = "acme", **more: Any) -> StoredFile:
    path = tmp_path / "sent"
    path.write_bytes(content)
    digest = file_digest(path)
    return files.create(tenant, path, filename="rows.jsonl", purpose="fine-tune", digest=digest, **more)


def test_a_file_comes_back_as_it_was_sent(files: Files, tmp_path: Path, registry: Registry) -> None:
    file = stored(files, tmp_path, facts=FileFacts(1, Form.CHAT))
    assert files.file(file.id, tenant="acme") == file
    assert (file.size_bytes, file.rows, file.form) == (4, 1, Form.CHAT)
    files.fetch(file, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"rows"
    assert [(entry.action, entry.subject) for entry in registry.audit(1)] == [("file.create", file.id)]


def test_files_are_listed_page_by_page_in_either_order_and_by_purpose(files: Files, tmp_path: Path, clock: Any) -> None:
    ids = []
    for _ in range(3):
        ids.append(stored(files, tmp_path).id)
        clock.now += 1
    stored(files, tmp_path, tenant="globex")
    assert [file.id for file in files.files("acme")] == ids[::-1]
    assert [file.id for file in files.files("acme", after=ids[2], limit=1)] == [ids[1]]
    assert [file.id for file in files.files("acme", oldest_first=True, after=ids[0])] == ids[1:]
    assert files.files("acme", purpose="evals") == []


def test_equal_bytes_live_until_the_last_file_of_them_goes(files: Files, tmp_path: Path, blobs: BlobStore) -> None:
    mine, theirs = stored(files, tmp_path), stored(files, tmp_path, tenant="globex")
    files.delete(mine.id, tenant="acme")
    assert blobs.exists(theirs.digest)
    with pytest.raises(StoredFileNotFoundError):
        files.file(mine.id, tenant="acme")
    files.delete(theirs.id, tenant="globex")
    assert not blobs.exists(theirs.digest)


def test_another_tenants_and_an_expired_file_do_not_exist(files: Files, tmp_path: Path, clock: Any) -> None:
    file = stored(files, tmp_path, expires_after_s=3600)
    for look in (files.file, files.delete):
        with pytest.raises(StoredFileNotFoundError):
            look(file.id, tenant="globex")
    clock.now += 3600
    assert files.files("acme") == []
    with pytest.raises(StoredFileNotFoundError):
        files.file(file.id, tenant="acme")


def test_what_has_expired_or_was_never_stored_whole_is_swept(
    files: Files, tmp_path: Path, clock: Any, database: sa.Engine, blobs: BlobStore
) -> None:
    expired, kept = stored(files, tmp_path, b"old", expires_after_s=3600), stored(files, tmp_path)
    with writing(database) as session:
        session.execute(sa.update(FileRow).where(FileRow.id == kept.id).values(stored=False))
    clock.now += ABANDONED_S
    assert files.sweep() == 1
    clock.now += 1
    assert files.sweep() == 1
    assert not blobs.exists(expired.digest)
    assert not blobs.exists(kept.digest)


def test_files_count_towards_what_a_tenant_may_store(
    database: sa.Engine, registry: Registry, blobs: BlobStore, tmp_path: Path
) -> None:
    files = Files(database, blobs, default_limits=Limits(max_stored_bytes=6))
    first = stored(files, tmp_path)
    with pytest.raises(RoomError, match="holds 4"):
        stored(files, tmp_path, b"123")
    files.delete(first.id, tenant="acme")
    stored(files, tmp_path, b"123456")


def test_a_file_that_could_not_be_stored_leaves_no_row(files: Files, tmp_path: Path, database: sa.Engine) -> None:
    (tmp_path / "blobs" / "files").rmdir()
    (tmp_path / "blobs" / "files").write_text("in the way")
    with pytest.raises(BlobError):
        stored(files, tmp_path)
    with database.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(FileRow)).scalar() == 0
