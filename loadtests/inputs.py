"""The files a scenario refers to, read before anything is planned. Planning itself touches no disk."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.errors import ScenarioError
from loadtests.loads import TraceLoad
from loadtests.popularity import WeightFiles, Weights
from loadtests.prompts import PromptSource, load_prompts
from loadtests.scenario import Scenario
from loadtests.traces import TraceRow, read_trace, replay


@dataclass(frozen=True)
class Inputs:
    prompts: PromptSource
    traces: Mapping[str, tuple[TraceRow, ...]] = field(default_factory=dict)  # of each phase that replays one
    weights: WeightFiles = field(default_factory=dict)


def load_inputs(scenario: Scenario) -> Inputs:
    """Raises ScenarioError when a file is missing, malformed, or holds nothing to use."""
    popularities = (scenario.popularity, *(phase.popularity for phase in scenario.phases))
    return Inputs(
        prompts=load_prompts(scenario.requests.prompts),
        traces=dict(_traces(scenario)),
        weights={some.path: read_weights(some.path) for some in popularities if isinstance(some, Weights)},
    )


def _traces(scenario: Scenario) -> Iterator[tuple[str, tuple[TraceRow, ...]]]:
    for phase in scenario.phases:
        load = scenario.load_of(phase)
        if isinstance(load, TraceLoad):
            rows = tuple(replay(read_trace(load.path, load.format), load, phase.duration_s))
            if not rows:
                span = f"{phase.duration_s * load.speed:g} s from {load.start_s:g} s on"
                raise ScenarioError(str(load.path), [f"no row for phase {phase.name}, which replays {span}"])
            yield phase.name, rows


def read_weights(path: Path) -> dict[str, float]:
    """Adapter to weight, from CSV with columns `adapter` and `weight` or a JSON object. Raises ScenarioError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            pairs = list(json.loads(text).items())
        else:
            pairs = [(row["adapter"], row["weight"]) for row in csv.DictReader(text.splitlines())]
        weights = {str(name): float(weight) for name, weight in pairs}
    except (OSError, UnicodeDecodeError) as exc:
        raise ScenarioError(str(path), [f"cannot be read: {exc}"]) from exc
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as exc:
        expected = "a JSON object {adapter: weight}" if path.suffix == ".json" else "CSV with columns adapter,weight"
        raise ScenarioError(str(path), [f"expected {expected}: {exc}"]) from exc
    faults = [f"{name}: a weight is a number from 0 on" for name, w in weights.items() if not 0 <= w < math.inf]
    if faults or not weights:
        raise ScenarioError(str(path), faults or ["holds no weights"])
    return weights
