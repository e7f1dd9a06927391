"""What the gateway protects: the same schedules on a bare vLLM and on Lorikeet, in turns, on the real engine.

    python -m benchmarks.protection

Both have the CPU profile with four LoRA slots, host memory for eight adapters, and the same thirty-two random adapters.
The bare one is what vLLM's own server gives to whoever knows its address: no tenants, every request at once.
- relay: three adapters at 70 % of the highest rate, what the gateway adds.
- set-N: N active adapters, Zipf, on either side of the four slots.
- neighbour: a tenant alone, and beside one that asks ten times as much.
- limited (Lorikeet only): the same with two requests in flight as the other's limit.
- occupied: a tenant alone, and beside one that asks four adapters, so all slots, as often as the engine can answer at most.
- churn (Lorikeet only): an upload and a moved alias every two seconds, against the same load in peace.
About forty-five minutes with the default rounds.
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common import events_happened, interval, percentile, save, serving
from benchmarks.load_tools import command_line
from gateway.engines.profile import PROFILES, engine_command, engine_environment, find_preloads, load_profile
from loadtests.record import Outcome, Record, read_run
from scripts.installation import Installation, empty_root
from tests.factories import make_adapter, zip_folder

PORT, BARE_PORT = 8086, 8085
PROFILE = {"slots": 4, "host_adapters": 8}
VOICES = [f"voice-{number:02}" for number in range(32)]
NOISE = [f"noise-{number}" for number in range(4)]
SWAP_S = 2
LOAD = 0.7  # of the highest rate
SETS = (4, 8, 16, 32)
PARTS = ("relay", "set", "neighbour", "limited", "occupied", "churn")
OURS_ONLY = ("limited", "churn")
NOISE_IN_FLIGHT = "2"
# Taken before it is sent: the next may begin before this one has been answered.
UPLOAD = """
cd "$LORIKEET_HOME/fresh"
next=$(ls | head -n 1)
mv "$next" ..
curl -sS --fail-with-body -H "Authorization: Bearer $LORIKEET_API_KEY" \\
  -F name=churn -F "file=@../$next" "$LORIKEET_URL/v1/adapters"
"""
console = Console(highlight=False)
SCOPES = ("ttft", "tpot", "e2e")
COLUMNS = ("phase", "tenant", "adapter", "outcome", "intended", *SCOPES)


@dataclass(frozen=True)
class System:
    """One of the two that are compared. keys: environment variables with each tenant's key."""

    name: str
    url: str
    keys: Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="of each measured phase")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="kept in a file of its own")
    given = parser.parse_args()
    root = empty_root("protection")
    profile = root / "profile.yaml"
    profile.write_text(yaml.safe_dump(yaml.safe_load((PROFILES / "cpu.yaml").read_text(encoding="utf-8")) | PROFILE))
    own = Installation(root, PORT, console, settings={"LORIKEET_ENGINE": str(profile)})
    with own.stopped_at_the_end():
        folders = prepare(own)
        ours = System("lorikeet", own.url, {f"LORIKEET_API_KEY_{name.upper()}": key for name, key in own.keys.items()})
        with bare_engine(root, profile, folders) as url:
            bare = System("vllm", url, dict.fromkeys(ours.keys, "none"))
            rate = LOAD * highest_rate(own, bare, root)
            console.print(f"{LOAD:.0%} of the highest rate: {rate:.2f} requests/s")
            plans = {name: plan for name, plan in planned(rate, given.seconds) if name.split("-")[0] in given.only}
            found: dict[str, dict[str, list[list[Record]]]] = {}
            for number in range(given.rounds):
                for name, plan in plans.items():
                    for system in (bare, ours) if name not in OURS_ONLY else (ours,):
                        console.print(f"round {number + 1}: {name} on {system.name}")
                        records = run(own, system, root, plan | {"name": name, "seed": number})
                        found.setdefault(name, {}).setdefault(system.name, []).append(records)
                keep(found, rate, given)


def keep(found: Mapping[str, Mapping[str, Sequence[Sequence[Record]]]], rate: float, given: argparse.Namespace) -> None:
    """After each round: whoever is interrupted loses one."""
    summary = {"rate_per_s": rate} | {name: summarise(name, systems) for name, systems in found.items()}
    raw = {name: {one: [plain(records) for records in runs] for one, runs in of.items()} for name, of in found.items()}
    every = len(given.only) == len(PARTS)
    name = "protection" if every else f"protection_{'_'.join(given.only)}"
    path = save(
        name,
        {
            "command": command_line("benchmarks.protection", given),
            "summary": summary,
            "columns": COLUMNS,
            "rounds": raw,
        },
    )
    console.print(table(summary), f"Raw figures: {path}")


