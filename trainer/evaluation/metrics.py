"""What an answer is worth: labels, JSON, free text, programs; row by row, and over all rows. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from trainer.evaluation.statistics import Measured, mcnemar, mean_of

__all__ = ["Judged", "judge", "mcnemar", "measure", "summarise"]

OTHER = "(other)"  # an answer that is none of the labels


@dataclass(frozen=True)
class Judged:
    """One answer beside the one wanted."""

    wanted: str
    given: str
    stopped: bool  # ended by itself, not by the token limit
    correct: bool
    valid: bool  # one of the labels, or parses as JSON, or is not empty
    scores: Mapping[str, float] = field(default_factory=dict)  # further metrics of the row, 0 to 1


def judge(
    task: str,
    wanted: str,
    given: str,
    *,
    stopped: bool,
    labels: Sequence[str] = (),
    schema: Mapping[str, Any] | None = None,
    scores: Mapping[str, float] | None = None,
) -> Judged:
    """scores: what was measured of the row elsewhere, such as similarity or a program's tests."""
    measured = dict(scores or {})
    if task == "classification":
        said = normalise_label(given)
        known = said in map(normalise_label, labels)
        return Judged(wanted, given, stopped, said == normalise_label(wanted), known, measured)
    if task == "json":
        parsed = parse_object(given)
        want = parse_object(wanted)
        measured["completeness"] = completeness(want or {}, parsed)
        measured["schema_rate"] = float(follows(schema, parsed) if schema is not None else same_shape(want, parsed))
        return Judged(wanted, given, stopped, parsed is not None and parsed == want, parsed is not None, measured)
    correct = measured["pass_at_1"] == 1 if "pass_at_1" in measured else normalise_text(given) == normalise_text(wanted)
    return Judged(wanted, given, stopped, correct, bool(given.strip()), measured)


def normalise_label(text: str) -> str:
    """Case, spaces and a closing full stop do not make another label."""
    return text.strip().rstrip(".").strip().casefold()


def normalise_text(text: str) -> str:
    return " ".join(text.split()).casefold()


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the whole text is; None for anything else, prose around it included."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def measure(task: str, judged: Sequence[Judged]) -> dict[str, Measured]:
    """Every metric of the task, row by row. The first is the one that decides."""
    correct, valid = mean_of([row.correct for row in judged]), mean_of([row.valid for row in judged])
    further = {
        name: mean_of([row.scores.get(name, 0.0) for row in judged])
        for name in dict.fromkeys(name for row in judged for name in row.scores)
    }
    ends = {"valid_rate": valid, "stop_rate": mean_of([row.stopped for row in judged])}
    if task == "classification":
        return {"accuracy": correct, "macro_f1": macro_f1(judged)} | further | ends
    if task == "json":
        return {"exact_match": correct, "field_f1": field_f1(judged)} | further | ends
    if task == "code":
        return further | ends
    return further | {"exact_match": correct} | ends


def summarise(task: str, judged: Sequence[Judged]) -> dict[str, float]:
    """Every metric of the task, in 0…1. The first is the one that decides."""
    return {name: float(measured.value()) for name, measured in measure(task, judged).items()} if judged else {}


def share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found)


def macro_f1(judged: Sequence[Judged]) -> Measured:
    """Mean F1 over the labels that were wanted, each counting alike."""
    wanted = np.array([normalise_label(row.wanted) for row in judged])
    given = np.array([normalise_label(row.given) for row in judged])
    labels = np.unique(wanted)
    want, give = wanted[:, None] == labels, given[:, None] == labels
    # a label that a resample did not draw in `wanted` counts as soon as somebody says it: as a label never found
    return Measured(2.0 * (want & give), want.astype(np.float64) + give)


def field_f1(judged: Sequence[Judged]) -> Measured:
    """Micro F1 over (field, value) pairs of all rows; each element of a list is a value. 1 when nothing was to be found."""
    found = [(pairs(parse_object(row.wanted) or {}), pairs(parse_object(row.given) or {})) for row in judged]
    hits = np.array([[2.0 * len(want & give)] for want, give in found])
    return Measured(hits, np.array([[float(len(want) + len(give))] for want, give in found]), empty=1.0)


def per_field(judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of each field, over its (field, value) pairs of all rows."""
    counts: dict[str, list[int]] = {}
    for row in judged:
        want, give = pairs(parse_object(row.wanted) or {}), pairs(parse_object(row.given) or {})
        for group, index in ((want & give, 0), (give, 1), (want, 2)):
            for name, _ in group:
                counts.setdefault(name, [0, 0, 0])[index] += 1
    return {
        name: {
            "precision": hits / given if given else 0.0,
            "recall": hits / wanted if wanted else 0.0,
            "f1": 2 * hits / (given + wanted),
            "wanted": wanted,
        }
        for name, (hits, given, wanted) in sorted(counts.items())
    }


def pairs(value: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Every (field, value), the elements of a list one by one."""
    return frozenset(
        (key, json.dumps(item, sort_keys=True))
        for key, content in value.items()
        for item in (content if isinstance(content, list) else [content])
    )


def same_shape(want: Mapping[str, Any] | None, give: Mapping[str, Any] | None) -> bool:
    """The keys that were wanted, each with a value of the wanted type."""
    if want is None or give is None or want.keys() != give.keys():
        return False
    return all(type(give[key]) is type(want[key]) for key in want)


def completeness(want: Mapping[str, Any], give: Mapping[str, Any] | None) -> float:
    """Share of the wanted fields that are there and hold something where something was wanted."""
    if not want:
        return 1.0
    if give is None:
        return 0.0
    there = [key in give and (give[key] not in (None, "", [], {}) or want[key] in (None, "", [], {})) for key in want]
    return sum(there) / len(there)


def follows(schema: Mapping[str, Any], value: Any) -> bool:
    """By JSON Schema, of the draft the schema names."""
    return value is not None and bool(_validator(json.dumps(schema, sort_keys=True)).is_valid(value))


@cache
def _validator(schema: str) -> Any:
    from jsonschema.validators import validator_for

    parsed = json.loads(schema)
    return validator_for(parsed)(parsed)


@dataclass(frozen=True)
class Classes:
    """How each label fared. confusion[i][j]: rows of label i answered as label j; the last column is no label at all."""

    labels: tuple[str, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    rows: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...]


def classes(judged: Sequence[Judged], labels: Sequence[str]) -> Classes:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    names = list(dict.fromkeys([*map(normalise_label, labels), *(normalise_label(row.wanted) for row in judged)]))
    wanted = [normalise_label(row.wanted) for row in judged]
    given = [said if (said := normalise_label(row.given)) in names else OTHER for row in judged]
    precision, recall, f1, rows = precision_recall_fscore_support(wanted, given, labels=names, zero_division=0)
    matrix = confusion_matrix(wanted, given, labels=[*names, OTHER])[:-1]
    return Classes(
        tuple(names),
        tuple(map(float, precision)),
        tuple(map(float, recall)),
        tuple(map(float, f1)),
        tuple(map(int, rows)),
        tuple(tuple(map(int, row)) for row in matrix),
    )
