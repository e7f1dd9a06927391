"""Archives: what comes out is what went in, and nothing ever lands outside."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from adapters.archive import UploadLimits, unpack
from adapters.errors import ArchiveError
from tests.factories import tar_folder, zip_folder

LIMITS = UploadLimits(max_bytes=1 << 20, max_entries=10, max_expanded_bytes=1 << 20)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def unpack_bytes(tmp_path: Path, content: bytes, limits: UploadLimits = LIMITS) -> dict[str, bytes]:
    archive = tmp_path / "upload"
    archive.write_bytes(content)
    into = tmp_path / "into"
    unpack(archive, into, limits)
    return {str(path.relative_to(into)): path.read_bytes() for path in sorted(into.rglob("*")) if path.is_file()}


def refusal(tmp_path: Path, content: bytes, limits: UploadLimits = LIMITS) -> str:
    """The fault's code; proves that nothing was left behind, inside or outside."""
    before = sorted(path for path in tmp_path.rglob("*") if path.name != "upload")
    with pytest.raises(ArchiveError) as caught:
        unpack_bytes(tmp_path, content, limits)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "upload") == before
    (fault,) = caught.value.faults
    assert fault.fix
    assert fault.where
    return fault.code


def zip_of(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in members:
            if content:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def special(kind: bytes, name: str = "adapter_config.json", link: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = link
    return member


@pytest.mark.parametrize("top", ["", "support-v1"])
@pytest.mark.parametrize(
    "pack",
    [
        lambda folder, top: zip_folder(folder, top=top),
        lambda folder, top: tar_folder(folder, top=top),
        lambda folder, top: tar_folder(folder, top=top, gz=True),
    ],
    ids=["zip", "tar", "tar.gz"],
)
def test_every_kind_of_archive_gives_the_files_without_their_top_folder(
    tmp_path: Path, folder: Path, pack: Callable[[Path, str], bytes], top: str
) -> None:
    assert unpack_bytes(tmp_path, pack(folder, top)) == FILES


def test_what_a_mac_adds_is_left_out(tmp_path: Path) -> None:
    content = zip_of(
        ("a/adapter_config.json", b"{}"), ("__MACOSX/a/._adapter_config.json", b"x"), ("a/.DS_Store", b"x")
    )
    assert unpack_bytes(tmp_path, content) == {"adapter_config.json": b"{}"}


def test_a_top_folder_named_like_its_own_content_is_flattened(tmp_path: Path) -> None:
    assert unpack_bytes(tmp_path, zip_of(("a/a", b"1"), ("a/b", b"2"))) == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../escaped", "path_outside"),
        ("a/../../escaped", "path_outside"),
        ("..\\escaped", "path_outside"),
        ("/tmp/escaped", "absolute_path"),  # noqa: S108 - the attack itself
        ("\\\\server\\share", "absolute_path"),
        ("C:\\escaped", "absolute_path"),
        ("a\nb", "bad_name"),
        ("x" * 255, "bad_name"),
        ("a/b/c/d/e/f/g", "bad_name"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str, code: str) -> None:
    assert refusal(tmp_path, zip_of((name, b"x"))) == code
    assert refusal(tmp_path, tar_of((tarfile.TarInfo(name), b"x"))) == code


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    assert refusal(tmp_path, tar_of((special(kind), b""))) == "forbidden_entry"


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("adapter_config.json")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert refusal(tmp_path, buffer.getvalue()) == "forbidden_entry"


def test_a_file_below_a_link_is_refused_with_the_link(tmp_path: Path) -> None:
    content = tar_of((special(tarfile.SYMTYPE, "a", str(tmp_path)), b""), (tarfile.TarInfo("a/escaped"), b"x"))
    assert refusal(tmp_path, content) == "forbidden_entry"


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, zip_of(*((f"f{n}", b"") for n in range(11)))) == "too_many_entries"


def test_a_file_twice_is_refused_whatever_its_case(tmp_path: Path) -> None:
    assert refusal(tmp_path, zip_of(("adapter_config.json", b"1"), ("Adapter_Config.json", b"2"))) == "duplicate_entry"


def test_a_file_that_is_also_a_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, zip_of(("a", b"1"), ("a/b", b"2"))) == "duplicate_entry"


