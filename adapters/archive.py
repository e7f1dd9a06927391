"""Unpack an uploaded archive into an empty folder, trusting nothing it says about itself.

zip, tar and tar.gz are told apart by content. Only plain files and folders come out, under names that were taken apart and
checked; nothing is extracted by the libraries' own path handling. Sizes are counted while bytes arrive, never believed.
"""

import gzip
import io
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from adapters.errors import ArchiveError, Fault

PIECE_BYTES = 1 << 20
MAX_DEPTH = 6
MAX_METADATA_BYTES = 4 << 20  # a zip's directory or one tar header; the libraries read either whole into memory
RATIO_FLOOR_BYTES = 16 << 20  # below this an expansion harms nobody, however good the compression
_NOISE = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|\._[^/]*$)")
_BAD_COMPONENT = re.compile(r"[\x00-\x1f\x7f:*?\"<>|\\]")
_BROKEN = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    LookupError,
)


@dataclass(frozen=True)
class UploadLimits:
    """What one upload may cost."""

    max_bytes: int = 1 << 30
    max_entries: int = 64
    max_expanded_bytes: int = 2 << 30
    max_ratio: int = 100  # expanded / packed: weights hardly compress, a bomb reaches a thousand and more


@dataclass(frozen=True)
class _Entry:
    """One file or folder as the archive claims it; `kind` is set when it is neither."""

    name: str
    is_folder: bool
    size_bytes: int
    open: Callable[[], IO[bytes]]
    kind: str | None = None


def unpack(archive: Path, into: Path, limits: UploadLimits) -> None:
    """Unpack into `into`, which must not exist or be empty; a single top folder is left out.

    Raises ArchiveError and leaves no `into` behind.
    """
    packed = archive.stat().st_size
    if packed > limits.max_bytes:
        raise _error(
            "archive_too_large",
            f"The archive has {packed} bytes; at most {limits.max_bytes} are accepted.",
            archive.name,
            "Upload adapter_config.json, adapter_model.safetensors and manifest.json only.",
        )
    into.mkdir(parents=True, exist_ok=True)
    if any(into.iterdir()):
        raise FileExistsError(f"{into} is not empty")
    budget = min(limits.max_expanded_bytes, max(packed * limits.max_ratio, RATIO_FLOOR_BYTES))
    try:
        with tempfile.TemporaryFile(dir=into.parent) as scratch:
            with archive.open("rb") as file:
                start = file.read(6)
            if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                with _Guarded(archive) as guarded, zipfile.ZipFile(guarded) as opened:
                    _write(_zip_entries(opened), into, limits, budget)
            else:
                if start[:2] == b"\x1f\x8b":
                    # A tar of small files is padded: leave room for headers beside the contents.
                    _gunzip(archive, scratch, budget + (limits.max_entries + 16) * 2048, budget)
                    guarded = _Guarded(scratch.fileno(), closefd=False)
                else:
                    guarded = _Guarded(archive)
                with guarded:
                    _check_tar(guarded, archive)
                    with tarfile.open(fileobj=guarded, mode="r:", encoding="utf-8", errors="strict") as tar:
                        _write(_tar_entries(tar), into, limits, budget)
    except ArchiveError:
        shutil.rmtree(into)
        raise
    except _BROKEN as exc:
        shutil.rmtree(into)
        raise _error(
            "broken_archive",
            f"The archive is damaged or not what its beginning says: {type(exc).__name__}.",
            archive.name,
            "Pack the folder again and check that the upload was complete.",
        ) from exc
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise


class _Guarded(io.FileIO):
    """A file not read into memory in one big piece, nor before its beginning, whatever damaged metadata asks for."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_SET and offset < 0:  # from a directory that lies about where it begins
            raise zipfile.BadZipFile("an offset before the beginning")
        return super().seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        everything = size is None or size < 0
        found = super().read(MAX_METADATA_BYTES + 1 if everything else min(size or 0, MAX_METADATA_BYTES + 1)) or b""
        if len(found) > MAX_METADATA_BYTES:
            raise _error(
                "archive_bomb",
                "The archive carries metadata of an absurd size.",
                "archive",
                "Pack the folder with an ordinary zip or tar command.",
            )
        return found


def _write(entries: Iterator[_Entry], into: Path, limits: UploadLimits, budget: int) -> None:
    """Check every entry's name and kind, and copy the files. One bad entry fails the whole archive."""
    seen: set[str] = set()
    count = written = 0
    for entry in entries:
        count += 1
        if count > limits.max_entries:
            raise _error(
                "too_many_entries",
                f"The archive has more than {limits.max_entries} entries.",
                entry.name[:200],
                "Upload adapter_config.json, adapter_model.safetensors and manifest.json only.",
            )
        if _NOISE.search(entry.name):
            continue
        parts = _safe_parts(entry)
        if entry.is_folder or not parts:
            continue
        key = "/".join(parts).casefold()
        if key in seen:
            raise _bad_entry("duplicate_entry", entry, "is in the archive twice", "Pack every file once.")
        seen.add(key)
        if entry.size_bytes + written > budget:
            raise _bomb(budget)
        target = into.joinpath(*parts)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with entry.open() as source, target.open("xb") as sink:
                while piece := source.read(PIECE_BYTES):
                    written += len(piece)
                    if written > budget:
                        raise _bomb(budget)
                    sink.write(piece)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
            raise _bad_entry("duplicate_entry", entry, "is both a file and a folder", "Pack every file once.") from exc
    _flatten(into)
    if not any(into.iterdir()):
        raise _error("empty_archive", "The archive holds no files.", "archive", "Pack the adapter's folder.")


