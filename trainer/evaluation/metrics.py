"""What an answer is worth: classification, JSON, and whether two models differ by more than chance. Pure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Judged:
    """One answer beside the one wanted."""

    wanted: str
    given: str
    stopped: bool  # ended by itself, not by the token limit
    correct: bool
    valid: bool  # one of the labels, or parses as JSON


def judge(task: str, wanted: str, given: str, *, stopped: bool, labels: Sequence[str]) -> Judged:
    if task == "classification":
        said = normalise_label(given)
        return Judged(wanted, given, stopped, said == normalise_label(wanted), said in map(normalise_label, labels))
    parsed = parse_object(given)
    return Judged(wanted, given, stopped, parsed is not None and parsed == parse_object(wanted), parsed is not None)


def normalise_label(text: str) -> str:
    """Case, spaces and a closing full stop do not make another label."""
    return text.strip().rstrip(".").strip().casefold()


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the whole text is; None for anything else, prose around it included."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def summarise(task: str, judged: Sequence[Judged]) -> dict[str, float]:
    """Every metric of the task, in 0…1. The first is the one that decides."""
    if not judged:
        return {}
    stop_rate = share(row.stopped for row in judged)
    valid, correct = share(row.valid for row in judged), share(row.correct for row in judged)
    if task == "classification":
        return {"accuracy": correct, "macro_f1": macro_f1(judged), "valid_rate": valid, "stop_rate": stop_rate}
    return {
        "exact_match": correct,
        "field_f1": field_f1(judged),
        "schema_rate": share(same_schema(row) for row in judged),
        "valid_rate": valid,
        "stop_rate": stop_rate,
    }


def share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found)


def macro_f1(judged: Sequence[Judged]) -> float:
    """Mean F1 over the labels that were wanted, each counting alike."""
    wanted = [normalise_label(row.wanted) for row in judged]
    given = [normalise_label(row.given) for row in judged]
    scores = []
    for label in set(wanted):
        hits = sum(w == g == label for w, g in zip(wanted, given, strict=True))
        scores.append(f1(hits, given.count(label), wanted.count(label)))
    return sum(scores) / len(scores)


def f1(hits: int, given: int, wanted: int) -> float:
    return 2 * hits / (given + wanted) if given + wanted else 0.0


def field_f1(judged: Sequence[Judged]) -> float:
    """Micro F1 over (field, value) pairs of all rows; each element of a list is a value. 1 when nothing was to be found."""
    hits = given = wanted = 0
    for row in judged:
        want, give = pairs(parse_object(row.wanted) or {}), pairs(parse_object(row.given) or {})
        hits, given, wanted = hits + len(want & give), given + len(give), wanted + len(want)
    return f1(hits, given, wanted) if given + wanted else 1.0


def pairs(value: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Every (field, value), the elements of a list one by one."""
    return frozenset(
        (key, json.dumps(item, sort_keys=True))
        for key, content in value.items()
        for item in (content if isinstance(content, list) else [content])
    )


def same_schema(row: Judged) -> bool:
    """The keys that were wanted, each with a value of the wanted type."""
    want, give = parse_object(row.wanted), parse_object(row.given)
    if want is None or give is None or want.keys() != give.keys():
        return False
    return all(type(give[key]) is type(want[key]) for key in want)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p that two models, right or wrong on the same rows, are equally good (McNemar 1947, binomial form)."""
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    discordant = gained + lost
    ways = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * ways / 2**discordant))
