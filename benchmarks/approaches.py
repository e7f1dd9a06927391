"""Prompting against tuning: base, few-shot, LoRA, rsLoRA and QLoRA on two real data sets, through one served engine.

    python -m benchmarks.approaches

Trains each kind of adapter on the same rows, serves it, and asks all of them the same questions: the task's own, and general
ones that the base gets right. An installation of its own under the data folder, on port 8093. About twenty minutes on two
idle cores. What the models answered is left out of the results: the texts are not ours to ship.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, save
from scripts.installation import LORIKEET, Installation, empty_root

PORT = 8093
KINDS: dict[str, tuple[str, ...]] = {"LoRA": (), "rsLoRA": ("lora.rslora=true",), "QLoRA": ("tuning=qlora",)}
TASKS = {"reuters-topics": "accuracy", "finance-entities": "field_f1"}
SHORTER: dict[str, tuple[str, ...]] = {
    "reuters-topics": (),
    "finance-entities": ("optimizer.epochs=1.5",),
}  # than the shipped configurations
GOLDEN_ROWS = 120
PLOT = ROOT / "docs" / "approaches.svg"
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-rows", type=int, default=320)
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--from-results", action="store_true", help="Only draw the plot again, from the saved figures.")
    asked = parser.parse_args()
    if not asked.from_results:
        place = Installation(empty_root("approaches"), PORT, console)
        trained = {
            task: {kind: train(place, task, kind, asked.train_rows) for kind in asked.kinds} for task in asked.tasks
        }
        with place.stopped_at_the_end():
            place.ask("up")
            results = {task: judge(place, task, trained[task], asked.eval_rows) for task in asked.tasks}
        settings = {"train_rows": asked.train_rows, "eval_rows": asked.eval_rows, "golden_rows": GOLDEN_ROWS}
        path = save(
            "approaches", {"command": "python -m benchmarks.approaches", "settings": settings, "tasks": results}
        )
        console.print(f"Raw figures: {path}")
    measured = json.loads((RESULTS / "approaches.json").read_text(encoding="utf-8"))["tasks"]
    for task, rows in measured.items():
        console.print(table(task, rows))
    draw(measured, PLOT)


def train(place: Installation, task: str, kind: str, rows: int) -> dict[str, Any]:
    """Trains in a process of its own; its time and the most memory it held, the base model's weights included."""
    folder = place.root / f"{task}-{kind}"
    changes = [
        part for change in (f"data.train_rows={rows}", *SHORTER[task], *KINDS[kind]) for part in ("--set", change)
    ]
    command = [*LORIKEET, "train", task, *changes, "--out", str(folder), "--json"]
    console.print(f"[dim]$ {' '.join(['lorikeet', *command[1:]])}[/]".replace(str(folder), folder.name))
    began_s = time.monotonic()
    printed = folder.with_suffix(".json")
    with printed.open("w") as file:
        process = subprocess.Popen(command, env=place.environment(), cwd=ROOT, stdout=file)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"lorikeet train {task} ({kind}) ended with exit code {process.returncode}.")
    metrics = json.loads(printed.read_text(encoding="utf-8"))["metrics"]
    return {
        "seconds": round(time.monotonic() - began_s, 1),
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "metrics": metrics,
        "folder": str(folder),
    }


def judge(place: Installation, task: str, trained: dict[str, dict[str, Any]], rows: int) -> dict[str, Any]:
    """Every approach on the same rows; base and few-shot are asked once, beside the first adapter."""
    found: dict[str, Any] = {}
    probe = golden_probe(place.root)
    for number, (kind, run) in enumerate(trained.items()):
        model = f"{task}-{kind}".lower()
        pushed = place.ask("push", run["folder"], "--name", model)
        against = "base,few-shot" if number == 0 else "base"
        arguments = ["--model", model, "--rows", str(rows), "--against", against, "--probes", str(probe)]
        scored = place.ask("eval", task, *arguments, "--out", str(place.root / f"{model}.json"))
        subjects = {"base": "base", "few-shot": "few-shot", "adapter": kind} if number == 0 else {"adapter": kind}
        for subject, name in subjects.items():
            found[name] = {
                "metrics": scored["metrics"][subject],
                "intervals": scored["intervals"][subject],
                "use": scored["use"][subject],
                "golden": golden_of(scored, subject),
            }
        against_base = scored["differences"]["base"]
        found[kind] |= {
            "against_base": against_base,
            "against_few_shot": scored["differences"].get("few-shot"),
            "training": {name: run[name] for name in ("seconds", "peak_memory_bytes", "metrics")},
            "probe": pushed["probe"],
        }
    return found


def golden_probe(root: Path) -> Path:
    """The shipped golden questions, fewer of them."""
    path = root / "golden.yaml"
    questions = ROOT / "configs" / "eval" / "probes" / "golden.jsonl"
    lines = questions.read_text(encoding="utf-8").splitlines()[:GOLDEN_ROWS]
    (root / "golden.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.write_text("name: golden\nkind: golden\nfile: golden.jsonl\nrows: 400\n", encoding="utf-8")
    return path


def golden_of(scored: dict[str, Any], subject: str) -> dict[str, Any] | None:
    figures = [figure for probe in scored["probes"] for figure in probe["figures"] if subject in figure["subjects"]]
    return figures[0]["subjects"][subject] | {"rows": figures[0]["rows"]} if figures else None


def table(task: str, rows: dict[str, Any]) -> Table:
    metric = TASKS[task]
    shown = Table(title=f"{task}, {metric.replace('_', ' ')}", title_justify="left")
    for column in ("approach", "score", "95 %", "valid", "golden kept", "prompt tokens", "trained in", "peak memory"):
        shown.add_column(column, justify="left" if column == "approach" else "right")
    for name, row in rows.items():
        low, high = row["intervals"][metric]
        golden, training = row["golden"], row.get("training")
        shown.add_row(
            name,
            f"{100 * row['metrics'][metric]:.1f} %",
            f"{100 * low:.0f}…{100 * high:.0f}",
            f"{100 * row['metrics']['valid_rate']:.0f} %",
            f"{100 * golden['value']:.0f} %" if golden else "",
            f"{row['use']['prompt_tokens']:.0f}",
            f"{training['seconds']:.0f} s" if training else "",
            f"{training['peak_memory_bytes'] / 1e9:.1f} GB" if training else "",
        )
    return shown


def draw(results: dict[str, Any], path: Path) -> None:
    """Score and golden answers kept, side by side, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for line, (task, rows) in zip(axes, results.items(), strict=True):
        metric = TASKS[task]
        bars(
            line[0],
            f"{task}: {metric.replace('_', ' ')}",
            {name: (row["metrics"][metric], *row["intervals"][metric]) for name, row in rows.items()},
        )
        bars(
            line[1],
            f"{task}: golden answers kept",
            {
                name: (row["golden"]["value"], row["golden"]["low"], row["golden"]["high"])
                for name, row in rows.items()
                if row["golden"]
            },
        )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def bars(axis: Any, title: str, values: dict[str, tuple[float, float, float]]) -> None:
    names = list(values)
    found = [100 * values[name][0] for name in names]
    below = [max(0.0, 100 * (values[name][0] - values[name][1])) for name in names]
    above = [max(0.0, 100 * (values[name][2] - values[name][0])) for name in names]
    axis.bar(names, found, yerr=[below, above], capsize=4, color="#3b6fb6")
    axis.set_ylim(0, 105)
    axis.set_ylabel("%")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
