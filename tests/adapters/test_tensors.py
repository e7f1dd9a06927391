"""safetensors: what we write others read, and a file that lies is named, never trusted."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import Fault, InvalidAdapterError
from adapters.tensors import MAX_FAULTS, TensorSpec, open_tensors, save_tensors, shorten, write_tensors


def write_raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def codes(path: Path) -> set[str]:
    with pytest.raises(InvalidAdapterError) as caught:
        open_tensors(path)
    return {fault.code for fault in caught.value.faults}


def test_written_tensors_come_back_unchanged(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3).astype(ml_dtypes.bfloat16),
        "c": np.zeros((0, 4), np.float16),
    }
    save_tensors(tmp_path / "x.safetensors", tensors)
    file = open_tensors(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype
        assert np.array_equal(found, tensor)


def test_the_reference_library_reads_what_we_write_and_the_other_way_round(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors: dict[str, Any] = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.int8)}
    save_tensors(tmp_path / "ours.safetensors", tensors)
    theirs = numpy.load_file(tmp_path / "ours.safetensors")
    assert all(np.array_equal(theirs[name], tensor) for name, tensor in tensors.items())
    numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    ours = open_tensors(tmp_path / "theirs.safetensors")
    assert all(np.array_equal(ours.read(name), tensor) for name, tensor in tensors.items())


def test_writing_something_else_than_announced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced F32"):
        write_tensors(tmp_path / "x", [TensorSpec("a", "F32", (2,))], lambda _: np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("header", "data", "code"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "lying_header"),  # overlap
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "lying_header"),  # hole
        ({"a": entry(0, 4)}, 6, "lying_header"),  # bytes of nobody
        ({"a": entry(0, 40)}, 6, "lying_header"),  # outside
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, 4, "lying_header"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, 4, "lying_header"),
        ({"a": entry(0, 4, [1 << 61, 1 << 61])}, 4, "lying_header"),
        ({"a": entry(0, 4, [True, 4])}, 4, "lying_header"),
        ({"a": entry(0, 4, dtype="F4")}, 4, "lying_header"),
        ({"a": {**entry(0, 4), "more": 1}}, 4, "lying_header"),
        ({"a": [1, 2]}, 0, "lying_header"),
        ({"__metadata__": {"a": 1}}, 0, "bad_header"),
        ([1, 2], 0, "bad_header"),
        (b'{"a": NaN', 0, "bad_header"),
        (b"\xff\xfe", 0, "bad_header"),
        (b"[" * 100_000, 0, "bad_header"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "bad_header"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: int, code: str) -> None:
    assert codes(write_raw(tmp_path / "x.safetensors", header, b"\0" * data)) == {code}


def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps({"a": entry(0, 4)})[:-1].encode()
    path = write_raw(tmp_path / "x.safetensors", one + b", " + one[1:] + b"}", b"\0" * 4)
    assert codes(path) == {"bad_header"}


def test_sizes_that_cannot_be_are_refused_without_reading(tmp_path: Path) -> None:
    assert codes(write_raw(tmp_path / "a", {}, length=1 << 40)) == {"huge_header"}
    assert codes(write_raw(tmp_path / "b", {}, length=100)) == {"truncated_safetensors"}
    (tmp_path / "c").write_bytes(b"1234")
    assert codes(tmp_path / "c") == {"truncated_safetensors"}


def test_a_renamed_pickle_is_called_a_pickle(tmp_path: Path) -> None:
    for start in (b"PK\x03\x04", b"\x80\x02}q"):
        (tmp_path / "x").write_bytes(start + b"0" * 100)
        assert codes(tmp_path / "x") == {"pickle_file"}


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(length)
    assert list(open_tensors(write_raw(tmp_path / "x", header, b"1234")).tensors) == ["a"]


def test_every_fault_is_named_up_to_a_readable_number(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x", {f"t{n}": entry(0, 9) for n in range(500)}, b"")
    with pytest.raises(InvalidAdapterError) as caught:
        open_tensors(path)
    assert len(caught.value.faults) == MAX_FAULTS
    assert "451 more" in caught.value.faults[-1].message


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 400)),
)
def test_a_damaged_file_is_read_inside_its_bounds_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int | None
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_tensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.float16)})
    content = bytearray(path.read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    path.write_bytes(bytes(content[:cut]))
    try:
        file = open_tensors(path)
    except InvalidAdapterError:
        return
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape
        assert info.offset + info.size_bytes <= path.stat().st_size


def test_the_faults_left_out_of_a_report_keep_their_kind() -> None:
    alike = [Fault("dora", f"fault {number}", "where", "fix") for number in range(MAX_FAULTS + 9)]
    assert {fault.code for fault in shorten(alike)} == {"dora"}
    assert shorten(alike)[-1].message == "10 more faults of this kind."
    mixed = [*alike, Fault("bias", "another", "where", "fix")]
    assert shorten(mixed)[-1].code == "more_faults"
