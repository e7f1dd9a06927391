"""How far our own figures are off on this machine: a load test of a server whose every answer was drawn beforehand.

What each request should have got is known exactly, so the error of a percentile is no matter of sampling. The server also
stands still for two seconds, the case in which a load generator that waits for answers reports nonsense.
"""

import datetime
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from loadtests.errors import LoadTestError
from loadtests.known_server import CHUNKS, MODEL, draw_offsets_s, key_of, row_of
from loadtests.live import LiveView
from loadtests.record import Outcome, Run
from loadtests.scenario import Scenario
from loadtests.session import SCHEDULE, describe_environment, measure
from loadtests.stats import nearest_rank
from loadtests.summary import Summary

FORMAT, VERSION = "lorikeet.loadtest.calibration", 1
FILE = "calibration.json"
BARS = {"plain": 0.02, "freeze": 0.10}  # largest error of any figure
CHUNK_OF = {"ttft": 0, "e2e": -1}  # the chunk at which each metric ends
PERCENTS = (50.0, 95.0, 99.0)
WARM_UP_S = 1.0
FREEZE_S = 2.0
FREEZE_AT_SHARE = 0.4  # of the measured phase: late enough to be steady, early enough to drain

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Served:
    """One request as the known server had it; instants on the clock that all processes share."""

    read_s: float
    written_s: tuple[float, ...]  # of each chunk


@dataclass(frozen=True)
class ServerLog:
    served: Mapping[int, Served]  # by key
    frozen: tuple[float, float] | None  # from, to

    def lateness_s(self) -> Floats:
        """Of each chunk of whole answers: how long after it was due it was written."""
        chunks = max((len(served.written_s) for served in self.served.values()), default=1)
        whole = {key: served for key, served in self.served.items() if len(served.written_s) == chunks}
        offsets_s = draw_offsets_s(chunks)[[row_of(key) for key in whole]]
        due = due_s(np.array([served.read_s for served in whole.values()]), offsets_s, self.frozen)
        written = np.array([served.written_s for served in whole.values()])
        return np.asarray((written - due).ravel(), dtype=np.float64)


