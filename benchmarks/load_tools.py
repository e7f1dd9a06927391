"""The load generators that are compared: each run as its users run it, against the built-in server whose answers are known.

ours         `lorikeet loadtest run`, Poisson arrivals
vllm         `vllm bench serve`, Poisson arrivals, no cap on concurrency
locust       FastHttpUser in a closed loop: as many users as keep the rate up when all is well
locust-paced FastHttpUser with constant_throughput(1), one user for each request a second: what its documentation says

locust does not know tokens; the user below times the first and the last content line it reads, and cheaply: it parses no JSON.
The server, and ours as always, ask for real-time scheduling; on a quiet machine that decides little.
"""

import argparse
import csv
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import yaml
from numpy.typing import NDArray

from loadtests.calibration import CHUNK_OF, PERCENTS, ServerLog, began_s, due_s, keys_of, known_server
from loadtests.errors import LoadTestError
from loadtests.known_server import CHUNKS, MODEL, draw_offsets_s, key_of, row_of
from loadtests.record import read_run
from loadtests.stats import percentile_of

LOCUST = "locust==2.47.0"
WARM_UP_S = 1.0
SETTLED_S = 1.0  # lag is judged from here on: opening the first connections is not what is compared
FREEZE_S = 2.0
SAMPLE_S = 0.05
SEED = 7

# `vllm bench serve` itself refuses to start from the CPU build of the package, which has another name.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""

LOCUSTFILE = """
import itertools
import os
import time

from locust import FastHttpUser, constant, constant_throughput, events, task


class Caller(FastHttpUser):
    wait_time = constant_throughput(1) if os.environ["PACED"] == "1" else constant(0)
    numbers = itertools.count()

    def on_start(self):
        self.number = next(self.numbers)
        self.asked = 0

    @task
    def ask(self):
        text = f"caller {self.number} question {self.asked}"
        self.asked += 1
        body = {"model": "known", "messages": [{"role": "user", "content": text}], "max_tokens": 64, "stream": True}
        first = last = None
        began = time.perf_counter()
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True, name="head") as answer:
            if answer.status_code != 200:
                return
            while line := answer.stream.readline(b"\\n"):
                if b'"content"' in line:
                    last = time.perf_counter()
                    first = first or last
        for name, at in (("ttft", first), ("e2e", last)):
            took = (at - began) * 1000
            events.request.fire(request_type="known", name=name, response_time=took, response_length=0, exception=None)
"""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """What is asked of a tool."""

    rate_per_s: float
    duration_s: float
    frozen: bool = False
    chunks: int = CHUNKS


@dataclass(frozen=True)
class Report:
    """What a tool said, and which requests it meant to send when (on the server's clock)."""

    figures_s: Mapping[tuple[str, float], float]  # (metric, percent), as the tool prints them
    keys: Sequence[int]
    starts_s: Floats
    keeps_schedule: bool = True  # False: a closed loop; starts_s is what an open loop would have been


class Tool(Protocol):
    """One way to measure."""

    name: str
    interpolates: bool  # percentiles between two values; else nearest rank

    def command(self, url: str, load: Load, folder: Path) -> list[str]: ...

    def read(self, load: Load, folder: Path, log: ServerLog) -> Report: ...


class Ours:
    name, interpolates = "ours", False

    def command(self, url: str, load: Load, folder: Path) -> list[str]:
        scenario = {
            "name": "ours",
            "adapters": [MODEL],
            "load": {"kind": "poisson", "rate_per_s": load.rate_per_s},
            "phases": [
                {"name": "warm-up", "duration_s": WARM_UP_S, "measured": False},
                {"name": "steady", "duration_s": load.duration_s},
            ],
        }
        (folder / "scenario.yaml").write_text(yaml.safe_dump(scenario))
        command = [sys.executable, "-m", "lorikeet", "loadtest", "run", str(folder / "scenario.yaml")]
        return [*command, "--url", url, "--out", str(folder / "out"), "--json"]

    def read(self, load: Load, folder: Path, log: ServerLog) -> Report:
        run = read_run(folder / "out" / "records.jsonl")
        keys = keys_of(folder / "out" / "schedule.jsonl")
        records = [record for record in run.records if record.phase == "steady"]
        metrics = json.loads((folder / "out" / "summary.json").read_text())["groups"][0]["metrics_s"]
        return Report(
            {(m, p): metrics[m][f"p{p:g}"]["value"] for m, p in itertools.product(CHUNK_OF, PERCENTS)},
            [keys[record.id] for record in records],
            np.array([record.intended_s for record in records]) + began_s(run, keys, log),
        )


