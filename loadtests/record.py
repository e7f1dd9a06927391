"""What is known of a request afterwards, and how a run is kept: one JSON line a request after a header line.

Every instant is in seconds from the beginning of the run, by the monotonic clock:

    intended   sent        headers   first          last         end
       |--lag--|--------------|--------|--- chunks ---|---close----|
       |------------ttft---------------|
               |------ttft_sent--------|
       |---------------------e2e----------------------|

Latency counts from the intended start, so time a request waits inside a busy client or before a stalled server is not
lost ("coordinated omission"); the figure from the sent instant stands beside it. METRICS holds each figure's definition.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from loadtests.errors import RecordError

FORMAT = "lorikeet.loadtest.records"
VERSION = 2
READABLE = (1, VERSION)  # what a later version added has defaults


class Outcome(StrEnum):
    OK = "ok"  # complete: with a finish_reason, and without an error event
    FAILED = "failed"
    REFUSED = "refused"  # 429: the server said not now
    CANCELLED = "cancelled"  # by us: it was interrupted, or planned so, even where the answer came first
    CENSORED = "censored"  # not answered when the run ended; it takes longer than is known


@dataclass(frozen=True)
class PhaseWindow:
    """A phase on the run's time axis."""

    name: str
    measured: bool
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Mark:
    """Something done to the server during the run, such as an upload: a mark on the time axis."""

    name: str
    start_s: float
    end_s: float
    error: str = ""  # empty: it succeeded


@dataclass(frozen=True)
class Sample:
    """Metrics of the server as scraped at one instant: series (with its labels) to value."""

    at_s: float
    values: Mapping[str, float]


@dataclass
class Record:
    """One request. Filled in by the client while it happens."""

    id: str
    phase: str
    tenant: str
    adapter: str
    stream: bool
    intended_s: float
    sent_s: float | None = None
    headers_s: float | None = None
    content_s: list[float] = field(default_factory=list)  # arrival of each chunk with content
    end_s: float | None = None
    outcome: Outcome = Outcome.CENSORED
    status: int | None = None
    error: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    served_by: str = ""  # x-lorikeet-adapter
    queue_s: float | None = None  # x-lorikeet-queue-ms
    load_s: float | None = None  # x-lorikeet-load-ms
    overhead_s: float | None = None  # x-lorikeet-overhead-ms: the gateway's own time
    retry_after_s: float | None = None  # as told with a 429
    visit: str = ""  # first, again, after_eviction: in phases that touch each adapter in turn
    turn: int = 0  # of a conversation, from 1
    slow: bool = False  # read with pauses of our own: what came after the first content says nothing of the server
    wrong: str = ""  # why the answer is another adapter's or another tenant's; empty: no sign of it

    @property
    def lag_s(self) -> float | None:
        return None if self.sent_s is None else self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        return self.content_s[0] - self.intended_s if self.stream and self.content_s else None

    @property
    def ttft_sent_s(self) -> float | None:
        return self.content_s[0] - self.sent_s if self.stream and self.content_s and self.sent_s is not None else None

    @property
    def tpot_s(self) -> float | None:
        if self.slow or not self.stream or not self.content_s or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.content_s[-1] - self.content_s[0]) / (self.output_tokens - 1)

    @property
    def chunk_gaps_s(self) -> list[float]:
        return [] if self.slow else [later - earlier for earlier, later in pairwise(self.content_s)]

    @property
    def max_gap_s(self) -> float | None:
        return max(self.chunk_gaps_s, default=None)

    @property
    def last_s(self) -> float | None:
        """The last content; of an answer without any (or not streamed), its end."""
        return self.content_s[-1] if self.content_s else self.end_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.slow or self.last_s is None else self.last_s - self.intended_s

    @property
    def e2e_sent_s(self) -> float | None:
        return None if self.slow or self.last_s is None or self.sent_s is None else self.last_s - self.sent_s

    @property
    def close_s(self) -> float | None:
        return None if self.slow or self.end_s is None or self.last_s is None else self.end_s - self.last_s


def _one(value: float | None) -> list[float]:
    return [] if value is None else [value]


