"""Who may ask whom in a phase, and who asks next. Pure, but for the turns of a round robin."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from loadtests.phases import Phase
from loadtests.popularity import AnyPopularity, RoundRobin, WeightFiles, pick, shares

Models = Mapping[str, Sequence[str]]  # of each tenant, the adapters it may ask, most popular first


def reach(phase: Phase, models: Models) -> dict[str, tuple[str, ...]]:
    """What the phase leaves of each tenant's adapters; without the tenants it leaves nothing.

    Raises ValueError naming adapters that the phase wants and no tenant has.
    """
    wanted = phase.adapters
    if isinstance(wanted, int):
        for tenant, names in models.items():
            if len(names) < wanted:
                raise ValueError(f"phase {phase.name}: {wanted} adapters wanted, tenant {tenant} has {len(names)}")
        return {tenant: tuple(names[:wanted]) for tenant, names in models.items()}
    if wanted is None:
        return {tenant: tuple(names) for tenant, names in models.items()}
    if unknown := [name for name in wanted if not any(name in names for names in models.values())]:
        raise ValueError(f"phase {phase.name}: no tenant may ask {', '.join(unknown)}")
    left = {tenant: tuple(name for name in wanted if name in names) for tenant, names in models.items()}
    return {tenant: names for tenant, names in left.items() if names}


class Chooser:
    """Gives each request its tenant and adapter from two uniform draws in [0, 1)."""

    def __init__(
        self,
        tenant_shares: Mapping[str, float],
        adapters: Models,
        popularity: AnyPopularity,
        *,
        files: WeightFiles | None = None,
        rotate_s: float | None = None,
    ) -> None:
        """adapters: of each tenant in tenant_shares. Raises ValueError when no adapter of a tenant has a share."""
        self._tenants = list(tenant_shares)
        self._tenant_shares = list(itertools.accumulate(tenant_shares.values()))
        self._adapters = {tenant: adapters[tenant] for tenant in self._tenants}
        self._shares = {t: np.cumsum(shares(popularity, names, files)).tolist() for t, names in self._adapters.items()}
        for tenant, cumulative in self._shares.items():
            if not cumulative[-1]:
                raise ValueError(f"the weights file gives none of the adapters of tenant {tenant} a weight")
        self._turns = {tenant: itertools.count() for tenant in self._tenants}
        self._in_turn = isinstance(popularity, RoundRobin)
        self._rotate_s = rotate_s

    def choose(self, tenant_draw: float, adapter_draw: float, offset_s: float) -> tuple[str, str]:
        """offset_s: of the request from the phase's start; by it the ranks rotate."""
        tenant = self._tenants[pick(self._tenant_shares, tenant_draw)]
        names = self._adapters[tenant]
        rank = next(self._turns[tenant]) if self._in_turn else pick(self._shares[tenant], adapter_draw)
        moved = int(offset_s // self._rotate_s) if self._rotate_s else 0
        return tenant, names[(rank + moved) % len(names)]
