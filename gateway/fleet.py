"""The replicas behind this gateway: each an engine, what it holds, who waits for it, and how it has answered lately."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from adapters.registry import AdapterVersion
from gateway.admission import Admission
from gateway.breaker import Breaker
from gateway.engines.protocol import Engine, EngineHost
from gateway.errors import (
    EngineAnswerError,
    EngineStalledError,
    EngineUnavailableError,
    NoReplicaError,
    OverloadedError,
)
from gateway.relay import StreamBrokenError
from gateway.residency import Residency
from gateway.routing import ReplicaView, choose_replica

POLL_S = 0.05  # while no replica takes requests: an engine's state tells no event
SECOND_LOOK_S = 0.5  # a replica that failed a request is asked again after this, should it still call itself ready
HEALTH_S = 2.0  # an engine that takes longer to say that it is well is not
COMING = frozenset(
    ["starting", "restoring", "restarting", "ready"]
)  # states from which an engine may soon take requests


@dataclass(frozen=True)
class Replica:
    """One engine we may route to."""

    host: EngineHost
    residency: Residency
    admission: Admission
    breaker: Breaker
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
        """Its engine is up and has its adapters."""
        return self.host.state == "ready"

    @property
    def available(self) -> bool:
        """It takes requests: ready, and not known to fail."""
        return self.ready and self.breaker.admits(time.monotonic())

    def proven(self, within_s: float) -> bool:
        """It takes requests and gave a whole answer, the canary's or a caller's, within the last so many seconds."""
        answered_s = self.breaker.answered_s
        return self.available and answered_s is not None and time.monotonic() - answered_s <= within_s

    async def restart(self, reason: str) -> None:
        await self.host.restart(reason)

    def answered(self) -> None:
        """A real generation has just succeeded."""
        self.breaker.succeeded(time.monotonic())

    @asynccontextmanager
    async def asked(self, *, generation: bool = True) -> AsyncIterator[None]:
        """Around one request to the engine, so that the breaker learns how it ended. generation: a success proves something.

        Raises NoReplicaError while the breaker is open. An error of an engine that has died inside becomes
        EngineUnavailableError.
        """
        attempt = self.breaker.begin(time.monotonic())
        try:
            yield
            if generation:
                self.answered()
        except Exception as exc:
            fault = exc.__cause__ if isinstance(exc, StreamBrokenError) else exc
            own = isinstance(fault, EngineAnswerError) and fault.status >= 500 and not await self._healthy()
            if own or isinstance(fault, EngineUnavailableError | EngineStalledError):
                self.breaker.failed(attempt, time.monotonic())
            if own and exc is fault:
                raise EngineUnavailableError(str(fault)) from exc
            raise
        finally:
            self.breaker.end(attempt)

    async def _healthy(self) -> bool:
        """A single refusal with a status of 500 may be the request's fault; an engine that is dead inside says so."""
        try:
            async with asyncio.timeout(HEALTH_S):
                return await self.engine.healthy()
        except TimeoutError:
            return False

    def view(self) -> ReplicaView:
        return ReplicaView(
            id=self.id,
            healthy=self.available,
            queue_s=self.admission.expected_wait_s(),
            in_flight=self.admission.in_flight,
            resident=frozenset(self.residency.resident),
        )


@dataclass
class Fleet:
    """max_waiting: requests that may wait for any engine to come back."""

    replicas: tuple[Replica, ...]
    max_waiting: int
    waiting: int = field(default=0, init=False)

    def proven(self, within_s: float) -> bool:
        """At least one replica takes requests and has shown lately that it can answer them."""
        return any(replica.proven(within_s) for replica in self.replicas)

    def choose(self, engine_name: str | None, *, avoid: Collection[str] = ()) -> Replica:
        """The replica expected to answer first. avoid: ids. Raises NoReplicaError."""
        if len(self.replicas) == 1 and not avoid and self.replicas[0].available:
            return self.replicas[0]
        views = [replica.view() for replica in self.replicas if replica.id not in avoid]
        chosen = choose_replica(engine_name, views)
        return next(replica for replica in self.replicas if replica.id == chosen.id)

    async def available(self, engine_name: str | None, *, until_s: float, failed: Collection[str] = ()) -> Replica:
        """The replica expected to answer first, waited for while one may come back. until_s: on the monotonic clock.

        failed: ids of replicas that have just failed this request; others are preferred, for a moment.
        Raises NoReplicaError when time is up or none will come, OverloadedError when too many wait.
        """
        with contextlib.suppress(NoReplicaError):
            return self.choose(engine_name, avoid=failed)
        if self.waiting >= self.max_waiting:
            raise OverloadedError(
                "Too many requests are waiting for an engine.", retry_after_s=NoReplicaError().retry_after_s
            )
        again_s = time.monotonic() + SECOND_LOOK_S
        self.waiting += 1
        try:
            while True:
                await asyncio.sleep(POLL_S)
                now_s = time.monotonic()
                try:
                    return self.choose(engine_name, avoid=failed if now_s < again_s else ())
                except NoReplicaError:
                    if now_s >= until_s or not any(replica.state in COMING for replica in self.replicas):
                        raise
        finally:
            self.waiting -= 1

    @contextmanager
    def claim(self, version: AdapterVersion) -> Iterator[None]:
        """Keep the version on whatever replica this request may come to."""
        with contextlib.ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica.residency.claim(version))
            yield

    async def warm(self, version: AdapterVersion) -> None:
        """Load the version on every ready replica, so that the first request after an alias moved finds it there."""
        for replica in self.replicas:
            if replica.ready:
                async with replica.residency.hold(version):
                    pass
