"""One task, several ways to solve it: what each gets right, how long an answer takes, and what a month of it costs.

Every figure is measured on served models: the same rows, accuracy with its interval, P95 and tokens per request. Cost is
machine time: a shared engine's hour is divided among what it answers, a dedicated one (a merged model) is paid for whole.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.data.chat import Row, answer_of, prompt_of
from trainer.evaluation.client import ChatClient
from trainer.evaluation.compare import judge_all, use_of, with_examples
from trainer.evaluation.config import EvalConfig
from trainer.evaluation.metrics import measure
from trainer.evaluation.statistics import Estimate, estimate

HOURS_A_MONTH = 730.0
WARM_ROWS = 4  # asked first and not counted: loading an adapter and filling caches is no latency of the approach


class Approach(BaseModel):
    """One way. With shots it is the few-shot prompt; with a URL it is served elsewhere, by an engine of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Such as base, few-shot, LoRA, QLoRA, merged.")
    model: str | None = Field(
        None, description="As it is served. None: it is not served now, and is left out and said."
    )
    shots: int = Field(0, ge=0, description="Solved examples in the prompt.")
    url: str | None = Field(None, description="Another gateway or engine. Default: the one of --url.")
    key_env: str | None = Field(None, description="Environment variable with that one's API key.")
    dedicated: bool = Field(
        False, description="The machine serves nothing else, so the whole of its month is paid for."
    )
    machine_per_hour: float | None = Field(None, gt=0, description="Price of its machine, where it is another.")


class Comparison(BaseModel):
    """What is compared, on which task, at which volume."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    eval: str = Field(description="Name or file of the evaluation's configuration: rows, task, examples.")
    approaches: tuple[Approach, ...] = Field(min_length=2)
    requests_per_month: int = Field(gt=0)
    machine_per_hour: float = Field(
        gt=0, description="What an hour of the serving machine costs; the currency is yours."
    )
    busy: float = Field(0.5, gt=0, le=1, description="Share of its measured rate that a machine is loaded to.")
    concurrency: int = Field(8, gt=0, description="Requests in flight while rate and P95 are measured.")
    rows: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if len({one.name for one in self.approaches}) < len(self.approaches):
            raise ValueError("each approach needs a name of its own")
        return self


@dataclass(frozen=True)
class Measurement:
    """One approach, measured. p50_s and p95_s at the comparison's concurrency."""

    name: str
    model: str
    metric: str
    score: Estimate
    valid: Estimate
    p50_s: float
    p95_s: float
    prompt_tokens: float
    output_tokens: float
    requests_per_s: float
    machines: int | None  # None: a share of a machine that others use too
    cost_per_month: float


def monthly_cost(
    requests_per_month: int, requests_per_s: float, *, per_hour: float, busy: float, dedicated: bool
) -> tuple[float, int | None]:
    """(cost, machines). Shared: the machine time that the requests take at the load a machine is run at."""
    hours = requests_per_month / (requests_per_s * busy) / 3600
    if not dedicated:
        return hours * per_hour, None
    machines = max(1, math.ceil(hours / HOURS_A_MONTH))
    return machines * HOURS_A_MONTH * per_hour, machines


async def measure_approach(
    approach: Approach,
    comparison: Comparison,
    config: EvalConfig,
    client: ChatClient,
    rows: Sequence[Row],
    examples: Sequence[Row],
    *,
    schema: Mapping[str, Any] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Measurement:
    """Raises EvaluationError."""
    assert approach.model is not None  # noqa: S101 - what is not served is left out before
    shots = tuple(examples[: approach.shots])
    prompts = [with_examples(row, shots) if shots else prompt_of(row) for row in rows]
    ask = partial(client.answers, max_tokens=config.max_tokens, concurrency=comparison.concurrency)
    await ask(approach.model, prompts[:WARM_ROWS])
    began_s = time.perf_counter()
    answers = await ask(approach.model, prompts, advance=advance)
    took_s = time.perf_counter() - began_s
    labels = config.labels or sorted({answer_of(row) for row in rows})
    measured = measure(config.task, judge_all(config, rows, answers, labels, schema))
    metric = next(iter(measured))
    use, rate = use_of(answers), len(prompts) / took_s
    cost, machines = monthly_cost(
        comparison.requests_per_month,
        rate,
        per_hour=approach.machine_per_hour or comparison.machine_per_hour,
        busy=comparison.busy,
        dedicated=approach.dedicated,
    )
    return Measurement(
        approach.name,
        approach.model,
        metric,
        estimate(measured[metric], seed=config.seed),
        estimate(measured["valid_rate"], seed=config.seed),
        use.p50_s,
        use.p95_s,
        use.prompt_tokens,
        use.output_tokens,
        rate,
        machines,
        cost,
    )


def document(comparison: Comparison, measured: Sequence[Measurement], left_out: Sequence[str]) -> dict[str, Any]:
    return {
        "comparison": comparison.model_dump(mode="json"),
        "approaches": [asdict(one) for one in measured],
        "left_out": list(left_out),
    }


def draw(measured: Sequence[Measurement], path: Path) -> None:
    """Score against monthly cost, a point for each approach, its interval as a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for one in measured:
        value, low, high = (100 * share for share in (one.score.value, one.score.low, one.score.high))
        spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.errorbar([one.cost_per_month], [value], yerr=spread, fmt="o", capsize=4)
        axis.annotate(
            f"{one.name} (P95 {one.p95_s:.2f} s)",
            (one.cost_per_month, value),
            xytext=(6, 6),
            textcoords="offset points",
        )
    axis.set_xscale("log")
    axis.margins(x=0.25)
    axis.set_xlabel("cost per month")
    axis.set_ylabel(f"{measured[0].metric.replace('_', ' ')}, %")
    axis.set_ylim(0, 105)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