def prepare(own: Installation) -> dict[str, Path]:
    """Tenants, and their adapters: acme's voices and churn, globex's noise. Folders of those that a bare engine has too."""
    own.ask("up")
    for tenant in ("acme", "globex"):
        own.add_tenant(tenant)
    base = next(path.parent for path in (own.root / "models").glob("*/config.json"))
    folders = {}
    for seed, name in enumerate([*VOICES, *NOISE]):
        folders[name] = make_adapter(own.root / name, base, rank=8, alpha=16, seed=seed)
        own.ask("push", str(folders[name]), "--name", name, tenant="globex" if name in NOISE else "acme")
    for seed in range(2):
        made = make_adapter(own.root / f"churn-{seed}", base, rank=8, alpha=16, seed=100 + seed)
        own.ask("push", str(made), "--name", "churn", tenant="acme")
    return folders


@contextmanager
def bare_engine(root: Path, profile_file: Path, folders: Mapping[str, Path]) -> Iterator[str]:
    """vLLM's own server with the same arguments, on a port instead of a socket, and the adapters loaded by name."""
    profile = load_profile(profile_file)
    model = next(path.parent for path in (root / "models").glob("*/config.json"))
    command = [str(part) for part in engine_command(profile, model=model.resolve(), socket=root / "unused.sock")]
    at = command.index("--uds")
    command[at : at + 2] = ["--host", "127.0.0.1", "--port", str(BARE_PORT)]
    environment = engine_environment(profile, os.environ, preload=find_preloads(profile))
    url = f"http://127.0.0.1:{BARE_PORT}"
    with serving(command, f"{url}/health", root / "bare.log", environment=environment):
        for name, folder in folders.items():
            body = {"lora_name": name, "lora_path": str(folder)}
            httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()
        yield url


def scenario(
    seconds: float, rate: float, adapters: Sequence[str], noise: Sequence[str] = NOISE[:1], **more: Any
) -> dict[str, Any]:
    return {
        "tenants": [
            {"name": "acme", "adapters": list(adapters)},
            {"name": "globex", "share": 0, "adapters": list(noise)},
        ],
        "popularity": {"kind": "zipf"},
        "requests": {"prompts": {"kind": "builtin"}, "max_tokens": 16},
        "load": {"kind": "poisson", "rate_per_s": rate},
        "phases": [
            {"name": "warm-up", "duration_s": 8, "measured": False},
            {"name": "measured", "duration_s": seconds},
        ],
        "drain_s": 90,
        "health": {
            "send_lag_p99_ms": 1000,
            "loop_lag_p99_ms": 1000,
            "objective_share": 1,
            "cpu_share": 1,
            "offered_share": 0.5,
        },
    } | more


