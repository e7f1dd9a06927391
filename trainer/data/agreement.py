"""How far annotators agreed: raw share and Cohen's kappa of each two of them. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

Pair = tuple[str, str]  # what the one and what the other said


@dataclass(frozen=True)
class Agreement:
    """Of two annotators over the rows both labelled. kappa: 1 is full agreement, 0 what chance gives, None undefined."""

    annotators: Pair
    rows: int
    raw: float
    kappa: float | None


def agreement(annotators: Pair, said: Mapping[Pair, int]) -> Agreement:
    """Cohen 1960: (observed − expected) / (1 − expected), expected from each annotator's own frequencies.

    Undefined where both used one and the same label throughout. Raises ValueError without any row.
    """
    rows = sum(said.values())
    if not rows:
        raise ValueError("no row has both labels")
    one: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for (first, second), count in said.items():
        one[first] += count
        other[second] += count
    agreed = sum(count for (first, second), count in said.items() if first == second)
    expected = sum(one[label] * other[label] for label in one)  # times rows², so that it is exact
    if expected == rows**2:
        return Agreement(annotators, rows, 1.0, None)
    return Agreement(annotators, rows, agreed / rows, (agreed * rows - expected) / (rows**2 - expected))
