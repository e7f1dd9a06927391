from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.audience import Chooser, reach
from loadtests.phases import Phase
from loadtests.popularity import HotSet, RoundRobin, Uniform

MODELS = {"acme": ["a", "b", "c", "d"], "zeta": ["c", "z"]}


def phase(adapters: int | list[str] | None) -> Phase:
    return Phase(name="steady", duration_s=1, adapters=adapters)


def test_a_phase_may_leave_each_tenant_its_first_adapters_or_those_it_names() -> None:
    assert reach(phase(None), MODELS) == {"acme": ("a", "b", "c", "d"), "zeta": ("c", "z")}
    assert reach(phase(2), MODELS) == {"acme": ("a", "b"), "zeta": ("c", "z")}
    assert reach(phase(["c", "a"]), MODELS) == {"acme": ("c", "a"), "zeta": ("c",)}
    assert reach(phase(["b"]), MODELS) == {"acme": ("b",)}


def test_a_phase_cannot_have_adapters_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="3 adapters wanted, tenant zeta has 2"):
        reach(phase(3), MODELS)
    with pytest.raises(ValueError, match="no tenant may ask x"):
        reach(phase(["a", "x"]), MODELS)


@given(tenant_draws=st.lists(st.floats(0, 1, exclude_max=True)))
def test_a_round_robin_asks_each_tenants_adapters_in_turn_exactly(tenant_draws: list[float]) -> None:
    chooser = Chooser({"acme": 2.0, "zeta": 1.0}, MODELS, RoundRobin(kind="round_robin"))
    asked: dict[str, list[str]] = {"acme": [], "zeta": []}
    for draw in tenant_draws:
        tenant, adapter = chooser.choose(draw, 0.5, 0.0)
        asked[tenant].append(adapter)
    for tenant, adapters in asked.items():
        assert adapters == (MODELS[tenant] * len(adapters))[: len(adapters)]


def test_the_hot_set_moves_on_by_one_adapter_every_so_often() -> None:
    chooser = Chooser({"acme": 1.0}, MODELS, HotSet(kind="hot_set", size=2, share=1.0), rotate_s=10)
    draws = np.random.default_rng(0).random(50)

    def hot(at_s: float) -> set[str]:
        return {chooser.choose(0.0, draw, at_s)[1] for draw in draws}

    assert [hot(at_s) for at_s in (0, 9.9, 10, 25, 30, 40)] == [
        {"a", "b"},
        {"a", "b"},
        {"b", "c"},
        {"c", "d"},
        {"d", "a"},
        {"a", "b"},
    ]


def test_tenants_come_by_their_shares_and_without_one_never() -> None:
    chooser = Chooser({"acme": 3.0, "idle": 0.0, "zeta": 1.0}, {**MODELS, "idle": ["i"]}, Uniform())
    draws = np.random.default_rng(1).random((4000, 2))
    counts = Counter(chooser.choose(first, second, 0.0)[0] for first, second in draws)
    assert counts["acme"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert counts["idle"] == 0