METRICS: dict[str, Callable[[Record], list[float]]] = {
    "ttft": lambda record: _one(record.ttft_s),  # intended start to first content, reasoning or tool call; streams only
    "ttft_sent": lambda record: _one(record.ttft_sent_s),  # the same from the sent instant
    "tpot": lambda record: _one(record.tpot_s),  # (last - first content) / (output tokens - 1)
    "chunk_gap": lambda record: record.chunk_gaps_s,  # between arrivals of content, pooled over requests
    "max_gap": lambda record: _one(record.max_gap_s),  # the longest stall of each request
    "e2e": lambda record: _one(record.e2e_s),  # intended start to last content
    "e2e_sent": lambda record: _one(record.e2e_sent_s),
    "lag": lambda record: _one(record.lag_s),  # sent after the intended start, by our own fault
    "queue": lambda record: _one(record.queue_s),  # as the gateway reports
    "load": lambda record: _one(record.load_s),  # as the gateway reports
    "overhead": lambda record: _one(record.overhead_s),  # as the gateway reports
    "close": lambda record: _one(record.close_s),  # last content to the end of the answer
}

ONE_A_REQUEST = tuple(metric for metric in METRICS if metric != "chunk_gap")


@dataclass(frozen=True)
class Health:
    """How well the generator itself did, over the measured phases."""

    send_lag_p99_s: float
    loop_lag_p99_s: float
    cpu_share: float
    offered: int
    scheduled: int
    faults: tuple[str, ...]  # empty: healthy


@dataclass(frozen=True)
class Run:
    """Everything a report is drawn from."""

    scenario: Mapping[str, Any]  # as read, without keys
    url: str
    started_at: str  # UTC, ISO 8601
    interrupted: bool
    models: Mapping[str, tuple[str, ...]]
    windows: tuple[PhaseWindow, ...]
    health: Health
    environment: Mapping[str, Any]
    records: tuple[Record, ...]
    events: tuple[Mark, ...] = ()
    samples: tuple[Sample, ...] = ()
    calibration: Mapping[str, Any] | None = None  # the generator's own error on its machine, where it was measured


def write_run(path: Path, run: Run) -> None:
    """Derived times are written beside the raw ones for whoever reads the file with other tools."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "records": len(run.records),
        **{f.name: getattr(run, f.name) for f in fields(run) if f.name != "records"},
    }
    with path.open("wb") as file:
        file.write(orjson.dumps(header) + b"\n")
        for record in run.records:
            derived = {f"{name}_s": round(v[0], 6) for name in ONE_A_REQUEST if (v := METRICS[name](record))}
            raw = {name: getattr(record, name) for name in _RECORD_FIELDS}
            raw["content_s"] = [round(instant, 6) for instant in record.content_s]
            file.write(orjson.dumps(derived | raw) + b"\n")


def read_run(path: Path) -> Run:
    """Raises RecordError when the file is missing, of another format or version, or cut short."""
    try:
        lines = path.read_bytes().splitlines()
        header = orjson.loads(lines[0]) if lines else {}
        if header.get("format") != FORMAT:
            raise RecordError(f"{path} holds no load test records (its first line is no {FORMAT} header).")
        if header["version"] not in READABLE:
            raise RecordError(f"{path} has version {header['version']}; this Lorikeet reads up to version {VERSION}.")
        if len(lines) - 1 != header.get("records", len(lines) - 1):  # files of before do not say how many
            raise RecordError(f"{path} is cut short: it holds {len(lines) - 1} of {header['records']} records.")
        return Run(
            scenario=header["scenario"],
            url=header["url"],
            started_at=header["started_at"],
            interrupted=header["interrupted"],
            models={tenant: tuple(names) for tenant, names in header["models"].items()},
            windows=tuple(PhaseWindow(**window) for window in header["windows"]),
            health=Health(**{**header["health"], "faults": tuple(header["health"]["faults"])}),
            environment=header["environment"],
            records=tuple(_record(orjson.loads(line)) for line in lines[1:]),
            events=tuple(Mark(**mark) for mark in header.get("events", ())),
            samples=tuple(Sample(**sample) for sample in header.get("samples", ())),
            calibration=header.get("calibration"),
        )
    except OSError as exc:
        raise RecordError(
            f"{path} cannot be read: {exc.strerror or exc}. Give the folder a run was written to."
        ) from exc
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as exc:
        raise RecordError(f"{path} is damaged: {exc}") from exc


_RECORD_FIELDS = tuple(f.name for f in fields(Record))


def _record(line: dict[str, Any]) -> Record:
    record = Record(**{name: line[name] for name in _RECORD_FIELDS if name in line})
    record.outcome = Outcome(record.outcome)
    return record
