"""Bytes by content: whole or absent, whatever happens half-way."""

import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.blobs import BlobStore, materialise, sweep_partials
from adapters.errors import BlobError


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore.open(tmp_path / "blobs")


def put(store: BlobStore, tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "upload"
    path.write_bytes(content)
    return store.put(path)


def stored_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=1 << 16))
def test_what_is_fetched_is_what_was_put(store: BlobStore, tmp_path: Path, content: bytes) -> None:
    digest = put(store, tmp_path, content)
    assert digest == hashlib.sha256(content).hexdigest()
    store.fetch(digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_a_file_larger_than_a_chunk_comes_back_whole(store: BlobStore, tmp_path: Path) -> None:
    content = os.urandom(9 << 20)
    store.fetch(put(store, tmp_path, content), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_the_same_bytes_are_stored_once(store: BlobStore, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        path = tmp_path / "upload"
        path.write_bytes(b"weights")
        digests = set(pool.map(store.put, [path] * 8))
    assert len(digests) == len(stored_files(tmp_path)) == 1


def test_deleted_bytes_are_gone_and_deleting_again_is_fine(store: BlobStore, tmp_path: Path) -> None:
    digest = put(store, tmp_path, b"weights")
    assert store.exists(digest)
    store.delete(digest)
    store.delete(digest)
    assert not store.exists(digest)
    with pytest.raises(BlobError, match="has no bytes for"):
        store.fetch(digest, tmp_path / "back")


def test_damaged_bytes_are_refused_and_leave_no_file(store: BlobStore, tmp_path: Path) -> None:
    digest = put(store, tmp_path, b"weights")
    (blob,) = stored_files(tmp_path)
    blob.write_bytes(b"weighty")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BlobError, match="damaged"):
        store.fetch(digest, out / "adapter_model.safetensors")
    assert list(out.iterdir()) == []


def test_a_folder_url_is_a_folder(tmp_path: Path) -> None:
    digest = put(BlobStore.open(f"file://{tmp_path / 'blobs'}"), tmp_path, b"weights")
    assert BlobStore.open(tmp_path / "blobs").exists(digest)


def test_a_bucket_in_memory_goes_through_the_same_calls(tmp_path: Path) -> None:
    store = BlobStore.open("memory:///")
    digest = put(store, tmp_path, b"weights")
    folder = materialise(store, {"adapter_model.safetensors": digest}, tmp_path / "version")
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    store.delete(digest)
    store.delete(digest)
    assert not store.exists(digest)


@pytest.mark.parametrize("location", ["ftp://host/path", "/proc/no/such/place"])
def test_a_place_that_cannot_hold_blobs_says_so(location: str) -> None:
    with pytest.raises(BlobError, match="cannot be opened"):
        BlobStore.open(location)


def test_a_folder_appears_whole_with_plain_permissions(store: BlobStore, tmp_path: Path) -> None:
    files = {name: put(store, tmp_path, name.encode()) for name in ("adapter_config.json", "adapter_model.safetensors")}
    folder = materialise(store, files, tmp_path / "versions" / "acme" / "support@1-9f2c41d0")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in files}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_is_made_once_even_by_many_at_once(store: BlobStore, tmp_path: Path) -> None:
    files = {"adapter_config.json": put(store, tmp_path, b"{}")}
    folder = tmp_path / "versions" / "support@1"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: materialise(store, files, folder), range(16))) == {folder}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_exists_is_kept_and_only_what_it_lacks_is_added(store: BlobStore, tmp_path: Path) -> None:
    files = {name: put(store, tmp_path, name.encode()) for name in ("one", "two")}
    folder = materialise(store, files, tmp_path / "version")
    inode = (folder / "one").stat().st_ino
    (folder / "two").unlink()
    materialise(store, files, folder)
    assert (folder / "one").stat().st_ino == inode
    assert (folder / "two").read_text() == "two"


def test_a_missing_blob_leaves_no_folder(store: BlobStore, tmp_path: Path) -> None:
    files = {"one": put(store, tmp_path, b"one"), "two": "0" * 64}
    with pytest.raises(BlobError, match="has no bytes for"):
        materialise(store, files, tmp_path / "versions" / "support@1")
    assert list((tmp_path / "versions").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_a_file_name_that_leads_elsewhere_is_refused(store: BlobStore, tmp_path: Path, name: str) -> None:
    files: Mapping[str, str] = {name: put(store, tmp_path, b"x")}
    with pytest.raises(BlobError, match="not a plain file name"):
        materialise(store, files, tmp_path / "version")


def test_an_upload_that_does_not_fit_leaves_nothing_under_its_name(store: BlobStore, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(os.urandom(4 << 20))
    code = f"""
import resource, signal
from pathlib import Path
from adapters.blobs import BlobStore
from adapters.errors import BlobError
store = BlobStore.open({str(tmp_path / "blobs")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # like a disk with one megabyte left
try:
    store.put(Path({str(upload)!r}))
except BlobError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not be stored" in done.stdout
    assert stored_files(tmp_path) == []


def test_a_process_killed_half_way_leaves_only_partials_that_can_be_swept(store: BlobStore, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(os.urandom(1 << 20))
    code = f"""
import os, signal
from pathlib import Path
from adapters.blobs import BlobStore, PARTIAL
store = BlobStore.open({str(tmp_path / "blobs")!r})
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # written, not yet under its name
store.put(Path({str(upload)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    (partial,) = stored_files(tmp_path)
    assert partial.name.startswith(".partial-")
    changed = partial.stat().st_mtime
    assert sweep_partials(tmp_path / "blobs", older_than_s=60, now=changed + 59) == 0
    assert sweep_partials(tmp_path / "blobs", older_than_s=60, now=changed + 61) == 1
    assert stored_files(tmp_path) == []
    assert store.exists(store.put(upload))
