"""What takes all rows at once: duplicates, which rows are held out, balance and mix. Every row gets one fate, by seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from trainer.data.balance import distance, general_rows, plan_resampling
from trainer.data.groups import Groups, Kind, Neighbours, join_equal
from trainer.data.recipe import BuildConfig, SplitConfig
from trainer.data.store import Ids, Mask, RowStore, drawn

Told = Callable[[str], None]


class Fate(IntEnum):
    """What became of a row."""

    TRAIN = 0
    EVAL = 1
    EXACT = 2
    NEAR = 3
    LEAK = 4
    BALANCE = 5
    MIX = 6


@dataclass(frozen=True)
class Roles:
    """What each row was read as. [rows] each."""

    evaluation: Mask
    general: Mask

    @property
    def own(self) -> Mask:
        return ~(self.evaluation | self.general)


@dataclass
class Selection:
    """fates: [rows] of Fate. twins: [rows], the row that a duplicate repeats, or that a leak would give away."""

    fates: NDArray[np.uint8]
    twins: Ids
    groups: int  # of several rows with equal or near prompts, kept on one side
    largest_group: int
    classes_before: dict[str, int] | None = None  # of the training rows, before resampling

    def rows(self, *fates: Fate) -> Ids:
        return np.flatnonzero(np.isin(self.fates, fates))


def select(
    config: BuildConfig,
    store: RowStore,
    roles: Roles,
    neighbours: Neighbours,
    *,
    classes: Sequence[str],
    production: Mapping[str, float] | None,
    tell: Told,
) -> Selection:
    """classes: name of each number in the column `label`, which counts from 1; 0 is none."""
    alive = np.ones(store.count, dtype=np.bool_)
    fates = np.zeros(store.count, dtype=np.uint8)
    tell("exact duplicates")
    twins = Groups(store.count)
    join_equal(twins, store.equal_pairs("exact", alive))
    _drop_repeats(fates, alive, twins, Fate.EXACT, drop=config.duplicates.exact, roles=roles)
    tell("near duplicates")
    neighbours.join_near(twins, "text", alive)
    _drop_repeats(fates, alive, twins, Fate.NEAR, drop=config.duplicates.near, roles=roles)
    tell("prompts alike")
    together = Groups(twins.roots())
    if config.format != "text":  # a text is its own prompt
        join_equal(together, store.equal_pairs("asked", alive))
        neighbours.join_near(together, "prompt", alive)
    roots = together.roots()
    tell("split")
    given = alive & roles.evaluation
    held_out = given if config.evaluation else hold_out(alive & roles.own, roots, config.split, config.seed)
    fates[held_out] = Fate.EVAL
    selection = Selection(fates, twins.roots(), *_sizes(roots[alive]))
    alive &= ~held_out
    first_held_out = np.full(store.count, -1, dtype=np.int64)
    places = np.flatnonzero(held_out)[::-1]
    first_held_out[roots[places]] = places
    _leak(selection, alive, first_held_out[roots])
    kinds: tuple[Kind, ...] = ("text",) if config.format == "text" else ("text", "prompt")
    for evaluated, trained, similarity in neighbours.meeting(held_out, alive, kinds):
        if similarity >= config.duplicates.similarity and alive[trained]:
            fates[trained], selection.twins[trained], alive[trained] = Fate.LEAK, evaluated, False
    labels = store.column("label")
    own = alive & roles.own
    if classes:
        selection.classes_before = count_classes(labels[own], classes)
        if config.balance is not None and config.balance.action == "resample" and production is not None:
            tell("balance")
            plan = plan_resampling(selection.classes_before, production, tolerance=config.balance.tolerance)
            if distance(selection.classes_before, production) > config.balance.tolerance:
                gone = surplus(own, labels, classes, plan, config.seed)
                fates[gone], alive[gone] = Fate.BALANCE, False
    general = np.flatnonzero(alive & roles.general)
    if config.general is not None:
        wanted = general_rows(int((alive & roles.own).sum()), config.general.share)
        order = general[np.argsort(drawn(general, config.seed), kind="stable")]
        fates[order[wanted:]] = Fate.MIX
    return selection


def _drop_repeats(
    fates: NDArray[np.uint8], alive: Mask, groups: Groups, fate: Fate, *, drop: bool, roles: Roles
) -> None:
    """All but the first of each group go; what repeats a held-out row is a leak, whichever way it was found."""
    roots = groups.roots()
    repeats = alive & (roots != np.arange(len(roots)))
    leaks = repeats & roles.evaluation[roots] & ~roles.evaluation
    fates[leaks] = Fate.LEAK
    alive &= ~leaks
    if drop:
        gone = repeats & ~leaks
        fates[gone] = fate
        alive &= ~gone


def _leak(selection: Selection, alive: Mask, held_out: Ids) -> None:
    """held_out: [rows], a held-out row that each row may not be trained beside, or -1."""
    leaks = alive & (held_out >= 0)
    selection.fates[leaks] = Fate.LEAK
    selection.twins[leaks] = held_out[leaks]
    alive &= ~leaks


def _sizes(roots: Ids) -> tuple[int, int]:
    """(groups of several rows, rows of the largest)"""
    _, counts = np.unique(roots, return_counts=True)
    return int((counts > 1).sum()), int(counts.max(initial=0))


def hold_out(rows: Mask, roots: Ids, split: SplitConfig, seed: int) -> Mask:
    """Whole groups, drawn by seed, until enough rows are held out. Groups that would be too many rows are passed over."""
    total = int(rows.sum())
    target = min(split.eval_rows, max(1, round(total * split.eval_share))) if total > 1 else 0
    groups, counts = np.unique(roots[rows], return_counts=True)
    order = np.argsort(drawn(groups, seed ^ 0x5917), kind="stable")
    chosen = np.zeros(len(rows), dtype=np.bool_)
    left = target
    for place in order.tolist():
        if left == 0:
            break
        if counts[place] <= left and counts[place] < total:
            chosen[groups[place]] = True
            left -= int(counts[place])
    return rows & chosen[roots]


def count_classes(labels: NDArray[np.uint16], classes: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(labels, minlength=len(classes) + 1)
    return {name: int(counts[number]) for number, name in enumerate(classes, start=1) if counts[number]}


def surplus(own: Mask, labels: NDArray[np.uint16], classes: Sequence[str], plan: Mapping[str, int], seed: int) -> Ids:
    """Rows of each class beyond its plan, drawn by seed. Rows without a class stay."""
    gone: list[Ids] = [np.empty(0, dtype=np.int64)]
    for number, name in enumerate(classes, start=1):
        rows = np.flatnonzero(own & (labels == number))
        order = rows[np.argsort(drawn(rows, seed ^ 0xBA1A), kind="stable")]
        gone.append(order[plan.get(name, 0) :])
    return np.concatenate(gone)
