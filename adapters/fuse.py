"""Several adapters of one base made into one: the weighted sum of their updates, or one of PEFT's ways to mix them.

`cat` is the sum itself, at the sum of the ranks; `svd` is the nearest update to it of the largest rank the engine serves. The
other methods are PEFT's add_weighted_adapter; they mix A and B each by itself, so they are no sum of updates.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base import Report, read_base, silent
from adapters.derive import Bench, Derived, Parent, bench, parent_rung, write_derived
from adapters.errors import MergeError
from adapters.factors import Factors, add_up, cut, read_factors
from adapters.ladder import Divergence, Limits, Rung
from adapters.merge import building
from adapters.parity import Figures
from adapters.peft_format import version_digest

OWN = ("cat", "svd")
OF_PEFT = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (*OWN, *OF_PEFT)
TRIMMED = frozenset({"ties", "dare_linear", "dare_ties", "magnitude_prune"})  # that keep a share of the values


@dataclass(frozen=True)
class Tried:
    """One method, and how far its result is from each parent on that parent's own goldens."""

    method: str
    rank: int
    distances: tuple[Figures, ...]
    refused: str = ""  # why the method cannot be used

    @property
    def worst_kl(self) -> float:
        return max(_own(figures).kl or 0.0 for figures in self.distances)

    def as_dict(self) -> dict[str, Any]:
        distances = [{"kl": own.kl, "mean_abs": own.mean_abs, "top1": own.top1} for own in map(_own, self.distances)]
        return {"method": self.method, "rank": self.rank, "refused": self.refused, "distances": distances}


@dataclass(frozen=True)
class Fused:
    """The adapter that was made, and every method that was tried for it."""

    derived: Derived
    tried: tuple[Tried, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**self.derived.as_dict(), "tried": [each.as_dict() for each in self.tried]}


def choose_method(ranks: Sequence[int], max_rank: int) -> str:
    """The exact sum where the engine serves its rank, else the nearest update that it serves."""
    return "cat" if sum(ranks) <= max_rank else "svd"


def best(tried: Sequence[Tried]) -> Tried:
    """The method whose result is least far from the parent it is farthest from. Raises MergeError where none can be used."""
    usable = [each for each in tried if not each.refused]
    if not usable:
        raise MergeError("No method can fuse these adapters: " + "; ".join(each.refused for each in tried))
    return min(usable, key=lambda each: each.worst_kl)


def fuse_adapters(
    base: Path,
    parents: Sequence[Parent],
    out: Path,
    *,
    name: str,
    weights: Sequence[float] = (),
    method: str | None = None,
    measure: bool = False,
    max_rank: int = 16,
    density: float = 0.5,
    seed: int = 0,
    prompts: Path | None = None,
    report: Report = silent,
) -> Fused:
    """Write the fused adapter to `out`. weights: one for each parent; none: equal shares of one.

    method: None chooses by rank, or with `measure` the one that is nearest to all parents. density: the share of values that
    trimming methods keep; seed: of those that drop at random. Raises MergeError.
    """
    shares = list(weights) or [1 / len(parents)] * len(parents)
    _check(parents, shares, method, density)
    updates = [read_factors(parent.folder) for parent in parents]
    ranks = [max(each.rank for each in update.values()) for update in updates]
    if method == "cat":
        weighted_sum_served(updates, shares, max_rank)  # refused before a model is loaded
    methods: Sequence[str] = [method] if method else METHODS if measure else [choose_method(ranks, max_rank)]
    with building(out) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        with bench(base, parents, scratch, prompts=prompts, report=report) as made:
            references = []
            for place, parent in enumerate(parents):
                report(f"asking {parent.name}", place, len(parents))
                references.append(made.reference(place))
            with made.model.disable_adapter():
                effect = references[0].hold(made.model, texts=False)["all"]
            tried: list[Tried] = []
            candidates: dict[str, dict[str, Factors]] = {}
            for done, each in enumerate(methods):
                report(f"trying {each}", done, len(methods))
                try:
                    found = _fuse(made, each, updates, shares, max_rank=max_rank, density=density, seed=seed)
                except MergeError as exc:
                    if method:
                        raise
                    tried.append(Tried(each, 0, (), refused=str(exc)))
                    continue
                candidates[each] = found
                with made.trying(found):
                    distances = tuple(reference.hold(made.model) for reference in references)
                tried.append(Tried(each, max(one.rank for one in found.values()), distances))
            chosen = best(tried)
            factors = candidates[chosen.method]
            report("making goldens", 0, 0)
            with made.trying(factors):
                goldens = made.goldens()
        shutil.rmtree(scratch)
        errors = _errors(chosen.method, updates, shares, max_rank)
        rungs = _rungs(parents, chosen)
        rank = write_derived(
            folder,
            factors,
            read_base(base),
            parents,
            name=name,
            method=f"fuse by {chosen.method}" + (f", density {density:g}" if chosen.method in TRIMMED else ""),
            goldens=goldens,
            errors=errors,
            rungs=rungs,
            weights=shares,
        )
        digest = version_digest(folder)
    return Fused(
        Derived(str(out), digest, rank, chosen.method, len(goldens), rungs, effect, errors),
        tuple(tried),
    )


