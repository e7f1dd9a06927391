"""One adapter in every form it can be served in: the same load on each in turns, its memory, and its score on the task.

    python -m benchmarks.forms

Trains the topic sorter, then serves: the base; the adapter hot-swapped, alone and among eight active adapters; merged on an
engine of its own; merged and quantized on another. All engines run all the time, only one is asked at a time: the same number
of callers that are never idle, the same prompts, answers of the same length. `lorikeet compare-approaches` then tells what each
gets right, beside the prompted base and QLoRA. About half an hour on two idle cores.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from adapters.ladder import read_rungs
from benchmarks.common import RESULTS, ROOT, percentile, save
from benchmarks.load_tools import command_line
from gateway.engines.footprint import footprint
from loadtests.record import METRICS, Outcome, Record, read_run
from scripts.installation import Installation, empty_root
from tests.factories import make_adapter

PORT = 8094
TASK = "reuters-topics"
METRIC = "accuracy"
OTHERS = [f"voice-{number}" for number in range(7)]
FORMS = ("base", "hot-swapped", "hot-swapped, one of 8", "merged", "merged, quantized")
SHOWN = {"ttft": "first token", "chunk_gap": "between tokens", "e2e": "whole answer"}
SETTLE_S = 4
TRAINED = {"lora": "trained", "qlora": "trained-qlora"}
PLOT = ROOT / "docs" / "forms.svg"
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30, help="of each form in each round")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--train-rows", type=int, default=160)
    parser.add_argument("--eval-rows", type=int, default=60)
    parser.add_argument("--scheme", default="w8a8", help="of `lorikeet quantize`")
    parser.add_argument(
        "--made", type=Path, help="Folder of an earlier run: nothing is trained, merged, quantized again."
    )
    parser.add_argument("--from-results", action="store_true", help="Only draw the plot again, from the saved figures.")
    given = parser.parse_args()
    if not given.from_results:
        document = measure(given)
        console.print(f"Raw figures: {save('forms', {'command': command_line('benchmarks.forms', given)} | document)}")
    measured = json.loads((RESULTS / "forms.json").read_text(encoding="utf-8"))
    console.print(table(measured["forms"]))
    draw(measured["forms"], PLOT)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    own = Installation(empty_root("forms"), PORT, console)
    made: Path = given.made or own.root
    for tuning, name in () if given.made else TRAINED.items():
        rows = f"data.train_rows={given.train_rows}"
        own.show("train", TASK, "--set", rows, "--set", f"tuning={tuning}", "--out", str(made / name))
    with own.stopped_at_the_end():
        base = own.ask("up")["base_model"]
        own.add_tenant("acme")
        engines, models, rung = serve(own, made, base, given.scheme)
        records = run(own, models, given)
        memory = {name: memory_of(own.root / "run", engine) for name, engine in engines.items()}
        ways = compared(own, models, given.eval_rows)
    scores = {one["name"]: {"score": one["score"]} for one in ways["approaches"]}
    forms = {}
    for name in FORMS:
        rounds = [[one for one in records if one.phase == phase_of(name, number)] for number in range(given.rounds)]
        forms[name] = figures(rounds, given.seconds) | {"memory": memory[name]} | scores.get(name, {})
    return {"forms": forms, "ways": ways, "quantized": rung}


def serve(
    own: Installation, made: Path, base: str, scheme: str
) -> tuple[dict[str, str], dict[str, list[str]], dict[str, Any]]:
    """Each form's engine, the models that are asked for it, and how far the quantized one is from the merged."""
    folder = next(path.parent for path in (own.root / "models").glob("*/config.json"))
    for name in ("topics", "topics-small"):  # a version has one engine of its own
        own.ask("push", str(made / "trained"), "--name", name, tenant="acme")
    own.ask("push", str(made / "trained-qlora"), "--name", "topics-qlora", tenant="acme")
    for seed, name in enumerate(OTHERS):
        random = make_adapter(own.root / name, folder, rank=8, alpha=16, seed=seed)
        own.ask("push", str(random), "--name", name, tenant="acme")
    merged, small = made / "merged", made / "small"
    if not small.exists():
        shrink(own, made / "trained", merged, small, scheme)
    # The data are for research only, which the licences' gate would refuse.
    allowed = ["--share", "0", "--force", "--reason", "a benchmark on one's own machine"]
    one = own.ask("deploy", "acme/topics@1", "--merged", "--from", str(merged), *allowed)
    other = own.ask("deploy", "acme/topics-small@1", "--merged", "--from", str(small), *allowed)
    shared = dict.fromkeys(FORMS[:3], "engine-0")
    engines = shared | {"merged": one["engine"], "merged, quantized": other["engine"]}
    models = {
        "base": [base],
        "hot-swapped": ["topics"],
        "hot-swapped, one of 8": ["topics", *OTHERS],
        "merged": ["topics@1#merged"],
        "merged, quantized": ["topics-small@1#merged"],
    }
    (rung,) = (rung for rung in read_rungs(small) if rung.name.startswith("quantized"))
    return engines, models, rung.model_dump(mode="json")


def shrink(own: Installation, trained: Path, merged: Path, small: Path, scheme: str) -> None:
    """Merge and quantize. What the latter loses is one of the figures here, so it is kept whatever its limits say."""
    own.show("merge", str(trained), "--out", str(merged))
    calibrated = ["--data", str(own.root / "datasets" / "reuters-r8"), "--rows", "64", "--accept", "measured here"]
    own.show("quantize", str(merged), "--scheme", scheme, "--out", str(small), *calibrated)


