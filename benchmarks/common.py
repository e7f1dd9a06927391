"""What the benchmarks share: a streaming request that is timed, figures with their spread, and where results go."""

import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START_S = 240.0


@dataclass(frozen=True)
class Timing:
    """One streamed answer. Seconds."""

    ttft_s: float
    per_token_s: float  # mean gap between two events with text
    max_gap_s: float
    e2e_s: float
    tokens: int


async def timed_stream(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Timing:
    """Send one chat request and time its events. Raises RuntimeError when it fails or does not finish."""
    sent = time.perf_counter()
    stamps: list[float] = []
    finished = False
    async with session.post(url, json=dict(body), headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if b'"error":{' in line:
                raise RuntimeError(line.decode())
            finished |= b'"finish_reason":"' in line
            if b'"content":"' in line and b'"content":""' not in line:
                stamps.append(now)
    if not finished or not stamps:
        raise RuntimeError("the stream ended without a finish reason")
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    return Timing(
        ttft_s=stamps[0] - sent,
        per_token_s=statistics.fmean(gaps) if gaps else 0.0,
        max_gap_s=max(gaps, default=0.0),
        e2e_s=time.perf_counter() - sent,
        tokens=len(stamps),
    )


def prompt(seed: int, words: int = 40) -> str:
    """Text no cache has seen: the seed stands in front."""
    rng = random.Random(seed)  # noqa: S311
    vocabulary = "river market engine letter garden signal winter bridge copper planet harbour lesson".split()
    return f"{seed}: " + " ".join(rng.choice(vocabulary) for _ in range(words))


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, int(np.ceil(share * len(ordered))) - 1)]


def interval(values: Sequence[float], statistic: Any = np.median, *, seed: int = 0) -> tuple[float, float, float]:
    """A statistic with its 95 % bootstrap interval."""
    data = np.asarray(values)
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.choice(data, len(data))) for _ in range(2000)]
    return float(statistic(data)), float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}


def save(name: str, document: Mapping[str, Any]) -> Path:
    """Write the raw figures, with when and on what they were measured."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    measured = {"measured_at": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()), "machine": machine()}
    path.write_text(json.dumps(measured | dict(document), indent=1, default=_plain) + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return asdict(value)
    raise TypeError(type(value))


def events_happened(run: Path) -> None:
    """What a load test was to do besides asking was done; else its figures are of something else. Raises RuntimeError."""
    events = json.loads((run / "summary.json").read_text(encoding="utf-8"))["events"]
    if failed := [
        f"{event['name']} at {event['start_s']:.0f} s: {event['error']}" for event in events if event["error"]
    ]:
        raise RuntimeError("\n".join(failed))


def lorikeet(*arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run a command of ours and read the JSON it prints. Raises CalledProcessError, its output shown."""
    command = ["lorikeet", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def first_tenant() -> str:
    name: str = lorikeet("tenants", "list")["data"][0]["name"]
    return name


@contextmanager
def temporary_key(*scopes: str) -> Iterator[str]:
    """A key of the first tenant, revoked at the end."""
    wanted = [part for scope in scopes for part in ("--scope", scope)]
    made = lorikeet("keys", "create", "--tenant", first_tenant(), *wanted, "--name", "benchmark")
    try:
        yield made["key"]
    finally:
        lorikeet("keys", "revoke", made["id"])


@contextmanager
def serving(
    command: Sequence[str], health: str, log: Path, *, environment: Mapping[str, str], core: int | None = None
) -> Iterator[psutil.Process]:
    """A server, from its first good answer at the URL `health`; ended with all it started. Raises RuntimeError with its log.

    core: the only processor it may use.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=dict(environment), cwd=ROOT, start_new_session=True
        )
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    try:
        ends_s = time.monotonic() + START_S
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(health, timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > ends_s:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