class KnownServerProcess:
    """A running known server."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.pid = process.pid
        self.url = f"http://127.0.0.1:{port}"
        self._process = process

    def stop(self) -> ServerLog:
        """End it by closing its standard input, and read what it did."""
        printed, _ = self._process.communicate()
        log = orjson.loads(printed)
        served = {request["key"]: Served(request["read_s"], tuple(request["written_s"])) for request in log["requests"]}
        return ServerLog(served, None if log["frozen"] is None else (log["frozen"][0], log["frozen"][1]))


@contextmanager
def known_server(
    *, chunks: int = CHUNKS, freeze_after_s: float = 0.0, freeze_s: float = 0.0
) -> Iterator[KnownServerProcess]:
    """A known server in a process of its own. Raises LoadTestError when it does not start."""
    command = [sys.executable, "-m", "loadtests.known_server", "--chunks", str(chunks)]
    command += ["--freeze-after-s", str(freeze_after_s), "--freeze-s", str(freeze_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None  # noqa: S101  it is a pipe
            if not (first_line := process.stdout.readline()):
                raise LoadTestError("The built-in server did not start; its message stands above.")
            yield KnownServerProcess(process, int(first_line))
        finally:
            if process.poll() is None:
                process.kill()


def due_s(starts_s: Floats, offsets_s: Floats, frozen: tuple[float, float] | None) -> Floats:
    """When each chunk should have come, [requests, chunks], on the clock of starts_s.

    starts_s: [requests], intended starts. offsets_s: [requests, chunks], drawn seconds to each chunk. A frozen server sees a
    request that came meanwhile, and writes a chunk that fell due meanwhile, as it thaws.
    """
    if frozen is None:
        return starts_s[:, np.newaxis] + offsets_s
    due = _thawed(starts_s, frozen)[:, np.newaxis] + offsets_s
    return _thawed(due, frozen)


def _thawed(instants_s: Floats, frozen: tuple[float, float]) -> Floats:
    begin_s, end_s = frozen
    return np.where((instants_s >= begin_s) & (instants_s < end_s), end_s, instants_s)


@dataclass(frozen=True)
class Figure:
    """A percentile as it should be, and as we report it."""

    metric: str
    percent: float
    known_s: float
    measured_s: float | None

    @property
    def error(self) -> float:
        """0.01: one percent too high."""
        return math.inf if self.measured_s is None else self.measured_s / self.known_s - 1


@dataclass(frozen=True)
class Case:
    """One run against the known server."""

    kind: str  # plain, freeze
    rate_per_s: float
    requests: int
    not_ok: int
    figures: tuple[Figure, ...]
    send_lag_p99_s: float
    loop_lag_p99_s: float
    cpu_share: float  # of one core
    server_late_p99_s: float  # chunks written after they were due

    @property
    def worst_error(self) -> float:
        return max(abs(figure.error) for figure in self.figures)

    @property
    def within_bar(self) -> bool:
        return not self.not_ok and self.worst_error <= BARS[self.kind]


def scenario_of(rate_per_s: float, duration_s: float) -> Scenario:
    return Scenario.model_validate(
        {
            "name": "calibration",
            "adapters": [MODEL],
            "load": {"kind": "poisson", "rate_per_s": rate_per_s},
            "phases": [
                {"name": "warm-up", "duration_s": WARM_UP_S, "measured": False},
                {"name": "steady", "duration_s": duration_s},
            ],
        }
    )


async def run_case(kind: str, rate_per_s: float, duration_s: float, *, view: LiveView | None = None) -> Case:
    """Raises LoadTestError when the server does not start, or the run is interrupted."""
    freeze_after_s, freeze_s = WARM_UP_S + FREEZE_AT_SHARE * duration_s, FREEZE_S if kind == "freeze" else 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        known_server(freeze_after_s=freeze_after_s, freeze_s=freeze_s) as server,
    ):
        out = Path(folder)
        run, summary = await measure(scenario_of(rate_per_s, duration_s), server.url, {}, out, view=view)
        if run.interrupted:
            raise LoadTestError("Interrupted; the earlier calibration, if any, is kept.")
        return compare_with_known(kind, rate_per_s, run, summary, keys_of(out / SCHEDULE), server.stop())


def keys_of(schedule: Path) -> dict[str, int]:
    """The server's key of each planned request, by the request's name."""
    planned = (orjson.loads(line) for line in schedule.read_bytes().splitlines())
    return {request["id"]: key_of(request["prompt"]) for request in planned}


def compare_with_known(
    kind: str, rate_per_s: float, run: Run, summary: Summary, keys: Mapping[str, int], log: ServerLog
) -> Case:
    """Pure. keys: the server's key of each request."""
    measured = {window.name for window in run.windows if window.measured}
    records = [record for record in run.records if record.phase in measured]
    starts_s = np.array([record.intended_s for record in records]) + began_s(run, keys, log)
    offsets_s = draw_offsets_s()[[row_of(keys[record.id]) for record in records]]
    due = due_s(starts_s, offsets_s, log.frozen)
    figures = []
    for metric, chunk in CHUNK_OF.items():
        known_s = np.sort(due[:, chunk] - starts_s)
        reported = summary.overall.metrics.get(metric)
        for percent in PERCENTS:
            estimate = reported.percentile(percent) if reported else None
            value = estimate.value if estimate else None
            figures.append(Figure(metric, percent, nearest_rank(known_s, percent), value))
    return Case(
        kind=kind,
        rate_per_s=rate_per_s,
        requests=len(records),
        not_ok=sum(record.outcome is not Outcome.OK for record in records),
        figures=tuple(figures),
        send_lag_p99_s=run.health.send_lag_p99_s,
        loop_lag_p99_s=run.health.loop_lag_p99_s,
        cpu_share=run.health.cpu_share,
        server_late_p99_s=nearest_rank(np.sort(log.lateness_s()), 99),
    )


def began_s(run: Run, keys: Mapping[str, int], log: ServerLog) -> float:
    """When the run's clock began, on the server's: the request that was read soonest tells, to the 0.1 ms it took."""
    pairs = [(log.served.get(keys[record.id]), record.sent_s) for record in run.records]
    delays_s = [served.read_s - sent_s for served, sent_s in pairs if served is not None and sent_s is not None]
    if not delays_s:
        raise LoadTestError("None of the requests reached the built-in server.")
    return min(delays_s)


async def calibrate(
    rates_per_s: Sequence[float], duration_s: float, *, view: Callable[[], LiveView | None] = lambda: None
) -> dict[str, Any]:
    """Every rate, plain and with the freeze; what calibration.json holds. Raises LoadTestError."""
    cases = [await run_case(kind, rate_per_s, duration_s, view=view()) for rate_per_s in rates_per_s for kind in BARS]
    return {
        "format": FORMAT,
        "version": VERSION,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(),
        "duration_s": duration_s,
        "chunks": CHUNKS,
        "bars": BARS,
        "within_bars": all(case.within_bar for case in cases),
        "worst_error": {kind: max(case.worst_error for case in cases if case.kind == kind) for kind in BARS},
        "cases": [case_json(case) for case in cases],
    }


def case_json(case: Case) -> dict[str, Any]:
    figures = [asdict(figure) | {"error": figure.error} for figure in case.figures]
    return asdict(case) | {"figures": figures, "worst_error": case.worst_error, "within_bar": case.within_bar}


def save_calibration(home: Path, calibration: Mapping[str, Any]) -> Path:
    """home: LORIKEET_HOME."""
    path = home / "loadtests" / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(calibration, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    return path


def latest_calibration(home: Path) -> Mapping[str, Any] | None:
    """The one kept under LORIKEET_HOME; None where there is none that this version can read."""
    try:
        kept = orjson.loads((home / "loadtests" / FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    known = isinstance(kept, dict) and (kept.get("format"), kept.get("version")) == (FORMAT, VERSION)
    return kept if known else None