def _check(parents: Sequence[Parent], shares: Sequence[float], method: str | None, density: float) -> None:
    if len(parents) < 2:
        raise MergeError("Give at least two adapters to fuse.")
    if len(shares) != len(parents):
        raise MergeError(f"{len(parents)} adapters need {len(parents)} weights, not {len(shares)}.")
    if any(not abs(share) > 0 for share in shares):
        raise MergeError("A weight of zero leaves an adapter out: leave it out.")
    if method is not None and method not in METHODS:
        raise MergeError(f"'{method}' is no method. Use one of {', '.join(METHODS)}.")
    if not 0 < density <= 1:
        raise MergeError("The density is a share of the values: more than 0, at most 1.")


def _fuse(
    made: Bench,
    method: str,
    updates: Sequence[Mapping[str, Factors]],
    shares: Sequence[float],
    *,
    max_rank: int,
    density: float,
    seed: int,
) -> dict[str, Factors]:
    """Raises MergeError where the method cannot be used on these."""
    if method in OF_PEFT:
        return _by_peft(made, method, shares, density=density, seed=seed)
    if method == "svd":
        return {module: cut(each, max_rank)[0] for module, each in weighted_sum(updates, shares).items()}
    return weighted_sum_served(updates, shares, max_rank)


def weighted_sum(updates: Sequence[Mapping[str, Factors]], shares: Sequence[float]) -> dict[str, Factors]:
    """Module -> the exact sum of the updates that change it."""
    modules = dict.fromkeys(module for update in updates for module in update)
    return {
        module: add_up(
            [(share, update[module]) for share, update in zip(shares, updates, strict=True) if module in update]
        )
        for module in modules
    }


def weighted_sum_served(
    updates: Sequence[Mapping[str, Factors]], shares: Sequence[float], max_rank: int
) -> dict[str, Factors]:
    """The same. Raises MergeError where its rank is more than the engine serves."""
    summed = weighted_sum(updates, shares)
    rank = max(each.rank for each in summed.values())
    if rank > max_rank:
        raise MergeError(f"cat gives rank {rank}; the engine serves {max_rank}. Use svd, or give --max-rank.")
    return summed


def _by_peft(made: Bench, method: str, shares: Sequence[float], *, density: float, seed: int) -> dict[str, Factors]:
    import torch

    torch.manual_seed(seed)
    names = [str(place) for place in range(len(shares))]
    options = {"density": density} if method in TRIMMED else {}
    try:
        made.model.base_model.add_weighted_adapter(names, list(shares), "fused", combination_type=method, **options)
    except (ValueError, RuntimeError, TypeError) as exc:
        raise MergeError(f"{method}: {exc}") from exc
    finally:
        found = {
            name.removeprefix("base_model.model."): Factors(
                module.lora_A["fused"].weight.detach().float().numpy().copy(),
                # Scale 1 is what PEFT means here; beside an rsLoRA parent it would multiply by the root of the rank.
                module.lora_B["fused"].weight.detach().float().numpy().copy(),
            )
            for name, module in made.model.named_modules()
            if "fused" in getattr(module, "lora_A", {})
        }
        if "fused" in made.model.peft_config:
            made.model.delete_adapter("fused")
    return found


def _errors(
    method: str, updates: Sequence[Mapping[str, Factors]], shares: Sequence[float], max_rank: int
) -> dict[str, float]:
    """By layer, what the cut of the sum left out; other methods have no sum to be held against."""
    if method not in OWN:
        return {}
    rank = max_rank if method == "svd" else 1 << 16
    return {module: cut(each, rank)[1] for module, each in weighted_sum(updates, shares).items()}


def _rungs(parents: Sequence[Parent], chosen: Tried) -> tuple[Rung, ...]:
    """One for each parent; a fused adapter is meant to differ from each, so nothing is a limit."""
    return tuple(
        parent_rung(f"adapter against {parent.name}", parent, figures, Limits(stop_drop=None))
        for parent, figures in zip(parents, chosen.distances, strict=True)
    )


def _own(figures: Figures) -> Divergence:
    return figures.get("goldens") or figures["all"]