def vllm_bench_command(
    url: str,
    model: str,
    prompts: Sequence[str],
    folder: Path,
    *,
    tokens: int,
    rate_per_s: float,
    seed: int,
    **more: str,
) -> list[str]:
    """A Poisson run of `vllm bench serve` that leaves folder/result.json with every request."""
    rows = [json.dumps({"prompt": prompt, "output_tokens": tokens}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    options = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "base-url": url,
        "model": model,
        "dataset-name": "custom",
        "dataset-path": str(folder / "prompts.jsonl"),
        "num-prompts": str(len(prompts)),
        "request-rate": str(rate_per_s),
        "seed": str(seed),
        "result-dir": str(folder),
        "result-filename": "result.json",
    } | {name.replace("_", "-"): value for name, value in more.items()}
    flags = (
        "skip-tokenizer-init",
        "skip-chat-template",
        "disable-shuffle",
        "disable-tqdm",
        "save-result",
        "save-detailed",
    )
    command = [sys.executable, "-c", VLLM_BENCH]
    return command + [f"--{name}={value}" for name, value in options.items()] + [f"--{flag}" for flag in flags]


class VllmBench:
    name, interpolates = "vllm", True

    def command(self, url: str, load: Load, folder: Path) -> list[str]:
        return vllm_bench_command(
            url, MODEL, self._prompts(load), folder, tokens=64, rate_per_s=load.rate_per_s, seed=SEED
        )

    def read(self, load: Load, folder: Path, log: ServerLog) -> Report:
        result = json.loads((folder / "result.json").read_text())
        delays_s = vllm_delays_s(load.rate_per_s, len(result["start_times"]), SEED)
        sent_s = np.array(result["start_times"])  # perf_counter, which is the shared clock on Linux
        # It prints no TTFT without a tokenizer, but keeps each request's; this is how it computes what it prints.
        values_s = {"ttft": result["ttfts"], "e2e": result["latencies"]}
        return Report(
            {(m, p): interpolated(np.array(values_s[m]), p) for m, p in itertools.product(CHUNK_OF, PERCENTS)},
            [key_of(prompt) for prompt in self._prompts(load)],
            delays_s + float((sent_s - delays_s).min()),
        )

    def _prompts(self, load: Load) -> list[str]:
        return [f"question {number}" for number in range(round(load.rate_per_s * load.duration_s))]


def vllm_delays_s(rate_per_s: float, count: int, seed: int) -> Floats:
    """The schedule that `vllm bench serve` draws, ahead of time, from its seed: Poisson, stretched to its nominal length."""
    gaps_s = np.random.RandomState(seed).gamma(1.0, 1.0 / rate_per_s, count)
    return np.asarray(np.cumsum(gaps_s) * (count / rate_per_s / gaps_s.sum()))


class Locust:
    interpolates = False

    def __init__(self, environment: Path, *, paced: bool) -> None:
        self.name = "locust-paced" if paced else "locust"
        self._locust = environment / "bin" / "locust"
        self._paced = paced

    def _users(self, load: Load) -> int:
        mean_s = float(draw_offsets_s(load.chunks)[:, -1].mean())
        return math.ceil(load.rate_per_s * (1.0 if self._paced else mean_s))

    def command(self, url: str, load: Load, folder: Path) -> list[str]:
        (folder / "locustfile.py").write_text(LOCUSTFILE)
        users = str(self._users(load))
        options = [
            "--headless",
            "--host",
            url,
            "--users",
            users,
            "--spawn-rate",
            users,
            "--run-time",
            f"{load.duration_s:g}s",
        ]
        files = ["--locustfile", str(folder / "locustfile.py"), "--csv", str(folder / "out")]
        paced = f"PACED={int(self._paced)}"
        return ["env", paced, str(self._locust), *options, *files, "--stop-timeout", "10", "--only-summary"]

    def read(self, load: Load, folder: Path, log: ServerLog) -> Report:
        with (folder / "out_stats.csv").open() as file:
            rows = {row["Name"]: row for row in csv.DictReader(file)}
        figures_s = {(m, p): float(rows[m][f"{p:g}%"]) / 1e3 for m, p in itertools.product(CHUNK_OF, PERCENTS)}
        if self._paced:
            keys, starts_s = paced_schedule(log, self._users(load), load.duration_s)
        else:
            keys, starts_s = even_schedule(log, load)
        return Report(figures_s, keys, starts_s, keeps_schedule=self._paced)


def paced_schedule(log: ServerLog, users: int, duration_s: float) -> tuple[list[int], Floats]:
    """Each user asks once a second from its first request on."""
    keys, starts_s = [], []
    for user in range(users):
        first = log.served.get(key_of(f"caller {user} question 0"))
        if first is not None:
            questions = range(math.ceil(duration_s))
            keys += [key_of(f"caller {user} question {question}") for question in questions]
            starts_s += [first.read_s + question for question in questions]
    return keys, np.array(starts_s)


def even_schedule(log: ServerLog, load: Load) -> tuple[list[int], Floats]:
    """What callers who do not wait for one another would have sent: the rate, evenly, with the same answers drawn.

    Without a freeze, exactly the requests that were sent.
    """
    read = sorted((served.read_s, key) for key, served in log.served.items())
    if not load.frozen:
        return [key for _, key in read], np.array([read_s for read_s, _ in read])
    count = round(load.rate_per_s * load.duration_s)
    keys = [key for _, key in itertools.islice(itertools.cycle(read), count)]
    return keys, read[0][0] + np.arange(count) / load.rate_per_s


@dataclass(frozen=True)
class Measurement:
    """One run of one tool."""

    tool: str
    load: Load
    requests: int  # that the server answered in full
    errors: Mapping[str, float]  # such as "ttft p95": reported / known - 1
    known_s: Mapping[str, float]
    reported_s: Mapping[str, float]
    answered_share: float | None  # of the schedule
    lag_p99_s: float | None  # read by the server after the intended start, once settled; None: no schedule, or a freeze
    cpu_s: float  # from the first request to the last chunk
    wall_s: float
    server_late_p99_s: float


class CpuMeter:
    """Processor time of a process over time, sampled from outside."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._at_s: list[float] = []
        self._used_s: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            try:
                times = self._process.cpu_times()
            except psutil.Error:
                return
            self._at_s.append(time.monotonic())
            self._used_s.append(times.user + times.system)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def used_s(self, begin_s: float, end_s: float) -> float:
        begin, end = np.interp([begin_s, end_s], self._at_s, self._used_s)
        return float(end - begin)


@dataclass
class Bench:
    """Runs tools. With cores given, the tool has the first to itself and the server the second."""

    cores: tuple[int, int] | None = None
    measurements: list[Measurement] = field(default_factory=list)

    def run(self, tool: Tool, load: Load) -> Measurement:
        """Raises RuntimeError when the tool fails."""
        freeze_after_s = WARM_UP_S + 0.4 * load.duration_s
        with (
            tempfile.TemporaryDirectory() as name,
            known_server(
                chunks=load.chunks, freeze_after_s=freeze_after_s, freeze_s=FREEZE_S if load.frozen else 0.0
            ) as server,
        ):
            folder = Path(name)
            if self.cores:
                os.sched_setaffinity(server.pid, {self.cores[1]})
            command = tool.command(server.url, load, folder)
            if self.cores:
                command = ["taskset", "--cpu-list", str(self.cores[0]), *command]
            with (folder / "output").open("w+") as output:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1]
                )
                meter = CpuMeter(process.pid)
                process.wait()
                meter.stop()
                log = server.stop()
                try:
                    measurement = compare(tool, load, tool.read(load, folder, log), log, meter)
                except (LoadTestError, OSError, KeyError, ValueError) as exc:
                    output.seek(0)
                    raise RuntimeError(f"{tool.name} ended with {process.returncode}: {output.read()[-2000:]}") from exc
        self.measurements.append(measurement)
        return measurement


def interpolated(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent))


def compare(tool: Tool, load: Load, report: Report, log: ServerLog, meter: CpuMeter) -> Measurement:
    """The tool's figures beside the known ones, in the tool's own way to take a percentile."""
    offsets_s = draw_offsets_s(load.chunks)[[row_of(key) for key in report.keys]]
    due = due_s(report.starts_s, offsets_s, log.frozen)
    take = interpolated if tool.interpolates else percentile_of
    known_s = {
        (metric, percent): take(due[:, chunk] - report.starts_s, percent)
        for (metric, chunk), percent in itertools.product(CHUNK_OF.items(), PERCENTS)
    }
    whole = [served for served in log.served.values() if len(served.written_s) == load.chunks]
    begin_s, end_s = min(served.read_s for served in whole), max(served.written_s[-1] for served in whole)
    lag_p99_s = answered_share = None
    if report.keeps_schedule and not load.frozen:
        settled = report.starts_s >= report.starts_s.min() + SETTLED_S
        asked = [key for key, keep in zip(report.keys, settled, strict=True) if keep]
        read_s = np.array([log.served[key].read_s if key in log.served else np.inf for key in asked])
        lag_p99_s = percentile_of(read_s - report.starts_s[settled], 99)
        answered_share = sum(key in log.served for key in report.keys) / len(report.keys)
    return Measurement(
        tool=tool.name,
        load=load,
        requests=len(whole),
        errors={_label(*which): report.figures_s[which] / known_s[which] - 1 for which in known_s},
        known_s={_label(*which): value for which, value in known_s.items()},
        reported_s={_label(*which): report.figures_s[which] for which in known_s},
        answered_share=answered_share,
        lag_p99_s=lag_p99_s,
        cpu_s=meter.used_s(begin_s, end_s),
        wall_s=end_s - begin_s,
        server_late_p99_s=percentile_of(log.lateness_s(), 99),
    )


def _label(metric: str, percent: float) -> str:
    return f"{metric} p{percent:g}"


def measurement_json(measurement: Measurement) -> dict[str, Any]:
    return asdict(measurement)


def locust_environment(given: Path | None) -> Path:
    """A virtual environment with locust: the one given, or one made once in the folder for temporary files."""
    if given is not None:
        return given
    folder = Path(tempfile.gettempdir()) / f"lorikeet-{LOCUST.replace('==', '-')}"
    if not (folder / "bin" / "locust").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", LOCUST], check=True)
    return folder


def chosen_tools(names: Sequence[str], environment: Path | None) -> list[Tool]:
    tools: list[Tool] = [Ours(), VllmBench()]
    if any(name.startswith("locust") for name in names):
        folder = locust_environment(environment)
        tools += [Locust(folder, paced=False), Locust(folder, paced=True)]
    return [tool for tool in tools if tool.name in names]


def command_line(module: str, asked: argparse.Namespace) -> str:
    """What to type for the same measurement; where things lie on this machine is left out."""
    kept = {name: value for name, value in vars(asked).items() if name not in ("locust_environment", "name")}
    texts = {name: value if isinstance(value, list | tuple) else [value] for name, value in kept.items()}
    options = [f"--{name.replace('_', '-')} {' '.join(map(str, values))}" for name, values in texts.items()]
    return " ".join([f"python -m {module}", *options])


TOOLS = ("ours", "vllm", "locust", "locust-paced")
