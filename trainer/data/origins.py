"""Where a data set's rows come from: each source of the configuration as files that exist, with terms and digests."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from adapters.licences import Source, Verdict, judge_licences
from trainer.data.card import SourceCard, TeacherCard, file_sha256
from trainer.data.catalog import load_dataset_spec
from trainer.data.reading import TEXT_SUFFIXES, find_files, read_file
from trainer.data.recipe import BenchmarkConfig, BuildConfig, SourceConfig
from trainer.errors import DataError, RowFault

Fetch = Callable[[str], Path]  # name of a known data set -> its folder

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Origin:
    """A source with its files."""

    config: SourceConfig
    files: tuple[Path, ...]
    licence: str
    sha256: str

    def label(self, file: Path) -> str:
        """As rejected.jsonl names it."""
        return self.config.title if len(self.files) == 1 else f"{self.config.title}/{file.name}"

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def card(self, rows: int) -> SourceCard:
        return SourceCard(
            name=self.config.title,
            licence=self.licence,
            sha256=self.sha256,
            rows=rows,
            exceptions=self.config.exceptions,
            teacher=self.config.teacher,
        )


def find_origins(config: BuildConfig, *, relative_to: Path, fetch: Fetch) -> tuple[Origin, ...]:
    """In the order of config.all_sources. Raises ConfigError, FetchError."""
    return tuple(_origin(source, relative_to, fetch) for source in config.all_sources)


def _origin(source: SourceConfig, relative_to: Path, fetch: Fetch) -> Origin:
    files = _files(source, relative_to, fetch)
    licence = source.licence or (load_dataset_spec(source.dataset).licence if source.dataset else UNKNOWN)
    digests = [file_sha256(file) for file in files]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Origin(source, tuple(files), licence, whole)


def _files(source: SourceConfig | BenchmarkConfig, relative_to: Path, fetch: Fetch) -> list[Path]:
    if source.dataset is not None:
        return [fetch(source.dataset) / f"{source.part}.jsonl"]
    assert source.path is not None  # noqa: S101 - the configuration asks for one of the two
    return find_files(relative_to / source.path.expanduser())


def benchmark_rows(benchmark: BenchmarkConfig, *, relative_to: Path, fetch: Fetch) -> Iterator[Any]:
    """Every row of a benchmark, parsed; a paragraph of a text file is a row. Raises ConfigError, DataError."""
    for file in _files(benchmark, relative_to, fetch):
        is_text = file.suffix.lower() in TEXT_SUFFIXES
        for row in read_file(file):
            try:
                value = orjson.loads(row.data)
            except orjson.JSONDecodeError as exc:
                raise DataError(file, [RowFault(row.line, f"not JSON: {exc}")]) from exc
            yield from value["text"].split("\n\n") if is_text else (value,)


def licence_verdict(origins: Sequence[Origin], base: tuple[str, str] | None) -> Verdict:
    """What the terms of all sources, their teachers and the base mean together. base: name and licence."""
    parts: list[Source] = []
    for origin in origins:
        config = origin.config
        parts.append(Source(name=config.title, kind="data", licence=origin.licence, exceptions=dict(config.exceptions)))
        if config.teacher is not None:
            parts.append(_teacher(config.teacher))
    if base is not None:
        parts.append(Source(name=base[0], kind="base", licence=base[1]))
    return judge_licences(parts)


def _teacher(teacher: TeacherCard) -> Source:
    return Source(name=teacher.name, kind="teacher", licence=teacher.licence)
