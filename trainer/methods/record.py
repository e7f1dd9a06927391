"""The record of a run: metrics.jsonl, one line a step, and a plot of the losses. Written as training goes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.svg"


@dataclass(frozen=True)
class Metrics:
    """One line. stage is counted from 1; what was not measured at this step is None. seconds: of this stage's training."""

    stage: int
    step: int
    seconds: float
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None  # since the process began this stage
    tokens_per_s: float | None = None
    token_accuracy: float | None = None
    eval_token_accuracy: float | None = None


class MetricsFile:
    """metrics.jsonl of a run. A stage that is gone on with first drops what came after its checkpoint."""

    def __init__(self, run: Path, stage: int) -> None:
        self.path = run / METRICS_FILE
        self.stage = stage

    def begin(self, step: int) -> float:
        """Forget this stage's steps beyond `step`. Returns the seconds it had trained by then."""
        kept = [
            each
            for each in read_metrics(self.path)
            if each.stage < self.stage or (each.stage == self.stage and each.step <= step)
        ]
        self.path.write_text("".join(map(_line, kept)), encoding="utf-8")
        return max((each.seconds for each in kept if each.stage == self.stage), default=0.0)

    def add(self, metrics: Metrics) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(metrics))

    def plot(self) -> None:
        draw_losses(read_metrics(self.path), self.path.parent / PLOT_FILE)


def read_metrics(path: Path) -> list[Metrics]:
    """Every whole line; a kill may have cut the last."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Metrics(**json.loads(line)) for line in lines if line.endswith("\n")]


def _line(metrics: Metrics) -> str:
    told = {name: value for name, value in vars(metrics).items() if value is not None}
    return json.dumps(told) + "\n"


def draw_losses(metrics: Sequence[Metrics], path: Path) -> None:
    """Training and eval loss over the steps of all stages, as SVG."""
    from matplotlib.figure import Figure  # not pyplot: no state, and no display is looked for

    before = _steps_before(metrics)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    train = [(before[each.stage] + each.step, each.loss) for each in metrics if _drawn(each.loss)]
    held_out = [(before[each.stage] + each.step, each.eval_loss) for each in metrics if _drawn(each.eval_loss)]
    for points, style in ((train, {"lw": 1, "label": "training"}), (held_out, {"marker": "o", "label": "held out"})):
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    for stage, step in before.items():
        if stage > 1:
            axes.axvline(step, color="grey", lw=0.8, ls=":")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    if train or held_out:
        axes.legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _steps_before(metrics: Sequence[Metrics]) -> dict[int, int]:
    """stage -> steps of the stages before it."""
    last = {each.stage: each.step for each in metrics}
    return {stage: sum(step for other, step in last.items() if other < stage) for stage in sorted(last)}


def _drawn(value: Any) -> bool:
    return value is not None and math.isfinite(value)