def run(own: Installation, models: Mapping[str, Sequence[str]], given: argparse.Namespace) -> list[Record]:
    """All forms in each round, every other round backwards."""
    phases: list[dict[str, Any]] = [{"name": "warm-up", "duration_s": 10, "measured": False}]
    for number in range(given.rounds):
        for name in FORMS if number % 2 == 0 else FORMS[::-1]:
            only = {"adapters": list(models[name])}
            phases += [
                {"name": f"settle-{phase_of(name, number)}", "duration_s": SETTLE_S, "measured": False, **only},
                {"name": phase_of(name, number), "duration_s": given.seconds, **only},
            ]
    plan = {
        "name": "forms",
        "tenants": [{"name": "acme", "adapters": sorted({one for asked in models.values() for one in asked})}],
        "popularity": {"kind": "uniform"},
        "requests": {"prompts": {"kind": "builtin"}, "max_tokens": 32, "extra": {"ignore_eos": True}},
        "load": {"kind": "closed", "concurrency": given.concurrency},
        "phases": phases,
        "sample_floor": 1,
        "health": {"send_lag_p99_ms": 500, "loop_lag_p99_ms": 500, "objective_share": 1.0, "offered_share": 0.5},
    }
    path, out = own.root / "forms.yaml", own.root / "run-forms"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    own.settings["LORIKEET_API_KEY_ACME"] = own.keys["acme"]
    own.show("loadtest", "run", str(path), "--url", own.url, "--out", str(out), tenant="acme", ok=(0, 3))
    return list(read_run(out / "records.jsonl").records)


def phase_of(form: str, number: int) -> str:
    return f"{re.sub('[^a-z0-9]+', '-', form)}-{number}"


def figures(rounds: Sequence[Sequence[Record]], seconds: float) -> dict[str, Any]:
    """P50 and P95 in seconds over all rounds and of each, tokens a second of each."""
    answered = [[one for one in records if one.outcome is Outcome.OK] for records in rounds]

    def spread(metric: str, share: float) -> dict[str, Any]:
        values = [[value for one in records for value in METRICS[metric](one)] for records in answered]
        every = [value for group in values for value in group]
        return {"all": percentile(every, share), "rounds": [percentile(group, share) for group in values]}

    return {
        "requests": sum(map(len, rounds)),
        "answered": sum(map(len, answered)),
        "p50_s": {metric: spread(metric, 0.5) for metric in SHOWN},
        "p95_s": {metric: spread(metric, 0.95) for metric in SHOWN},
        "tokens_per_s": [sum(one.output_tokens or 0 for one in records) / seconds for records in answered],
    }


def memory_of(run_dir: Path, engine: str) -> dict[str, int]:
    found = footprint(run_dir, engine)
    if found is None:
        raise SystemExit(f"Engine {engine} does not run.")
    return {"pss_mib": found.pss_bytes >> 20}


def compared(own: Installation, models: Mapping[str, Sequence[str]], rows: int) -> dict[str, Any]:
    """Each way to solve the task, by `lorikeet compare-approaches`."""
    ways: list[dict[str, Any]] = [
        {"name": "base", "model": models["base"][0]},
        {"name": "few-shot", "model": models["base"][0], "shots": 8},
        {"name": "hot-swapped", "model": "topics"},
        {"name": "QLoRA, hot-swapped", "model": "topics-qlora"},
        *({"name": name, "model": models[name][0], "dedicated": True} for name in ("merged", "merged, quantized")),
    ]
    volume = {"requests_per_month": 1_000_000, "machine_per_hour": 0.1, "concurrency": 8}
    path = own.root / "ways.yaml"
    path.write_text(yaml.safe_dump({"eval": TASK, "rows": rows, "approaches": ways} | volume), encoding="utf-8")
    found = own.ask("compare-approaches", str(path), "--out", str(own.root / "ways"), tenant="acme")
    return {name: value for name, value in found.items() if name != "folder"}


def table(forms: Mapping[str, Any]) -> Table:
    shown = Table("form", *(f"{words} P50, P95" for words in SHOWN.values()), "tokens/s", "memory", METRIC)
    for name, found in forms.items():
        times = [
            f"{1000 * found['p50_s'][metric]['all']:.0f}, {1000 * found['p95_s'][metric]['all']:.0f} ms"
            for metric in SHOWN
        ]
        scored = f"{found['score']['value']:.0%}" if "score" in found else ""
        shown.add_row(
            name, *times, f"{np.median(found['tokens_per_s']):.0f}", f"{found['memory']['pss_mib']} MiB", scored
        )
    return shown


def draw(forms: Mapping[str, Any], path: Path) -> None:
    """P95 of each time and tokens a second, a bar a form, the rounds' range on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(SHOWN) + 1)
    for axis, (metric, words) in zip(axes, SHOWN.items(), strict=False):
        bars(
            axis,
            f"{words}, P95",
            "ms",
            {name: [1000 * one for one in found["p95_s"][metric]["rounds"]] for name, found in forms.items()},
        )
    bars(axes[-1], "output", "tokens/s", {name: found["tokens_per_s"] for name, found in forms.items()})
    figure.savefig(path, metadata={"Date": None})


def bars(axis: Any, title: str, unit: str, rounds: Mapping[str, Sequence[float]]) -> None:
    middle = [float(np.median(values)) for values in rounds.values()]
    below = [one - min(values) for one, values in zip(middle, rounds.values(), strict=True)]
    above = [max(values) - one for one, values in zip(middle, rounds.values(), strict=True)]
    axis.bar(range(len(rounds)), middle, yerr=[below, above], capsize=3, color="#3b6fb6")
    axis.set_xticks(range(len(rounds)), list(rounds), rotation=35, ha="right", fontsize=8)
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
