"""Reduce an adapter to a rank the engine serves: the nearest update of that rank in every layer, with its error stated."""

from pathlib import Path

from adapters.base import Report, silent
from adapters.derive import Derived, Parent, publish_copy
from adapters.errors import MergeError
from adapters.factors import Factors, cut, read_factors


def fit_adapter(
    base: Path,
    parent: Parent,
    out: Path,
    *,
    rank: int,
    name: str,
    accept: str = "",
    prompts: Path | None = None,
    report: Report = silent,
) -> Derived:
    """Write the adapter at a smaller rank to `out`. Layers of that rank or less are kept as they are.

    Raises MergeError for what has no rank to reduce, ParityError when too much of it is lost and nobody accepts that.
    """
    whole = read_factors(parent.folder)
    if max(each.rank for each in whole.values()) <= rank:
        raise MergeError(f"{parent.name} is of rank {max(each.rank for each in whole.values())} already.")
    factors: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for done, (module, each) in enumerate(whole.items()):
        report(f"fitting to rank {rank}", done, len(whole))
        factors[module], errors[module] = cut(each, rank) if each.rank > rank else (each, 0.0)
    return publish_copy(
        base,
        parent,
        factors,
        out,
        name=name,
        method=f"fit to rank {rank}",
        errors=errors,
        accept=accept,
        prompts=prompts,
        report=report,
    )
