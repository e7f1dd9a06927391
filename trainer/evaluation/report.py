"""An evaluation for people (tables) and for programs (JSON), and its scores in an adapter's manifest."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from adapters.evaluations import JudgeCalibration
from adapters.manifest import MANIFEST_FILE, EvaluationScore, read_manifest, write_manifest
from trainer.errors import EvaluationError
from trainer.evaluation.compare import Evaluation, SubjectName
from trainer.evaluation.judging import Judgement
from trainer.evaluation.metrics import classes, per_field
from trainer.evaluation.probes import ProbeResult
from trainer.evaluation.statistics import Difference, Estimate

ORDER: tuple[SubjectName, ...] = ("base", "few-shot", "predecessor", "adapter")
EXAMPLES_KEPT = 50  # of each probe


@dataclass(frozen=True)
class Findings:
    """Everything one run of `lorikeet eval` has found out."""

    evaluation: Evaluation
    probes: tuple[ProbeResult, ...] = ()
    judgement: Judgement | None = None
    calibration: JudgeCalibration | None = None

    def scores(self) -> list[EvaluationScore]:
        judged = self.judgement.scores(self.evaluation.config.name) if self.judgement else []
        return [*self.evaluation.scores(), *(score for probe in self.probes for score in probe.scores()), *judged]


def document(found: Findings | Evaluation) -> dict[str, Any]:
    """Everything, row by row."""
    findings = found if isinstance(found, Findings) else Findings(found)
    evaluation = findings.evaluation
    config = evaluation.config
    return {
        "task": config.name,
        "kind": config.task,
        "model": evaluation.model,
        "models": dict(evaluation.models),
        "rows": len(evaluation.rows),
        "metrics": {
            name: {metric: round(value, 4) for metric, value in metrics.items()}
            for name, metrics in evaluation.metrics.items()
        },
        "intervals": {
            name: {metric: [round(one.low, 4), round(one.high, 4)] for metric, one in metrics.items()}
            for name, metrics in evaluation.estimates.items()
        },
        "p_value": {other: evaluation.p_against(other) for other in evaluation.judged if other != "adapter"},
        "differences": {
            name: {metric: _difference(one) for metric, one in metrics.items()}
            for name, metrics in evaluation.differences.items()
        },
        "use": {
            name: {key: round(value, 4) for key, value in asdict(use).items()} for name, use in evaluation.use.items()
        },
        "detail": {name: detail(evaluation, name) for name in evaluation.judged},
        "probes": [_probe(probe) for probe in findings.probes],
        "judge": findings.judgement.document() if findings.judgement else None,
        "calibration": findings.calibration.model_dump() if findings.calibration else None,
        "config": config.model_dump(mode="json"),
        "answers": [
            {
                "messages": row[:-1],
                "wanted": row[-1]["content"],
                **{
                    name: {
                        "given": judged[index].given,
                        "correct": judged[index].correct,
                        "valid": judged[index].valid,
                        "stopped": judged[index].stopped,
                        **({"scores": dict(judged[index].scores)} if judged[index].scores else {}),
                    }
                    for name, judged in evaluation.judged.items()
                },
            }
            for index, row in enumerate(evaluation.rows)
        ],
    }


def detail(evaluation: Evaluation, name: SubjectName) -> dict[str, Any]:
    """Label by label with the confusion matrix, or field by field."""
    judged = evaluation.judged[name]
    if evaluation.config.task == "classification":
        return asdict(classes(judged, evaluation.config.labels))
    return {"fields": per_field(judged)} if evaluation.config.task == "json" else {}


def _difference(one: Difference) -> dict[str, Any]:
    return {key: round(value, 4) if key != "p" else value for key, value in asdict(one).items() if key != "test"} | {
        "test": one.test
    }


def _probe(probe: ProbeResult) -> dict[str, Any]:
    return {
        "name": probe.name,
        "kind": probe.kind,
        "red": probe.red,
        "figures": [
            {
                "metric": figure.metric,
                "rows": figure.rows,
                "subjects": {name: _estimate(one) for name, one in figure.estimates.items()},
                "differences": {name: _difference(one) for name, one in figure.differences.items()},
            }
            for figure in probe.figures
        ],
        "examples": [asdict(example) for example in probe.examples[:EXAMPLES_KEPT]],
    }


def _estimate(one: Estimate) -> dict[str, float]:
    return {key: round(value, 4) for key, value in asdict(one).items()}


def metrics_table(evaluation: Evaluation) -> Table:
    """A line per metric, a column per subject, each with its interval."""
    names = [name for name in ORDER if name in evaluation.judged]
    table = Table(
        title=f"{evaluation.config.name}: {evaluation.model} on {len(evaluation.rows)} rows", title_justify="left"
    )
    table.add_column("metric")
    for name in names:
        table.add_column(name, justify="right")
    for metric in evaluation.estimates["adapter"]:
        cells = [evaluation.estimates[name].get(metric) for name in names]
        table.add_row(metric.replace("_", " "), *(in_percent(cell) for cell in cells))
    return table


def in_percent(one: Estimate | None) -> str:
    if one is None:
        return ""
    return f"{100 * one.value:.1f} % [dim]{100 * one.low:.0f}…{100 * one.high:.0f}[/dim]"


def probes_table(probes: Sequence[ProbeResult]) -> Table:
    names = [name for name in ORDER if any(name in figure.estimates for probe in probes for figure in probe.figures)]
    table = Table(title="What it may have broken", title_justify="left")
    for column in ("probe", "share", "rows"):
        table.add_column(column)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("p", justify="right")
    for probe in probes:
        for figure in probe.figures:
            against = figure.differences.get("base")
            table.add_row(
                f"[red]{probe.name}[/red]" if probe.red else probe.name,
                figure.metric.replace("_", " "),
                str(figure.rows),
                *(in_percent(figure.estimates.get(name)) for name in names),
                f"{against.p:.2g}" if against else "",
            )
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
        table.add_row(escape(_short(row[-2]["content"])), escape(_short(row[-1]["content"])), *given)
    return table


def verdict(evaluation: Evaluation) -> str:
    """One sentence: does the adapter beat the prompted base, and could that be chance?"""
    rival = next((name for name in ("few-shot", "base", "predecessor") if name in evaluation.judged), None)
    if rival is None:
        return f"Nobody was asked beside {evaluation.model}."
    found = evaluation.differences[rival][evaluation.deciding]
    points = 100 * found.value
    how = "ahead of" if points > 0 else "behind" if points < 0 else "level with"
    who = "the few-shot base" if rival == "few-shot" else f"its {rival}"
    chance = f" (paired p = {found.p:.2g}, {found.test})"
    return f"The adapter is {abs(points):.1f} points {how} {who} in {evaluation.deciding.replace('_', ' ')}{chance}."


def _short(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write_document(found: Findings | Evaluation, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_document(path: Path) -> dict[str, Any]:
    """What `lorikeet eval` wrote. Raises EvaluationError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found["answers"], list) and isinstance(found["model"], str):
            return found
    except (OSError, ValueError, KeyError) as exc:
        raise EvaluationError(f"{path} is no report of `lorikeet eval`: {exc}") from exc
    raise EvaluationError(f"{path} is no report of `lorikeet eval`.")


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_to_manifest(found: Findings | Evaluation, folder: Path) -> None:
    """Replace the tasks' scores in the folder's manifest. Raises EvaluationError, InvalidAdapterError."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise EvaluationError(f"{folder} has no manifest.json to write scores into.")
    scores = found.scores()
    measured = {score.task for score in scores}
    kept = [score for score in manifest.scores if score.task not in measured]
    updated = manifest.model_copy(update={"scores": [*kept, *scores]})
    scratch = folder / ".scores"
    scratch.mkdir(exist_ok=True)
    write_manifest(updated, scratch).replace(folder / MANIFEST_FILE)
    scratch.rmdir()


def scores_from(documents: Mapping[str, Any]) -> list[EvaluationScore]:
    """The scores of a stored report, for attaching it later."""
    differences = documents.get("differences", {})
    found = [
        EvaluationScore.model_validate(
            {
                "task": documents["task"],
                "metric": metric,
                "subject": subject,
                "value": value,
                "rows": documents["rows"],
                "low": documents["intervals"][subject][metric][0],
                "high": documents["intervals"][subject][metric][1],
                "p_value": differences.get(subject, {}).get(metric, {}).get("p"),
            }
        )
        for subject, metrics in documents["metrics"].items()
        for metric, value in metrics.items()
    ]
    for probe in documents.get("probes", []):
        for figure in probe["figures"]:
            found += [
                EvaluationScore.model_validate(
                    {
                        "task": probe["name"],
                        "metric": figure["metric"],
                        "subject": subject,
                        "rows": figure["rows"],
                        "p_value": figure["differences"].get(subject, {}).get("p"),
                        **one,
                    }
                )
                for subject, one in figure["subjects"].items()
            ]
    return found
