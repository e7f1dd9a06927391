"""An evaluation for people (tables) and for programs (JSON), and its scores in an adapter's manifest."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from adapters.manifest import MANIFEST_FILE, read_manifest, write_manifest
from trainer.errors import EvaluationError
from trainer.evaluation.compare import Evaluation, SubjectName

ORDER: tuple[SubjectName, ...] = ("base", "few-shot", "predecessor", "adapter")


def document(evaluation: Evaluation) -> dict[str, Any]:
    """Everything, row by row."""
    return {
        "task": evaluation.config.name,
        "model": evaluation.model,
        "rows": len(evaluation.rows),
        "metrics": {
            name: {metric: round(value, 4) for metric, value in metrics.items()}
            for name, metrics in evaluation.metrics.items()
        },
        "p_value": {other: evaluation.p_against(other) for other in evaluation.judged if other != "adapter"},
        "config": evaluation.config.model_dump(mode="json"),
        "answers": [
            {
                "messages": row[:-1],
                "wanted": row[-1]["content"],
                **{
                    name: {"given": judged[index].given, "correct": judged[index].correct}
                    for name, judged in evaluation.judged.items()
                },
            }
            for index, row in enumerate(evaluation.rows)
        ],
    }


def metrics_table(evaluation: Evaluation) -> Table:
    """A line per metric, a column per subject."""
    names = [name for name in ORDER if name in evaluation.judged]
    table = Table(
        title=f"{evaluation.config.name}: {evaluation.model} on {len(evaluation.rows)} rows", title_justify="left"
    )
    table.add_column("metric")
    for name in names:
        table.add_column(name, justify="right")
    metrics = evaluation.metrics
    for metric in metrics["adapter"]:
        table.add_row(metric.replace("_", " "), *(f"{100 * metrics[name][metric]:.1f} %" for name in names))
    return table


def samples_table(evaluation: Evaluation, count: int = 4) -> Table:
    """The first rows, side by side."""
    names = [name for name in ORDER if name in evaluation.judged]
    table = Table(title="Samples", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("wanted", ratio=1, overflow="fold")
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    for index, row in enumerate(evaluation.rows[:count]):
        judged = [evaluation.judged[name][index] for name in names]
        colours = ["green" if one.correct else "red" for one in judged]
        given = [f"[{colour}]{escape(_short(one.given))}[/]" for colour, one in zip(colours, judged, strict=True)]
        table.add_row(escape(_short(row[-2]["content"])), escape(row[-1]["content"]), *given)
    return table


def verdict(evaluation: Evaluation) -> str:
    """One sentence: does the adapter beat the prompted base, and could that be chance?"""
    rival: SubjectName = "few-shot" if "few-shot" in evaluation.judged else "base"
    p = evaluation.p_against(rival)
    metric = next(iter(evaluation.metrics["adapter"]))
    points = 100 * (evaluation.metrics["adapter"][metric] - evaluation.metrics[rival][metric])
    how = "ahead of" if points > 0 else "behind" if points < 0 else "level with"
    chance = "" if p is None else f" (paired p = {p:.2g}, McNemar)"
    return f"The adapter is {abs(points):.1f} points {how} the {rival} base in {metric.replace('_', ' ')}{chance}."


def _short(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write_document(evaluation: Evaluation, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(evaluation), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def add_to_manifest(evaluation: Evaluation, folder: Path) -> None:
    """Replace the task's scores in the folder's manifest. Raises EvaluationError, InvalidAdapterError."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise EvaluationError(f"{folder} has no manifest.json to write scores into.")
    kept = [score for score in manifest.scores if score.task != evaluation.config.name]
    updated = manifest.model_copy(update={"scores": [*kept, *evaluation.scores()]})
    scratch = folder / ".scores"
    scratch.mkdir(exist_ok=True)
    write_manifest(updated, scratch).replace(folder / MANIFEST_FILE)
    scratch.rmdir()
