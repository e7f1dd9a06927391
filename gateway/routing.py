"""Choose the replica for a request. Pure: sees a snapshot of the fleet, touches nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.errors import NoReplicaError

LOAD_S = 0.05  # a warm load of a 10 MB adapter measures 17 to 30 ms; doubled for the streams it stops


@dataclass(frozen=True)
class ReplicaView:
    """What routing may know about a replica."""

    id: str
    healthy: bool
    queue_s: float  # wait expected by one who comes now
    in_flight: int
    resident: frozenset[str]  # engine names it holds


def choose_replica(adapter: str | None, replicas: Sequence[ReplicaView], *, load_s: float = LOAD_S) -> ReplicaView:
    """The replica expected to answer first: its queue, plus load_s where the adapter still has to be loaded.

    Raises NoReplicaError when no replica is healthy.
    """
    healthy = [replica for replica in replicas if replica.healthy]
    if not healthy:
        raise NoReplicaError

    def cost(replica: ReplicaView) -> tuple[float, int, str]:
        cold = adapter is not None and adapter not in replica.resident
        return replica.queue_s + (load_s if cold else 0.0), replica.in_flight, replica.id

    return min(healthy, key=cost)