def planned(rate: float, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    swap = [
        {
            "at_s": 1 + SWAP_S * number,
            "every_s": 2 * SWAP_S,
            "name": "promote",
            "request": {
                "path": "/v1/adapters/churn/promote",
                "tenant": "acme",
                "json": {"version": version, "force": True, "reason": "a benchmark of swaps"},
            },
        }
        for number, version in enumerate((1, 2))
    ]
    phases = [
        {"name": "warm-up", "duration_s": 8, "measured": False},
        {"name": "alone", "duration_s": seconds},
        {
            "name": "beside",
            "duration_s": seconds,
            "events": [*swap, {"at_s": 0.5, "every_s": SWAP_S, "name": "upload", "run": ["sh", "-c", UPLOAD]}],
        },
    ]
    yield "churn", scenario(seconds, rate / 2, [*VOICES[:2], "churn"], phases=phases)
    yield "relay", scenario(seconds, rate, VOICES[:3])
    for size in SETS:
        yield f"set-{size}", scenario(seconds, rate, VOICES[:size])
    victim = rate / 8  # asks little, hence twice the time
    most = rate / LOAD
    for name, noise, noise_rate in (
        ("neighbour", NOISE[:1], 10 * victim),
        ("limited", NOISE[:1], 10 * victim),
        ("occupied", NOISE, most),
    ):
        neighbour = {"tenant": "globex", "load": {"kind": "poisson", "rate_per_s": noise_rate}}
        phases = [
            {"name": "warm-up", "duration_s": 8, "measured": False},
            {"name": "alone", "duration_s": 2 * seconds},
            {"name": "beside", "duration_s": 2 * seconds, "neighbour": neighbour},
        ]
        yield name, scenario(seconds, victim, VOICES[:3], noise, phases=phases)


def make_fresh(own: Installation, count: int, seed: int) -> None:
    """Archives of adapters that nobody has uploaded before, for UPLOAD to take one at a time."""
    base = next(path.parent for path in (own.root / "models").glob("*/config.json"))
    folder = own.root / "fresh"
    folder.mkdir(exist_ok=True)
    for number in range(count):
        made = make_adapter(own.root / "made", base, rank=8, alpha=16, seed=1000 * (seed + 1) + number)
        (folder / f"{seed}-{number:03}.zip").write_bytes(zip_folder(made))


def run(own: Installation, system: System, root: Path, plan: dict[str, Any]) -> list[Record]:
    path, out = root / "scenario.yaml", root / "run"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    command = ["loadtest", "run", str(path), "--url", system.url, "--out", str(out)]
    before = dict(own.settings)
    own.settings.update(system.keys)
    if system.name == "lorikeet":
        limit = NOISE_IN_FLIGHT if plan["name"] == "limited" else "none"
        own.ask("limits", "set", "globex", "--max-in-flight", limit)
    if plan["name"] == "churn":
        make_fresh(own, int(plan["phases"][-1]["duration_s"] / SWAP_S) + 1, plan["seed"])
    try:
        own.show(*command, tenant="acme", ok=(0, 1, 3, 4))
    finally:
        own.settings.clear()
        own.settings.update(before)
    events_happened(out)
    return list(read_run(out / "records.jsonl").records)


def highest_rate(own: Installation, system: System, root: Path) -> float:
    """Requests a second that sixteen callers get who ask again at once."""
    load = {"kind": "closed", "concurrency": 16}
    records = run(own, system, root, scenario(25, 1, VOICES[:3], load=load, name="highest"))
    ends = [record.end_s for record in records if record.outcome is Outcome.OK and record.end_s is not None]
    return len(ends) / (max(ends) - min(ends))


def answered(records: Sequence[Record], phase: str) -> list[Record]:
    """acme's own: what a neighbour asks is not judged."""
    return [one for one in records if one.phase == phase and one.tenant == "acme" and one.outcome is Outcome.OK]


def p95(records: Sequence[Record], phase: str, metric: str) -> float:
    values = [getattr(one, f"{metric}_s") for one in answered(records, phase)]
    return percentile([value for value in values if value is not None], 0.95)


def good(records: Sequence[Record], phase: str, limit_s: float = 2.0) -> float:
    """Share of requests whose first token came within the limit."""
    asked = [one for one in records if one.phase == phase and one.tenant == "acme"]
    return sum(one.outcome is Outcome.OK and (one.ttft_s or np.inf) < limit_s for one in asked) / len(asked)


def summarise(name: str, systems: Mapping[str, Sequence[Sequence[Record]]]) -> dict[str, Any]:
    """P95 of each round in seconds, and the ratio that the comparison is about, its median over rounds with its range."""
    rows: dict[str, Any] = {}
    if name in ("neighbour", "occupied", *OURS_ONLY):
        for system, runs in systems.items():
            rows[system] = {
                metric: {
                    "alone_s": [p95(records, "alone", metric) for records in runs],
                    "beside_s": [p95(records, "beside", metric) for records in runs],
                    "ratio": interval([p95(one, "beside", metric) / p95(one, "alone", metric) for one in runs]),
                }
                for metric in SCOPES
            } | {
                "failed": sum(one.outcome is Outcome.FAILED for records in runs for one in records),
                "answered_by": sorted({one.served_by for records in runs for one in records} - {""}),
            }
        return rows
    for system, runs in systems.items():
        rows[system] = {metric: [p95(records, "measured", metric) for records in runs] for metric in SCOPES}
        rows[system]["good"] = [good(records, "measured") for records in runs]
        rows[system]["failed"] = sum(one.outcome is not Outcome.OK for records in runs for one in records)
    rows["ratio"] = {
        metric: interval(
            [ours / bare for ours, bare in zip(rows["lorikeet"][metric], rows["vllm"][metric], strict=True)]
        )
        for metric in SCOPES
    }
    return rows


def plain(records: Sequence[Record]) -> list[str]:
    """A line for each request, as COLUMNS says; seconds."""
    return [",".join(str(value) for value in row_of(one)) for one in records]


def row_of(one: Record) -> list[Any]:
    measured = [getattr(one, f"{metric}_s") for metric in SCOPES]
    times = ["" if value is None else round(value, 4) for value in (one.intended_s, *measured)]
    return [one.phase, one.tenant, one.adapter, one.outcome.value, *times]


def table(summary: Mapping[str, Any]) -> Table:
    shown = Table("comparison", "vLLM: P95 TTFT s", "Lorikeet: P95 TTFT s", "ratio TTFT", "ratio tpot", "ratio e2e")
    for name, rows in summary.items():
        if name == "rate_per_s":
            continue
        if "ratio" in rows:
            cells = [json.dumps([round(value, 2) for value in rows[one]["ttft"]]) for one in ("vllm", "lorikeet")]
            shown.add_row(name, *cells, *(f"{rows['ratio'][metric][0]:.2f}" for metric in SCOPES))
            continue
        for system, figures in rows.items():
            cells = [f"{np.median(figures['ttft'][one]):.2f} {one[:-2]}" for one in ("alone_s", "beside_s")]
            shown.add_row(f"{name}: {system}", *cells, *(f"{figures[metric]['ratio'][0]:.2f}" for metric in SCOPES))
    return shown


if __name__ == "__main__":
    main()
