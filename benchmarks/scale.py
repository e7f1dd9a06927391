"""A thousand adapters of a hundred tenants: what they cost a gateway that has none, before the same echo engine.

    python -m benchmarks.scale

Start-up to ready, resident memory, the time to find what a model name means, and the latency of a request, in turns.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.home import Home
from adapters.registry import Registry, VersionStatus, load_secret, open_database
from benchmarks.common import interval, save
from benchmarks.gateway import CLIENT_CORE, closed_loop, free_port, lorikeet, running

TENANTS, EACH = 100, 10
LOOKUPS = 20_000


def fill(home: Home) -> None:
    """Ready versions that only the registry knows: nothing here ever loads one."""
    database = open_database(f"sqlite:///{home.database}")
    registry = Registry(database, secret=load_secret(home.secret))
    for tenant in track(range(TENANTS), description="tenants", console=Console(stderr=True)):
        name = f"tenant-{tenant:03}"
        registry.create_tenant(name)
        for number in range(EACH):
            digest = hashlib.sha256(f"{tenant}/{number}".encode()).hexdigest()
            adapter, files = f"adapter-{number}", {"adapter_model.safetensors": digest}
            version, _ = registry.add_version(
                name,
                adapter,
                digest=digest,
                size_bytes=9_800_000,
                rank=8,
                alpha=16,
                files=files,
            )
            registry.set_status(name, adapter, version.version, VersionStatus.READY)
    database.dispose()


def lookup_s(home: Home) -> float:
    """Seconds to find one name among all, as every request does."""
    from gateway.resolve import resolve

    database = open_database(f"sqlite:///{home.database}")
    snapshot = Registry(database, secret=b"").snapshot()
    database.dispose()
    names = [(tenant, name) for tenant, name in snapshot.adapters] or [("bench", "base")]
    began = time.perf_counter()
    for number in range(LOOKUPS):
        tenant, name = names[number % len(names)]
        resolve(name, tenant=tenant, snapshot=snapshot, base="", base_names=("base",))
    return (time.perf_counter() - began) / LOOKUPS


@contextmanager
def echo(folder: Path) -> Iterator[Path]:
    engine, port = folder / "engine.sock", free_port()
    command = [sys.executable, "-m", "benchmarks.echo_server", "--socket", str(engine), "--port", str(port)]
    with running("echo", command, port, folder, core=CLIENT_CORE, path="/health", environment={}):
        yield engine


def once(folder: Path, engine: Path, *, filled: bool) -> dict[str, float]:
    folder.mkdir()
    if filled:
        fill(Home(folder / "home").create())
    began = time.perf_counter()
    with lorikeet(engine, folder) as way:
        start_s = time.perf_counter() - began
        uvloop.run(closed_loop(way, 4, 1.0))
        found = uvloop.run(closed_loop(way, 1, 3.0))
        assert way.process is not None  # noqa: S101 - only the direct way has none
        memory = way.process.memory_info().rss
    return {
        "start_s": start_s,
        "resident_mib": memory / 2**20,
        "resolve_us": 1e6 * lookup_s(Home(folder / "home")),
        "p50_ms": 1000 * found["p50_s"],
        "p99_ms": 1000 * found["p99_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.sched_setaffinity(0, {CLIENT_CORE})
    found: dict[str, list[dict[str, float]]] = {"none": [], "a thousand": []}
    with tempfile.TemporaryDirectory() as text, echo(Path(text)) as engine:
        for number in range(rounds):
            for name, filled in (("none", False), ("a thousand", True)):
                found[name].append(once(Path(text) / f"{number}-{filled}", engine, filled=filled))
    summary = {
        name: {figure: interval([one[figure] for one in ones]) for figure in ones[0]} for name, ones in found.items()
    }
    path = save("scale", {"command": "python -m benchmarks.scale", "summary": summary, "rounds": found})
    shown = Table("adapters", *summary["none"])
    for name, row in summary.items():
        shown.add_row(name, *(f"{value:.3g} ({low:.3g} … {high:.3g})" for value, low, high in row.values()))
    Console().print(shown, f"Raw figures: {path}")


if __name__ == "__main__":
    main()
