import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import NoReplicaError
from gateway.routing import ReplicaView, choose_replica


def replica(
    name: str, *, healthy: bool = True, queue_s: float = 0.0, in_flight: int = 0, resident: str = ""
) -> ReplicaView:
    return ReplicaView(name, healthy, queue_s, in_flight, frozenset(resident))


def test_the_replica_that_holds_the_adapter_is_preferred() -> None:
    assert choose_replica("a", [replica("r1"), replica("r2", resident="a")]).id == "r2"


def test_a_long_queue_outweighs_a_load() -> None:
    assert choose_replica("a", [replica("r1"), replica("r2", queue_s=5.0, resident="a")], load_s=0.5).id == "r1"


def test_the_base_goes_where_least_is_running() -> None:
    assert choose_replica(None, [replica("r1", in_flight=3), replica("r2", in_flight=1)]).id == "r2"


@given(st.lists(st.builds(replica, st.uuids().map(str), healthy=st.booleans(), queue_s=st.floats(0, 100)), max_size=6))
def test_only_healthy_replicas_are_chosen(replicas: list[ReplicaView]) -> None:
    if not any(one.healthy for one in replicas):
        with pytest.raises(NoReplicaError):
            choose_replica("a", replicas)
    else:
        assert choose_replica("a", replicas).healthy
