"""The replicas behind this gateway: each an engine, what it holds, and who waits for it."""

from dataclasses import dataclass

from adapters.registry import AdapterVersion
from gateway.admission import Admission
from gateway.engines.protocol import Engine, EngineHost
from gateway.residency import Residency
from gateway.routing import ReplicaView, choose_replica


@dataclass(frozen=True)
class Replica:
    """One engine we may route to."""

    host: EngineHost
    residency: Residency
    admission: Admission
    slots: int

    @property
    def id(self) -> str:
        return self.host.engine.id

    @property
    def engine(self) -> Engine:
        return self.host.engine

    @property
    def state(self) -> str:
        return self.host.state

    @property
    def ready(self) -> bool:
        return self.host.state == "ready"

    async def restart(self, reason: str) -> None:
        await self.host.restart(reason)

    def view(self) -> ReplicaView:
        return ReplicaView(
            id=self.id,
            healthy=self.ready,
            queue_s=self.admission.expected_wait_s(),
            in_flight=self.admission.in_flight,
            resident=frozenset(self.residency.resident),
        )


@dataclass(frozen=True)
class Fleet:
    replicas: tuple[Replica, ...]

    @property
    def ready(self) -> bool:
        return any(replica.ready for replica in self.replicas)

    def choose(self, engine_name: str | None) -> Replica:
        """The replica expected to answer first. Raises NoReplicaError."""
        if len(self.replicas) == 1 and self.replicas[0].ready:
            return self.replicas[0]
        chosen = choose_replica(engine_name, [replica.view() for replica in self.replicas])
        return next(replica for replica in self.replicas if replica.id == chosen.id)

    async def warm(self, version: AdapterVersion) -> None:
        """Load the version on every ready replica, so that the first request after an alias moved finds it there."""
        for replica in self.replicas:
            if replica.ready:
                async with replica.residency.hold(version):
                    pass
