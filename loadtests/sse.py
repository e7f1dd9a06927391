"""Server-sent events from raw bytes, cut anywhere."""


class EventParser:
    """Feed it bytes as they come; it gives back each complete event as (event type, data).

    Knows what the standard asks of a reader of data: CRLF or LF, comments, several data lines. A lone CR as line end,
    which no server of this kind sends, is not understood.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._type = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        alone = not (self._rest or self._type or self._data)
        if alone and data.startswith(b"data: ") and data.endswith(b"\n\n") and data.find(b"\n") == len(data) - 2:
            return [(b"", data[6:-2])]  # one event by itself, as nearly all come: a third of the work below
        events: list[tuple[bytes, bytes]] = []
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append((self._type, b"\n".join(self._data)))
                self._type, self._data = b"", []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                self._type = line[6:].strip()
        return events
