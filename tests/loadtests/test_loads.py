import pytest
from pydantic import TypeAdapter, ValidationError

from loadtests.loads import AnyLoad, Load, describe_load


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({"kind": "poisson", "rate_per_s": 2}, "Poisson arrivals, 2/s (open loop)"),
        ({"kind": "constant", "rate_per_s": 2}, "constant arrivals, 2/s exactly (open loop)"),
        ({"kind": "gamma", "rate_per_s": 2, "cv": 3}, "gamma arrivals, 2/s, gaps with CV 3 (open loop)"),
        ({"kind": "ramp", "from_per_s": 0, "to_per_s": 9}, "Poisson arrivals from 0/s to 9/s (open loop)"),
        (
            {"kind": "trace", "path": "traces/conv.csv", "format": "azure", "speed": 4},
            "arrivals of conv.csv at 4 times their speed (open loop)",
        ),
        ({"kind": "touch", "gap_s": 2}, "each adapter twice, then all once more, 2 s apart (open loop)"),
        ({"kind": "closed", "concurrency": 3}, "3 callers that wait for their answers (closed loop: hides queues)"),
    ],
)
def test_each_kind_of_load_says_what_it_is(load: dict[str, object], said: str) -> None:
    adapter: TypeAdapter[AnyLoad] = TypeAdapter(Load)
    assert describe_load(adapter.validate_python(load)) == said


def test_a_ramp_from_nothing_to_nothing_is_refused() -> None:
    adapter: TypeAdapter[AnyLoad] = TypeAdapter(Load)
    with pytest.raises(ValidationError, match="nothing would be sent"):
        adapter.validate_python({"kind": "ramp", "from_per_s": 0, "to_per_s": 0})
