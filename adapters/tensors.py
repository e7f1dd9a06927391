"""safetensors files, read strictly and written with numpy alone: no torch, no pickle, one tensor in memory at a time.

The format: eight bytes with the header's length, a JSON header with each tensor's dtype, shape and place, the bytes.
Our reader trusts none of it; a header that lies is a list of faults, never a crash or a read outside the file.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from adapters.errors import Fault, InvalidAdapterError

MAX_HEADER_BYTES = 16 << 20  # an adapter's header takes about 150 bytes a tensor; the format itself would allow 100 MB
MAX_FAULTS = 50  # a report is read by people; a file with a thousand bad tensors has one problem

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor, checked against the file."""

    name: str
    dtype: str  # as the format spells it: "F32", "BF16" …
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    size_bytes: int


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file whose header has been read and found to be true."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str) -> NDArray[Any]:
        """The tensor in its own dtype, as a copy: the file may change or shrink behind us without harm."""
        info = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=info.size_bytes, offset=info.offset)
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

    def chunks(self, name: str, size_bytes: int = 8 << 20) -> Iterator[bytes]:
        """The tensor's raw bytes, a piece at a time."""
        info = self.tensors[name]
        left = info.size_bytes
        with self.path.open("rb") as file:
            file.seek(info.offset)
            while left:
                piece = file.read(min(size_bytes, left))
                if not piece:
                    raise _broken(self.path, "truncated_safetensors", f"ends inside tensor '{name}'")
                left -= len(piece)
                yield piece


def open_tensors(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
    """Read and check the header. Raises InvalidAdapterError with every fault found in it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        _refuse_pickle(path, start)
        if len(start) < 9:
            raise _broken(path, "truncated_safetensors", f"is only {size} bytes long")
        (length,) = struct.unpack("<Q", start[:8])
        if length > max_header_bytes:
            raise _broken(
                path, "huge_header", f"claims a header of {length} bytes; at most {max_header_bytes} are accepted"
            )
        if length < 2 or 8 + length > size:
            raise _broken(
                path, "truncated_safetensors", f"claims a header of {length} bytes but is only {size} bytes long"
            )
        file.seek(8)
        raw = file.read(length)
    header = _parse_header(path, raw)
    metadata = header.pop("__metadata__", {})
    faults: list[Fault] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append(_fault(path, "bad_header", "has a __metadata__ that is not text", "__metadata__"))
        metadata = {}
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _tensor_info(path, name, entry, data_start=8 + length, data_end=size)
        if isinstance(info, Fault):
            faults.append(info)
        else:
            tensors[name] = info
    if not faults:
        faults += _layout_faults(path, tensors, data_start=8 + length, data_end=size)
    if faults:
        raise InvalidAdapterError(shorten(faults))
    return TensorFile(path, tensors, metadata)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is about to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write_tensors(
    path: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[str], NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors one after another; `produce` is called once a name, so only one has to exist at a time.

    Raises ValueError when what it produces does not have the announced dtype and shape.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    # Widest items first keeps every tensor aligned to its own item size, as other readers map the file.
    ordered = sorted(specs, key=lambda spec: (-DTYPES[spec.dtype].itemsize, spec.name))
    for spec in ordered:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size_bytes],
        }
        offset += spec.size_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for spec in ordered:
            tensor = produce(spec.name)
            if tensor.shape != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
                raise ValueError(f"{spec.name}: announced {spec.dtype} {spec.shape}, got {tensor.dtype} {tensor.shape}")
            file.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data)


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are all in memory."""
    specs = [TensorSpec(name, _NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
    write_tensors(path, specs, lambda name: tensors[name], metadata or {"format": "pt"})


def shorten(faults: Sequence[Fault]) -> list[Fault]:
    """At most MAX_FAULTS of them, the last saying how many more there are."""
    if len(faults) <= MAX_FAULTS:
        return list(faults)
    rest = faults[MAX_FAULTS - 1 :]
    codes = {fault.code for fault in rest}
    code = codes.pop() if len(codes) == 1 else "more_faults"  # who forgives a kind of fault forgives the rest of it
    last = Fault(code, f"{len(rest)} more faults of this kind.", faults[-1].where, "Mend the ones above first.")
    return [*faults[: MAX_FAULTS - 1], last]


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: two readers of one file must not see two different values under one key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice[:80]}' appears twice")
    return found


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_object)
    except (ValueError, RecursionError) as exc:
        raise _broken(path, "bad_header", f"has a header that is not plain JSON: {exc}") from exc
    if not raw.startswith(b"{") or not isinstance(header, dict):
        raise _broken(path, "bad_header", "has a header that is not a JSON object")
    return header


def _tensor_info(path: Path, name: str, entry: Any, *, data_start: int, data_end: int) -> TensorInfo | Fault:
    where = f"{path.name}:{name[:200]}"

    def lies(what: str) -> Fault:
        return _fault(path, "lying_header", f"tensor '{name[:200]}' {what}", where)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return lies("is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return lies(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_counts(shape) or len(shape) > 8:
        return lies("has a shape that is not a short list of whole numbers")
    if not _is_counts(offsets) or len(offsets) != 2:
        return lies("has data_offsets that are not two whole numbers")
    begin, end = offsets
    if begin > end or data_start + end > data_end:
        return lies(f"claims bytes {begin} to {end}, but the file holds {data_end - data_start}")
    expected = prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        return lies(f"claims {end - begin} bytes, but {dtype} {shape} takes {expected}")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, end - begin)


def _layout_faults(path: Path, tensors: Mapping[str, TensorInfo], *, data_start: int, data_end: int) -> Iterator[Fault]:
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.size_bytes)):
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            yield _fault(path, "lying_header", f"tensor '{info.name[:200]}' {kind}", f"{path.name}:{info.name[:200]}")
        position = max(position, info.offset + info.size_bytes)
    if position != data_end:
        yield _fault(path, "lying_header", f"has {data_end - position} bytes that belong to no tensor", path.name)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _refuse_pickle(path: Path, start: bytes) -> None:
    # The same bytes are a header's length in a sound file, where the header's brace follows them.
    if start[8:9] != b"{" and (start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")):
        raise InvalidAdapterError(
            [
                Fault(
                    "pickle_file",
                    f"{path.name} is a torch pickle under another name; it has not been opened.",
                    path.name,
                    "Save the adapter with safetensors (PEFT's default: save_pretrained(folder)).",
                )
            ]
        )


def _broken(path: Path, code: str, what: str) -> InvalidAdapterError:
    return InvalidAdapterError([_fault(path, code, what, path.name)])


def _fault(path: Path, code: str, what: str, where: str) -> Fault:
    subject = "" if what.startswith("tensor") else f"{path.name} "
    message = f"{subject}{what}."
    return Fault(
        code,
        message[0].upper() + message[1:] if not subject else message,
        where,
        "Save the adapter again with save_pretrained, and check that the upload was complete.",
    )
