"""Classes of the training rows against those of production: how far apart, and what to leave out. Pure."""

from collections.abc import Mapping


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Counts or shares as shares that add up to one."""
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else dict.fromkeys(counts, 0.0)


def distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Total variation distance of two distributions: the share that would have to change its class, 0 to 1."""
    a, b = shares(one), shares(other)
    return sum(abs(a.get(name, 0) - b.get(name, 0)) for name in a.keys() | b.keys()) / 2


def plan_resampling(rows: Mapping[str, int], production: Mapping[str, float], *, tolerance: float) -> dict[str, int]:
    """Rows to keep of each class: as many as there can be within `tolerance` of production, none invented.

    A class that production has not keeps nothing. Where a class of production is missing or too rare to come within the
    tolerance, the others are cut to the nearest there is, and the distance says so.
    """
    wanted = {name: share for name, share in shares(production).items() if share > 0 and rows.get(name, 0) > 0}
    if not wanted:
        return dict.fromkeys(rows, 0)

    def kept(total: float) -> dict[str, int]:
        return {name: min(count, round(total * wanted.get(name, 0))) for name, count in rows.items()}

    least = min(rows[name] / share for name, share in wanted.items())
    most = max(rows[name] / share for name, share in wanted.items())
    reachable = max(tolerance, distance(kept(least), production))
    for _ in range(60):
        middle = (least + most) / 2
        if distance(kept(middle), production) <= reachable:
            least = middle
        else:
            most = middle
    return kept(least)


def general_rows(own: int, share: float) -> int:
    """How many rows of general data make up `share` of the training rows beside `own` others."""
    return round(own * share / (1 - share))