def test_an_archive_over_the_size_limit_is_not_opened(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"x" * (LIMITS.max_bytes + 1)) == "archive_too_large"


@pytest.mark.parametrize("gz", [False, True], ids=["zip", "tar.gz"])
def test_what_expands_beyond_the_limit_is_refused(tmp_path: Path, gz: bool) -> None:
    bomb = b"\0" * (LIMITS.max_expanded_bytes + 100_000)
    content = gzip.compress(tar_of((tarfile.TarInfo("a"), bomb))) if gz else zip_of(("a", bomb))
    assert refusal(tmp_path, content) == "archive_bomb"


def test_what_expands_out_of_proportion_is_refused_below_the_limit(tmp_path: Path) -> None:
    bomb = zip_of(("a", b"\0" * (32 << 20)))
    assert refusal(tmp_path, bomb, UploadLimits(max_expanded_bytes=1 << 30)) == "archive_bomb"


def test_a_zip_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    content = bytearray(zip_of(("a", b"\0" * 500_000)))
    directory = content.rindex(b"PK\x01\x02")
    struct.pack_into("<L", content, directory + 24, 10)  # uncompressed size, central directory
    assert refusal(tmp_path, bytes(content)) == "broken_archive"


def test_a_zip_with_an_enormous_directory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    content = zip_of(*((f"{n:0100}", b"") for n in range(30_000)))
    limits = UploadLimits(max_bytes=1 << 30, max_entries=10)
    assert refusal(tmp_path, content, limits) == "archive_bomb"


def test_a_tar_whose_metadata_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type = tarfile.XHDTYPE
    header.size = 8 << 20
    content = header.tobuf(tarfile.USTAR_FORMAT) + b"1" * (8 << 20)
    limits = UploadLimits()
    assert refusal(tmp_path, content, limits) == "archive_bomb"
    assert refusal(tmp_path, gzip.compress(content), limits) == "archive_bomb"


def test_an_encrypted_or_oddly_compressed_zip_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, zip_of(("a", b"x"), compression=zipfile.ZIP_LZMA)) == "forbidden_entry"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01.", b"\0" * 1024])
def test_what_is_no_archive_is_named_so(tmp_path: Path, content: bytes) -> None:
    assert refusal(tmp_path, content) in ("unknown_archive", "empty_archive")


def test_an_archive_without_files_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, zip_of()) == "empty_archive"
    assert refusal(tmp_path, zip_of(("a/", b""))) == "empty_archive"


def test_a_cut_archive_is_refused(tmp_path: Path, folder: Path) -> None:
    whole = tar_folder(folder, gz=True)
    assert refusal(tmp_path, whole[: len(whole) // 2]) == "broken_archive"


SEEDS = {
    "zip": zip_of(("a/adapter_config.json", b"{}"), ("a/model", b"weights" * 50)),
    "tar": tar_of((tarfile.TarInfo("a/adapter_config.json"), b"{}"), (tarfile.TarInfo("a/model"), b"weights" * 50)),
}
SEEDS["tar.gz"] = gzip.compress(SEEDS["tar"])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(SEEDS)),
    edits=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.one_of(st.none(), st.integers(0, 20_000)),
)
@example(kind="zip", edits=[(7683, 1)], cut=None)  # a directory that begins before the file does
def test_a_damaged_archive_is_unpacked_inside_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edits: list[tuple[int, int]], cut: int | None
) -> None:
    tmp_path = tmp_path_factory.mktemp("fuzz")
    content = bytearray(SEEDS[kind])
    for position, value in edits:
        content[position % len(content)] = value
    try:
        unpack_bytes(tmp_path, bytes(content[:cut]))
    except ArchiveError:
        assert not (tmp_path / "into").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"upload", "into"}


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.text(st.sampled_from("a./\\:\0é-"), min_size=1, max_size=12), min_size=1, max_size=4))
def test_no_name_writes_outside_the_folder(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    tmp_path = tmp_path_factory.mktemp("names")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    try:
        unpack_bytes(tmp_path, buffer.getvalue())
    except ArchiveError:
        assert not (tmp_path / "into").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"upload", "into"}
