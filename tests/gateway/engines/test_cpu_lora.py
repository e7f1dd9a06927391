import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engines.cpu_lora import FEW_RUNS, LONG_RUN, NO_ADAPTER, Batch

SLOTS, RANK, INPUTS, WIDTHS = 4, 2, 6, (5, 3)
SHORT, LONG = st.integers(1, LONG_RUN - 1), st.integers(LONG_RUN, LONG_RUN + 3)
RUNS = st.lists(st.tuples(st.integers(NO_ADAPTER, SLOTS - 1), SHORT | LONG), min_size=1, max_size=FEW_RUNS + 6)


def layer() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    a = [torch.randn(SLOTS, 1, RANK, INPUTS, dtype=torch.float64) for _ in WIDTHS]
    b = [torch.randn(SLOTS, 1, width, RANK, dtype=torch.float64) for width in WIDTHS]
    return a, b


@settings(deadline=None)
@given(RUNS)
def test_every_token_gets_its_own_adapters_update_and_tokens_of_none_get_none(runs: list[tuple[int, int]]) -> None:
    slots = [slot for slot, length in runs for _ in range(length)]
    a, b = layer()
    x = torch.randn(len(slots), INPUTS, dtype=torch.float64)
    y = torch.ones(len(slots), sum(WIDTHS), dtype=torch.float64)
    Batch(slots).add_updates(x, y, a, b, WIDTHS, 0.5)
    for row, slot in enumerate(slots):
        updates = [0.5 * b_of[slot, 0] @ a_of[slot, 0] @ x[row] for a_of, b_of in zip(a, b, strict=True)]
        expected = 1 + torch.cat(updates) * (slot != NO_ADAPTER)
        torch.testing.assert_close(y[row], expected)


@pytest.mark.parametrize("others", [[1], [1, 2, 1, 2], [1] * LONG_RUN])
def test_an_adapter_of_nans_reaches_only_its_own_tokens(others: list[int]) -> None:
    a, b = layer()
    for weights in (*a, *b):
        weights[3] = float("nan")
    slots = [3, *others, NO_ADAPTER]
    y = torch.zeros(len(slots), sum(WIDTHS), dtype=torch.float64)
    Batch(slots).add_updates(torch.ones(len(slots), INPUTS, dtype=torch.float64), y, a, b, WIDTHS, 1.0)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()