def _safe_parts(entry: _Entry) -> tuple[str, ...]:
    """The entry's path, taken apart. Raises ArchiveError for anything that is not a plain name below the top."""
    name = entry.name
    if entry.kind:
        raise _bad_entry("forbidden_entry", entry, f"is {entry.kind}", "Pack plain files and folders only.")
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise _bad_entry("absolute_path", entry, "has an absolute path", "Pack the folder with relative paths.")
    parts = tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
    if ".." in parts:
        raise _bad_entry("path_outside", entry, "leads out of the folder", "Pack the folder without '..' in names.")
    if any(_BAD_COMPONENT.search(part) or len(part.encode(errors="replace")) > 200 for part in parts) or "\\" in name:
        raise _bad_entry("bad_name", entry, "has characters no file name should have", "Rename the file.")
    if len(parts) > MAX_DEPTH:
        raise _bad_entry("bad_name", entry, f"lies more than {MAX_DEPTH} folders deep", "Pack the folder flat.")
    return parts


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in archive.infolist():
        mode = info.external_attr >> 16
        kind = None
        if info.flag_bits & 0x1:
            kind = "encrypted"
        elif mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "compressed in a way other than deflate"
        elif info.orig_filename != info.filename:
            kind = "named with hidden characters"
        yield _Entry(info.filename, info.is_dir(), info.file_size, lambda info=info: archive.open(info), kind)  # type: ignore[misc]


def _tar_entries(archive: tarfile.TarFile) -> Iterator[_Entry]:
    for member in archive:
        kind = None
        if member.issym() or member.islnk():
            kind = "a link"
        elif member.issparse() or member.size < 0:
            kind = "a sparse file"
        elif not (member.isreg() or member.isdir()):
            kind = "a device, pipe or other special file"

        def content(member: tarfile.TarInfo = member) -> IO[bytes]:
            source = archive.extractfile(member)
            if source is None:
                raise tarfile.ReadError("no content")
            return source

        yield _Entry(member.name, member.isdir(), member.size, content, kind)


_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def _check_tar(file: IO[bytes], archive: Path) -> None:
    """A first header with a right checksum; tarfile itself takes an empty or foreign file for an empty archive."""
    block = file.read(512)
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as exc:
        raise _unknown(archive) from exc


def _gunzip(archive: Path, sink: IO[bytes], limit: int, budget: int) -> None:
    written = 0
    with gzip.open(archive, "rb") as source:
        while piece := source.read(PIECE_BYTES):
            written += len(piece)
            if written > limit:
                raise _bomb(budget)
            sink.write(piece)
    sink.flush()
    sink.seek(0)


def _flatten(into: Path) -> None:
    """Leave out a single top folder, as `zip -r adapter.zip adapter` puts one there."""
    children = list(into.iterdir())
    if len(children) != 1 or not children[0].is_dir():
        return
    (top,) = children
    aside = Path(tempfile.mkdtemp(prefix=".flatten-", dir=into))
    top.rename(aside / "top")
    for child in (aside / "top").iterdir():
        child.rename(into / child.name)
    shutil.rmtree(aside)


def _unknown(archive: Path) -> ArchiveError:
    return _error(
        "unknown_archive",
        "The upload is neither zip nor tar nor tar.gz.",
        archive.name,
        "Pack the adapter's folder: zip -r adapter.zip FOLDER",
    )


def _bomb(budget: int) -> ArchiveError:
    return _error(
        "archive_bomb",
        f"The archive expands to more than {budget} bytes, which is out of proportion or over the limit.",
        "archive",
        "Upload adapter_config.json, adapter_model.safetensors and manifest.json only.",
    )


def _bad_entry(code: str, entry: _Entry, what: str, fix: str) -> ArchiveError:
    shown = ascii(entry.name[:200])
    return _error(code, f"The archive's entry {shown} {what}.", shown, fix)


def _error(code: str, message: str, where: str, fix: str) -> ArchiveError:
    return ArchiveError(Fault(code, message, where, fix))
