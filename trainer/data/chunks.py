"""A source's rows in chunks small enough to be handed to a process."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.data.origins import Origin
from trainer.data.reading import read_file

CHUNK_ROWS = 1000
CHUNK_BYTES = 2_000_000


@dataclass(frozen=True)
class Chunk:
    """Raw rows of one file. read_bytes: how far its source has been read with them."""

    source: int  # place in config.all_sources
    origin: str  # source and file as reports name them
    rows: tuple[tuple[int, bytes], ...]  # line, JSON
    read_bytes: int


def chunks_of(source: int, origin: Origin, *, piece_chars: int) -> Iterator[Chunk]:
    """Up to the source's limit of rows. Raises DataError."""
    left = origin.config.limit
    before_bytes = 0
    for file in origin.files:
        rows: list[tuple[int, bytes]] = []
        size_bytes = read_bytes = 0
        for row in read_file(file, piece_chars=piece_chars):
            if left == 0:
                break
            left = None if left is None else left - 1
            rows.append((row.line, row.data))
            size_bytes += len(row.data)
            read_bytes = row.read_bytes
            if len(rows) == CHUNK_ROWS or size_bytes > CHUNK_BYTES:
                yield Chunk(source, origin.label(file), tuple(rows), before_bytes + read_bytes)
                rows, size_bytes = [], 0
        if rows:
            yield Chunk(source, origin.label(file), tuple(rows), before_bytes + read_bytes)
        before_bytes += file.stat().st_size
