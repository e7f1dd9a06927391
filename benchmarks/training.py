"""Training speed: `lorikeet train` against a plain TRL script (benchmarks/plain_trl.py), same data and settings, in turns.

    python -m benchmarks.training --rounds 4

Each run is a process of its own. Tokens per second are those of the optimizer steps after the first few, without loading,
evaluation and saving; beside it stands the time of the whole command. What came out is judged by one measure: the loss of the
answers' tokens on rows that neither saw. The losses that the two tell of are of different tokens: TRL's count the line break
that the template has after the end of a turn as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.home import home
from benchmarks.common import ROOT, interval, save
from trainer.data.catalog import load_dataset_spec
from trainer.data.chat import Row, read_rows, write_rows
from trainer.data.fetch import fetch_dataset
from trainer.data.splits import choose_rows
from trainer.examples import chat_features
from trainer.export import load_served, mean_loss
from trainer.plan import resolve_base
from trainer.template import load_renderer

WARM_STEPS = 3  # the first ones allocate, and compile what a library compiles
BATCH_ROWS = 4
SETTINGS = {"batch_rows": BATCH_ROWS, "learning_rate": 2e-4, "r": 8, "alpha": 16, "dropout": 0.05}
BAR = 0.97
HELD_OUT_ROWS = 64


def prepare(folder: Path, steps: int) -> tuple[dict[str, Any], list[Row]]:
    """Rows of a real data set in a file that both read, and the settings both keep; the rows neither reads."""
    base, _ = resolve_base("smollm2-135m-instruct", home().create())
    source = fetch_dataset(load_dataset_spec("reuters-r8"), home().datasets)
    rows = choose_rows(read_rows(source / "train.jsonl"), steps * BATCH_ROWS, balanced=True)
    write_rows(folder / "rows.jsonl", rows)
    held_out = choose_rows(read_rows(source / "eval.jsonl"), HELD_OUT_ROWS, balanced=True)
    write_rows(folder / "eval.jsonl", held_out[:4])
    settings = {**SETTINGS, "base": str(base), "rows": str(folder / "rows.jsonl"), "steps": steps}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    configuration = {
        "name": "speed",
        "base": str(base),
        "data": {"train": "rows.jsonl", "eval": "eval.jsonl", "licence": "MIT"},
        "lora": {"r": settings["r"], "alpha": settings["alpha"], "dropout": settings["dropout"]},
        "optimizer": {
            "learning_rate": settings["learning_rate"],
            "max_steps": steps,
            "batch_rows": settings["batch_rows"],
            "evaluations": 1,
        },
        "goldens": 0,
    }
    (folder / "speed.yaml").write_text(json.dumps(configuration), encoding="utf-8")
    return settings, held_out


def run_ours(folder: Path, number: int) -> dict[str, Any]:
    run, began = folder / f"ours-{number}", time.monotonic()
    _run(
        [sys.executable, "-m", "lorikeet", "train", str(folder / "speed.yaml"), "--into", str(run), "--processes", "1"]
    )
    whole_s = time.monotonic() - began
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [(each["tokens"], each["seconds"], each["loss"]) for each in lines if "loss" in each]
    return figures(steps, whole_s) | {"adapter": run / "adapter"}


def run_trl(folder: Path, number: int) -> dict[str, Any]:
    out, began = folder / f"trl-{number}.json", time.monotonic()
    _run([sys.executable, "-m", "benchmarks.plain_trl", str(folder / "settings.json"), str(out)])
    whole_s = time.monotonic() - began
    return figures(json.loads(out.read_text(encoding="utf-8"))["steps"], whole_s) | {"adapter": out.with_suffix("")}


def held_out_loss(base: Path, adapter: Path, rows: list[Row]) -> float:
    """Nats for each token of the answers and their ends, with the weights as they are served."""
    renderer = load_renderer(base)
    return mean_loss(load_served(base, adapter), [chat_features(renderer.render(row)) for row in rows])


def figures(steps: list[Any], whole_s: float) -> dict[str, Any]:
    """steps: (tokens so far, seconds, loss) at the end of each."""
    (tokens, seconds, _), (all_tokens, ended, _) = steps[WARM_STEPS - 1], steps[-1]
    speed = (all_tokens - tokens) / (ended - seconds)
    return {"tokens_per_s": speed, "tokens": all_tokens, "steps": len(steps), "whole_s": whole_s}


def _run(command: list[str]) -> None:
    """Raises RuntimeError with what it said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings, held_out = prepare(folder, options.steps)
        for number in track(range(options.rounds), description="rounds", console=Console(stderr=True)):
            ways = [("lorikeet", run_ours), ("trl", run_trl)]
            found = {name: run(folder, number) for name, run in (ways if number % 2 else ways[::-1])}
            for each in found.values():
                each["held_out_loss"] = held_out_loss(Path(settings["base"]), each.pop("adapter"), held_out)
            rounds.append(found)
    ratios = [each["lorikeet"]["tokens_per_s"] / each["trl"]["tokens_per_s"] for each in rounds]
    value, low, high = interval(ratios)
    summary: dict[str, Any] = {
        "tokens_per_s": {name: statistics.median(each[name]["tokens_per_s"] for each in rounds) for name in rounds[0]},
        "whole_s": {name: statistics.median(each[name]["whole_s"] for each in rounds) for name in rounds[0]},
        "held_out_loss": {
            name: statistics.median(each[name]["held_out_loss"] for each in rounds) for name in rounds[0]
        },
        "ratio": {"value": value, "low": low, "high": high, "min": min(ratios), "max": max(ratios)},
        "bar": BAR,
        "passed": value >= BAR,
    }
    kept = {name: value for name, value in settings.items() if name not in ("base", "rows")}
    document = {
        "command": f"python -m benchmarks.training --rounds {options.rounds} --steps {options.steps}",
        "settings": {**kept, "data": "reuters-r8, balanced", "base": "SmolLM2-135M-Instruct", "precision": "bf16"},
        "summary": summary,
        "rounds": rounds,
    }
    path = save("training", document)
    table = Table("", "lorikeet", "plain TRL", title="median over rounds")
    for figure in ("tokens_per_s", "whole_s", "held_out_loss"):
        table.add_row(figure, *(f"{summary[figure][name]:.3g}" for name in ("lorikeet", "trl")))
    console = Console()
    console.print(table)
    console.print(f"ratio {value:.3f} ({low:.3f} … {high:.3f}), bar {BAR}. Raw figures: {path}")


if __name__ == "__main__":
    main()
