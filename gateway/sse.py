"""Server-sent events as bytes: cut a stream into events, and write one."""

from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"


class EventSplitter:
    """Feed it pieces cut anywhere; it gives back whole events, each with its closing blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        data = self._rest + piece if self._rest else piece
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *whole, self._rest = data.split(b"\n\n")
        return [event + b"\n\n" for event in whole]


def payload(event: bytes) -> bytes:
    """What stands behind `data:`; empty for comments and events without data."""
    if event.startswith(b"data: "):
        return event[6:-2]
    lines = [line[5:].lstrip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines)


def data_event(body: Any) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
