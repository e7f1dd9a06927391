"""Half an hour of everything at once on the real engine: what is left over, lost, or grows?

    python -m benchmarks.soak

Mixed traffic of six adapters and the base model, streamed and whole, a fifth of it cancelled by its callers, some read slowly;
the engine is killed every five minutes. In the end: every answered request has its ledger row once, nothing is in flight,
waiting or leased, and the gateway's memory has a slope.
"""

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import sqlalchemy as sa
import yaml
from rich.console import Console

from adapters.database import open_database, reading
from adapters.home import Home
from adapters.models import UsageRow
from benchmarks.common import events_happened, save
from benchmarks.load_tools import command_line
from loadtests.record import Outcome, read_run
from scripts.installation import Installation, empty_root
from tests.factories import make_adapter

PORT = 8084
ADAPTERS = 6
SETTLE_S = 45.0  # after the last request
SAMPLE_S = 5.0
WARM_SHARE = 0.2  # of the time, not looked at for the slope: caches fill, engines start

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--kill-every", type=float, default=300, metavar="SECONDS")
    given = parser.parse_args()
    own = Installation(empty_root("soak"), PORT, console)
    with own.stopped_at_the_end():
        own.ask("up")
        own.add_tenant("acme")
        base = next(path.parent for path in (own.root / "models").glob("*/config.json"))
        for seed in range(ADAPTERS):
            folder = make_adapter(own.root / f"voice-{seed}", base, rank=8, alpha=16, seed=seed)
            own.ask("push", str(folder), "--name", f"voice-{seed}", tenant="acme")
        gateway = psutil.Process(json.loads((own.root / "run" / "gateway.pid").read_text())["pid"])
        memory = Memory(gateway)
        out = load(own, given.minutes * 60, given.rate, given.kill_every)
        time.sleep(SETTLE_S)
        found = leftovers(own) | ledger(own, out) | {"memory": memory.end()}
    found |= {"rate_per_s": given.rate, "minutes": given.minutes, "kill_every_s": given.kill_every}
    path = save("soak", {"command": command_line("benchmarks.soak", given), **found})
    shown = {name: value for name, value in found.items() if name != "memory"}
    console.print(
        shown, {name: value for name, value in found["memory"].items() if name != "samples"}, f"Raw figures: {path}"
    )


class Memory:
    """Samples a process's resident memory until `end`."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            mib = self._process.memory_info().rss / 2**20
            self._samples.append((round(time.monotonic() - self._began, 1), round(mib, 2)))

    def end(self) -> dict[str, Any]:
        self._stop.set()
        self._thread.join()
        at_s, mib = np.array(self._samples).T
        late = at_s >= WARM_SHARE * at_s[-1]
        slope = np.polyfit(at_s[late] / 3600, mib[late], 1)[0]
        return {
            "mib_an_hour": round(float(slope), 2),
            "first_mib": mib[0],
            "last_mib": mib[-1],
            "samples": self._samples,
        }


def load(own: Installation, seconds: float, rate: float, kill_every_s: float) -> Path:
    kill = {
        "at_s": kill_every_s / 2,
        "every_s": kill_every_s,
        "name": "kill",
        "run": ["python", "-m", "scripts.chaos", "kill"],
    }
    scenario = {
        "name": "soak",
        "requests": {
            "prompts": {"kind": "builtin"},
            "max_tokens": 24,
            "streaming_share": 0.7,
            "cancel": {"share": 0.2, "after_s": 0.5},
            "slow_readers": {"share": 0.1, "pause_s": 0.2},
        },
        "tenants": [{"name": "acme"}],
        "load": {"kind": "poisson", "rate_per_s": rate},
        "phases": [{"name": "soak", "duration_s": seconds, "events": [kill]}],
        "drain_s": 120,
        "health": {
            "send_lag_p99_ms": 2000,
            "loop_lag_p99_ms": 2000,
            "objective_share": 1,
            "cpu_share": 1,
            "offered_share": 0.5,
        },
    }
    path, out = own.root / "soak.yaml", own.root / "run-soak"
    path.write_text(yaml.safe_dump(scenario), encoding="utf-8")
    own.show("loadtest", "run", str(path), "--url", own.url, "--out", str(out), tenant="acme", ok=(0, 1, 3, 4))
    events_happened(out)
    return out


def leftovers(own: Installation) -> dict[str, Any]:
    """What every engine still works on or holds for somebody."""
    status = own.ask("status")
    text = httpx.get(f"{own.url}/metrics").text
    gauges = ("in_flight_requests", "waiting_requests", "leases", "claims")
    lines = [line for line in text.splitlines() if line.startswith(tuple(f"gateway_engine_{name}" for name in gauges))]
    return {
        "ready": status["ready"],
        "left": {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)},
    }


def ledger(own: Installation, out: Path) -> dict[str, Any]:
    """Rows against requests: each that reached the gateway has one, whoever left or died, and whole answers their tokens."""
    records = read_run(out / "records.jsonl").records
    asked = [one for one in records if one.sent_s is not None]
    never_arrived = sum(one.status is None and one.outcome is Outcome.FAILED for one in asked)
    whole = [one for one in asked if one.outcome is Outcome.OK]
    database = open_database(f"sqlite:///{Home(own.root).database}")
    with reading(database) as session:
        query = sa.select(UsageRow.outcome, sa.func.count(), sa.func.sum(UsageRow.output_tokens))
        rows = session.execute(query.where(UsageRow.tenant == "acme").group_by(UsageRow.outcome)).all()
    database.dispose()
    return {
        "kills": sum(event["name"] == "kill" for event in json.loads((out / "summary.json").read_text())["events"]),
        "requests": len(asked),
        "outcomes": {outcome.value: sum(one.outcome is outcome for one in asked) for outcome in Outcome},
        "never_arrived": never_arrived,
        "rows": {outcome: {"rows": count, "output_tokens": tokens} for outcome, count, tokens in rows},
        "lost_rows": len(asked) - never_arrived - sum(count for _, count, _ in rows),
        "output_tokens_of_whole_answers": sum(one.output_tokens or 0 for one in whole),
    }


if __name__ == "__main__":
    main()
