"""Promotion and rollback, as a pure decision."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.alias import KEPT_FORMER, Alias
from adapters.errors import ConflictError

VERSIONS = st.integers(1, 5)


def alias_after(promotions: list[int]) -> Alias:
    alias = Alias()
    for version in promotions:
        alias = alias.promoted(version)
    return alias


@given(promotions=st.lists(VERSIONS, min_size=1), version=VERSIONS)
def test_a_rollback_undoes_the_last_promotion(promotions: list[int], version: int) -> None:
    before = alias_after(promotions)
    after = before.promoted(version)
    if after != before:
        assert after.rolled_back().production == before.production


@given(promotions=st.lists(VERSIONS), version=VERSIONS)
def test_a_version_that_is_gone_is_neither_in_production_nor_a_way_back(promotions: list[int], version: int) -> None:
    alias = alias_after(promotions).without(version)
    assert alias.production != version
    assert version not in alias.former


@given(promotions=st.lists(VERSIONS), gone=st.lists(VERSIONS))
def test_the_previous_version_always_differs_from_production(promotions: list[int], gone: list[int]) -> None:
    alias = alias_after(promotions)
    for version in gone:
        alias = alias.without(version)
        assert alias.previous is None or alias.previous != alias.production


def test_promoting_what_is_in_production_changes_nothing() -> None:
    alias = alias_after([1, 2])
    assert alias.promoted(2) is alias


def test_several_rollbacks_go_back_one_version_each() -> None:
    alias = alias_after([1, 2, 3])
    assert alias.rolled_back().rolled_back() == Alias(1)


def test_rolling_back_without_a_previous_version_is_refused() -> None:
    with pytest.raises(ConflictError, match="no earlier production version"):
        alias_after([1]).rolled_back()


def test_the_memory_of_former_versions_is_bounded() -> None:
    assert len(alias_after(list(range(1, 1000))).former) == KEPT_FORMER
