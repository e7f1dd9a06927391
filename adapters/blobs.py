"""Content-addressed bytes: a folder on this machine, or a bucket by URL (s3://, gs://, az://).

Nothing half-written ever stands under a final name: bytes go to a temporary name in the same folder, reach the disk,
and are renamed. What a killed process leaves is called `.partial-…`; `sweep_partials` removes it.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, ObjectStore, from_url

from adapters.errors import BlobError

PARTIAL = ".partial-"
CHUNK_BYTES = 4 << 20  # read and written at a time: large files never fill the memory


class BlobStore:
    """Files by the sha256 of their bytes."""

    def __init__(self, store: ObjectStore, folder: Path | None = None) -> None:
        """folder: where a local store keeps its objects, None for a bucket."""
        self._store = store
        self._folder = folder

    @classmethod
    def open(cls, location: str | Path) -> "BlobStore":
        """A folder's path, or a bucket's URL with credentials from the environment. Raises BlobError."""
        text = str(location)
        try:
            if "://" in text and not text.startswith("file://"):
                return cls(from_url(text))
            folder = Path(text.removeprefix("file://")).expanduser().absolute()
            folder.mkdir(parents=True, exist_ok=True)
            return cls(LocalStore(folder), folder)
        except (BaseError, OSError, ValueError) as exc:
            raise BlobError(f"The blob store '{text}' cannot be opened: {_reason(exc)}") from exc

    def put(self, path: Path) -> str:
        """Store a file's bytes; their hex sha256. Storing the same bytes again costs one look-up."""
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not self.exists(digest):
                self._upload(path, _key(digest))
        except (BaseError, OSError) as exc:
            raise BlobError(f"'{path.name}' could not be stored: {_reason(exc)}. Has the disk room?") from exc
        return digest

    def fetch(self, digest: str, dest: Path) -> None:
        """Write the bytes to `dest`, which appears whole or not at all. Raises BlobError when they are missing."""
        try:
            with _partial_file(dest) as partial:
                found = self._download(digest, partial)
                if found != digest:
                    raise BlobError(
                        f"The stored bytes of {digest[:12]}… are damaged: their sha256 is {found[:12]}…. "
                        "Upload the adapter again, or restore the blob store."
                    )
                partial.replace(dest)
            _sync_folder(dest.parent)
        except (NotFoundError, FileNotFoundError) as exc:
            raise BlobError(f"The blob store has no bytes for {digest[:12]}…. Upload the adapter again.") from exc
        except (BaseError, OSError) as exc:
            raise BlobError(f"{digest[:12]}… could not be fetched to {dest}: {_reason(exc)}") from exc

    def exists(self, digest: str) -> bool:
        """Raises BlobError when the store cannot be asked."""
        try:
            obstore.head(self._store, _key(digest))
        except (NotFoundError, FileNotFoundError):
            return False
        except (BaseError, OSError) as exc:
            raise BlobError(f"The blob store cannot be read: {_reason(exc)}") from exc
        return True

    def delete(self, digest: str) -> None:
        """Deleting what is not there is no error."""
        try:
            with suppress(NotFoundError, FileNotFoundError):
                obstore.delete(self._store, _key(digest))
        except (BaseError, OSError) as exc:
            raise BlobError(f"{digest[:12]}… could not be deleted: {_reason(exc)}") from exc

    def _upload(self, path: Path, key: str) -> None:
        if self._folder is None:
            obstore.put(self._store, key, path)  # a bucket shows an object only once it is whole
            return
        final = self._folder / key
        final.parent.mkdir(parents=True, exist_ok=True)
        with _partial_file(final) as partial:
            with path.open("rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(final)
        _sync_folder(final.parent)

    def _download(self, digest: str, partial: Path) -> str:
        """The sha256 of what was written."""
        seen = hashlib.sha256()
        with partial.open("wb") as target:
            for chunk in obstore.get(self._store, _key(digest)).stream(min_chunk_size=CHUNK_BYTES):
                seen.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        return seen.hexdigest()


def materialise(store: BlobStore, files: Mapping[str, str], folder: Path) -> Path:
    """The folder with these files (name -> sha256), which appears whole or not at all.

    A folder that is there already is kept as it is (an engine may hold it); only files it lacks are added.
    Raises BlobError.
    """
    for name in files:
        if not name or name in {".", ".."} or "/" in name or "\\" in name:
            raise BlobError(f"'{name}' is not a plain file name, so it is not written to disk.")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
        try:
            partial.chmod(0o755)
            for name, digest in files.items():
                store.fetch(digest, partial / name)
            partial.rename(folder)
            _sync_folder(folder.parent)
        except OSError as exc:
            if not folder.is_dir():  # otherwise somebody else was faster, with the same bytes
                raise BlobError(f"The folder {folder} could not be made: {_reason(exc)}") from exc
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for name, digest in files.items():
        if not (folder / name).is_file():
            store.fetch(digest, folder / name)
    return folder


def sweep_partials(folder: Path, *, older_than_s: float, now: float | None = None) -> int:
    """Remove what killed processes left below `folder`; how many. Younger ones may still be in work."""
    cutoff = (time.time() if now is None else now) - older_than_s
    stale = [path for path in folder.rglob(f"{PARTIAL}*") if path.lstat().st_mtime < cutoff]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(stale)


@contextmanager
def _partial_file(final: Path) -> Iterator[Path]:
    """A temporary file beside `final`, gone when the block ends without having renamed it."""
    descriptor, name = tempfile.mkstemp(prefix=PARTIAL, dir=final.parent)
    os.fchmod(descriptor, 0o644)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(digest: str) -> str:
    return f"sha256/{digest[:2]}/{digest[2:]}"


def _reason(exc: Exception) -> str:
    return str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
