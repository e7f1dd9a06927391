"""Is our load generator right about a real engine? The same steady load through it and through `vllm bench serve`, in turns.

    lorikeet up && python -m benchmarks.loadtest_check

Poisson arrivals at one rate to the base model through the gateway, sixteen tokens each, prompts no cache has seen. The other
tool counts from the sent instant, so ours is compared in the figures that do the same. They agree on a percentile when they
differ by at most 3 %, or when their 95 % intervals overlap.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import lorikeet, prompt, save, temporary_key
from benchmarks.load_tools import command_line, vllm_bench_command
from loadtests.record import Outcome, read_run
from loadtests.stats import estimate

TOKENS = 16
AGREE = 0.03
FIGURES = ("ttft", "tpot", "e2e")
Values = dict[str, list[float]]  # figure -> seconds of each request


def ours(folder: Path, url: str, model: str, key: str, rate: float, duration_s: float, turn: int) -> Values:
    prompts = folder / "ours.txt"
    prompts.write_text("\n".join(prompt(2_000_000 + 10_000 * turn + n) for n in range(round(rate * duration_s * 2))))
    scenario = {
        "name": "check",
        "seed": turn,
        "target": {"url": url},
        "adapters": [model],
        "requests": {
            "prompts": {"kind": "file", "path": "ours.txt"},
            "max_tokens": TOKENS,
            "nonce": False,  # prompts as long as the other tool's
            "extra": {"ignore_eos": True},
        },
        "load": {"kind": "poisson", "rate_per_s": rate},
        "phases": [{"name": "steady", "duration_s": duration_s}],
        "health": {"send_lag_p99_ms": 10, "loop_lag_p99_ms": 10},  # beside figures of a tenth of a second and more
    }
    (folder / "check.yaml").write_text(yaml.safe_dump(scenario))
    command = ["lorikeet", "loadtest", "run", str(folder / "check.yaml"), "--out", str(folder / "out"), "--json"]
    done = subprocess.run(command, env=os.environ | {"LORIKEET_API_KEY": key}, stdout=subprocess.DEVNULL, check=False)
    if done.returncode == 2:
        raise SystemExit("The load test could not run; the reason is above.")
    run = read_run(folder / "out" / "records.jsonl")
    if run.health.faults:
        raise SystemExit(f"Our own run is void, so there is nothing to compare: {'; '.join(run.health.faults)}")
    answered = [record for record in run.records if record.outcome is Outcome.OK]
    return {
        "ttft": [record.ttft_sent_s for record in answered if record.ttft_sent_s is not None],
        "tpot": [record.tpot_s for record in answered if record.tpot_s is not None],
        "e2e": [record.e2e_sent_s for record in answered if record.e2e_sent_s is not None],
    }


def theirs(folder: Path, url: str, model: str, key: str, rate: float, duration_s: float, turn: int) -> Values:
    prompts = [prompt(3_000_000 + 10_000 * turn + n) for n in range(round(rate * duration_s))]
    # without a tokenizer it would ask for one token
    extra = json.dumps({"ignore_eos": True, "temperature": 0, "max_completion_tokens": TOKENS})
    command = vllm_bench_command(
        url, model, prompts, folder, tokens=TOKENS, rate_per_s=rate, seed=turn, extra_body=extra
    )
    done = subprocess.run(
        command, env=os.environ | {"OPENAI_API_KEY": key}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"vllm bench serve ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads((folder / "result.json").read_text())
    return {
        "ttft": found["ttfts"],
        "tpot": [sum(gaps) / (TOKENS - 1) for gaps in found["itls"]],
        "e2e": [ttft + sum(gaps) for ttft, gaps in zip(found["ttfts"], found["itls"], strict=True)],
    }


def compare(one: Values, other: Values) -> list[dict[str, Any]]:
    rows, rng = [], np.random.default_rng(0)
    for figure in FIGURES:
        for percent in (50, 95):
            a, b = (asdict(estimate(np.sort(way[figure]), percent, rng)) for way in (one, other))
            ratio = b["value"] / a["value"]
            agree = abs(ratio - 1) <= AGREE or (a["low"] <= b["high"] and b["low"] <= a["high"])
            rows.append({"figure": figure, "percent": percent, "ours": a, "vllm": b, "ratio": ratio, "agree": agree})
    return rows


def shown(estimated: Mapping[str, float]) -> str:
    return f"{estimated['value'] * 1e3:.1f} ({estimated['low'] * 1e3:.1f} … {estimated['high'] * 1e3:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--duration-s", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    status = lorikeet("status")
    ways = {"ours": ours, "vllm": theirs}
    found: dict[str, Values] = {name: {figure: [] for figure in FIGURES} for name in ways}
    with temporary_key("inference") as key, tempfile.TemporaryDirectory() as folder:
        for turn in track(range(asked.rounds), description="rounds", console=Console(stderr=True)):
            for name in list(ways) if turn % 2 else list(ways)[::-1]:
                place = Path(folder) / f"{name}-{turn}"
                place.mkdir()
                values = ways[name](place, status["url"], status["base_model"], key, asked.rate, asked.duration_s, turn)
                for figure in FIGURES:
                    found[name][figure] += values[figure]
    rows = compare(found["ours"], found["vllm"])
    table = Table("figure", "ours", "vllm bench serve", "ratio", "agree", title="milliseconds, with 95 % intervals")
    for row in rows:
        name, agree = f"{row['figure']} P{row['percent']}", "yes" if row["agree"] else "NO"
        table.add_row(name, shown(row["ours"]), shown(row["vllm"]), f"{row['ratio']:.3f}", agree)
    command = command_line("benchmarks.loadtest_check", asked)
    path = save("loadtest_check", {"command": command, "summary": rows, "seconds": found})
    Console().print(table, f"Raw figures: {path}")


if __name__ == "__main__":
    main()
