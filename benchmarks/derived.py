"""What is made of adapters on the real model: fused, fitted to a smaller rank, a DoRA converted; and two forms of one compared.

    python -m benchmarks.derived [--made FOLDER]

Trains a topic sorter, an extractor of names and a DoRA topic sorter; fuses the first two by every method and takes the
nearest; fits the first to rank 4; converts the DoRA; uploads all of it and scores it through the gateway, beside what it was
made of. Merges the first with the rung of the served adapter. Then `lorikeet choose`. Half an hour on two idle cores.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from scripts.installation import Installation, empty_root

PORT = 8095
TOPICS, NAMES = "reuters-topics", "finance-entities"
SERVED = "serving.max_tokens=96"  # only adapters that are served alike are fused
TRAINED = {
    "topics": (TOPICS, ["data.train_rows=160", SERVED]),
    "names": (NAMES, ["optimizer.epochs=1", SERVED]),
    "dora": (TOPICS, ["data.train_rows=80", "lora.dora=true", SERVED]),
}
SCORED = {  # model -> the tasks it is asked
    "topics": (TOPICS,),
    "names": (NAMES,),
    "fused": (TOPICS, NAMES),
    "fitted": (TOPICS,),
    "converted": (TOPICS,),
}
METRICS = {TOPICS: "accuracy", NAMES: "exact_match"}
ACCEPTED = ("--accept", "measured here")
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", type=Path, help="Folder of adapters trained by an earlier run.")
    parser.add_argument("--rows", type=int, default=60, help="of each task's evaluation rows")
    parser.add_argument("--seconds", type=float, default=40, help="of each form that `lorikeet choose` asks")
    given = parser.parse_args()
    own = Installation(empty_root("derived"), PORT, console)
    made: Path = given.made or own.root
    for name, (config, changes) in TRAINED.items():
        if not (made / name).exists():
            own.show("train", config, *(part for one in changes for part in ("--set", one)), "--out", str(made / name))
    with own.stopped_at_the_end():
        own.ask("up")
        own.add_tenant("acme")
        document = measure(own, made, given.rows, given.seconds)
    command = f"python -m benchmarks.derived --rows {given.rows} --seconds {given.seconds:g}"
    path = save("derived", {"command": command} | document)
    console.print(table(document), document["choose"]["advice"], f"Raw figures: {path}")


def measure(own: Installation, made: Path, rows: int, seconds: float) -> dict[str, Any]:
    for name in ("topics", "names"):
        own.ask("push", str(made / name), "--name", name, tenant="acme")
    derived = {
        "fused": own.ask(
            "fuse", str(made / "topics"), str(made / "names"), "--measure", "--push", "fused", tenant="acme"
        ),
        "fitted": own.ask("fit", str(made / "topics"), "--rank", "4", "--push", "fitted", *ACCEPTED, tenant="acme"),
        "converted": own.ask(
            "convert", str(made / "dora"), "--rank", "16", "--push", "converted", *ACCEPTED, tenant="acme"
        ),
    }
    scores = {
        model: {task: scored(own, task, model, rows)["metrics"]["adapter"] for task in tasks}
        for model, tasks in SCORED.items()
    }
    merged = ["--out", str(own.root / "merged"), "--served", own.url, "--served-as", "topics"]
    rungs = own.ask("merge", str(made / "topics"), *merged, tenant="acme")["rungs"]
    # The data are for research only, which the licences' gate would refuse.
    allowed = ["--share", "0", "--force", "--reason", "a benchmark on one's own machine"]
    own.ask("deploy", "acme/topics@1", "--merged", "--from", str(own.root / "merged"), *allowed)
    chosen = own.ask("choose", "acme/topics@1", "--seconds", str(seconds))
    document = {"derived": derived, "scores": scores, "rungs": rungs, "choose": chosen}
    for one in derived.values():
        del one["out"]
    without_places: dict[str, Any] = json.loads(json.dumps(document).replace(f"{made}/", ""))
    return without_places


def scored(own: Installation, task: str, model: str, rows: int) -> Any:
    out = str(own.root / f"{task}-{model}.json")
    return own.ask(
        "eval", task, "--model", model, "--rows", str(rows), "--against", "base", "--out", out, tenant="acme"
    )


def table(document: dict[str, Any]) -> Table:
    shown = Table("adapter", "made by", "rank", *(f"{task}, {metric}" for task, metric in METRICS.items()))
    for model, found in document["scores"].items():
        made = document["derived"].get(model, {})
        figures = [f"{found[task][metric]:.0%}" if task in found else "" for task, metric in METRICS.items()]
        shown.add_row(model, made.get("method", "training"), str(made.get("rank", "")), *figures)
    return shown


if __name__ == "__main__":
    main()
