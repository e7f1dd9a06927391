"""Receive a multipart form: files go to disk as they arrive, fields stay small, limits hold while the bytes come in."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from gateway.errors import BodyTooLargeError, InvalidRequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FRAMING_BYTES = 64 * 1024  # boundaries, part headers and fields, on top of the files themselves
MAX_FIELD_BYTES = 16 * 1024
MAX_PARTS = 16
WRITE_BYTES = 1024 * 1024  # gathered before one trip to a thread


@dataclass(frozen=True)
class Form:
    """What was sent: text fields, and the files on disk under the name of their field, with what the client calls them."""

    fields: Mapping[str, str]
    files: Mapping[str, Path]
    filenames: Mapping[str, str]


async def receive_form(request: Request, into: Path, *, files: Collection[str], max_bytes: int) -> Form:
    """The form of a request; each field named in `files` becomes the file `into/<field>`, whatever name the client gave.

    Raises BodyTooLargeError as soon as more than max_bytes came, whatever the length header says; InvalidRequestError for
    anything that is not a whole multipart form.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequestError("Send a multipart/form-data body.", code="invalid_content_type")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes + FRAMING_BYTES:
        raise BodyTooLargeError(max_bytes)
    with ExitStack() as opened:
        receiver = _Receiver(into, frozenset(files), opened)
        try:
            await _feed(receiver, options[b"boundary"], request.stream(), max_bytes)
        except FormParserError as exc:
            raise InvalidRequestError(f"The multipart body is broken: {exc}", code="invalid_multipart") from exc
        except ClientDisconnect as exc:
            raise InvalidRequestError("The upload was broken off before its end.", code="incomplete_body") from exc
    fields = {name: raw.decode("utf-8", "replace") for name, raw in receiver.fields.items()}
    return Form(fields, receiver.paths, receiver.filenames)


async def _feed(receiver: "_Receiver", boundary: bytes, chunks: AsyncIterator[bytes], max_bytes: int) -> None:
    parser = MultipartParser(boundary, receiver.callbacks())
    received = 0
    async for chunk in chunks:
        received += len(chunk)
        if received > max_bytes + FRAMING_BYTES:
            raise BodyTooLargeError(max_bytes)
        parser.write(chunk)
        if receiver.waiting_bytes >= WRITE_BYTES:
            await asyncio.to_thread(receiver.write_waiting)
    await asyncio.to_thread(receiver.write_waiting)
    if not receiver.ended:
        raise InvalidRequestError("The multipart body ends before its closing boundary.", code="incomplete_body")


@dataclass
class _Receiver:
    """The parser's callbacks. They only sort bytes; `write_waiting`, in a thread, brings them to disk."""

    into: Path
    wanted: frozenset[str]
    opened: ExitStack
    fields: dict[str, bytearray] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    filenames: dict[str, str] = field(default_factory=dict)
    waiting_bytes: int = 0
    ended: bool = False
    _waiting: list[tuple[str, bytes]] = field(default_factory=list)
    _targets: dict[str, BinaryIO] = field(default_factory=dict)
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _disposition: bytes = b""
    _part: str = ""

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def write_waiting(self) -> None:
        for name, piece in self._waiting:
            if name not in self._targets:
                self._targets[name] = self.opened.enter_context(self.paths[name].open("wb"))
            self._targets[name].write(piece)
        self._waiting.clear()
        self.waiting_bytes = 0

    def _begin(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise InvalidRequestError("A part of the multipart body has no name.", code="invalid_multipart")
        if name in self.fields or name in self.paths:
            raise InvalidRequestError(f"'{name}' was sent twice.", param=name, code="duplicate_field")
        if len(self.fields) + len(self.paths) >= MAX_PARTS:
            raise InvalidRequestError(f"More than {MAX_PARTS} parts were sent.", code="invalid_multipart")
        self._part = name
        if name in self.wanted:
            self.paths[name] = self.into / name
            self.filenames[name] = options.get(b"filename", b"").decode("utf-8", "replace")
            self._waiting.append((name, b""))  # an empty file is a file
        else:
            self.fields[name] = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part in self.paths:
            self._waiting.append((self._part, data[start:end]))
            self.waiting_bytes += end - start
            return
        self.fields[self._part] += data[start:end]
        if len(self.fields[self._part]) > MAX_FIELD_BYTES:
            accepted = ", ".join(sorted(self.wanted))
            raise InvalidRequestError(
                f"The field '{self._part}' is longer than {MAX_FIELD_BYTES:,} bytes. Files are accepted as: {accepted}.",
                param=self._part,
            )

    def _end(self) -> None:
        self.ended = True
