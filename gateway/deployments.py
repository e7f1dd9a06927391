"""Merged versions on engines of their own: started as the registry wants them, watched, given their share, drained and stopped.

What is wanted stands in the registry, so a gateway that starts again brings back what it served before. An engine is a
gateway's business where the checkpoint's files are; elsewhere the same version is answered by base + adapter.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterNotFoundError
from adapters.merged_store import quantized_difference
from adapters.records import AdapterVersion, Deployment, Snapshot
from adapters.registry import Registry
from gateway.admission import Admission, Scheduler
from gateway.breaker import Breaker
from gateway.canary import Canary, reference_file
from gateway.directory import Directory
from gateway.engines.profile import BASE_NAME, EngineProfile, dedicated_profile
from gateway.engines.protocol import Engine, EngineHost
from gateway.errors import AdapterLoadError, EngineStartError, NoReplicaError
from gateway.fleet import Fleet, Replica
from gateway.metrics import Metrics
from gateway.probe import score
from gateway.residency import Residency
from gateway.resolve import MERGED, Target, servable
from gateway.settings import ProbeSettings, Settings

logger = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
Key = tuple[str, str, int]  # tenant, adapter, version
OnReady = Callable[[Engine], Awaitable[None]]
# deployment, profile, number among this machine's engines, what a started engine is handed to
MakeDedicated = Callable[[Deployment, EngineProfile, int, OnReady], EngineHost]


@dataclass(eq=False)
class Dedicated:
    """The engine of one version."""

    deployment: Deployment  # another one when its share changes
    number: int  # among this machine's engines
    fleet: Fleet  # of this one replica
    canary: Canary
    problem: str | None = None  # why it did not start the first time
    answered: Counter[str] = field(default_factory=Counter)  # form -> requests since this gateway knows the engine
    left: asyncio.Event = field(default_factory=asyncio.Event)  # it is wanted no longer

    @property
    def replica(self) -> Replica:
        return self.fleet.replicas[0]

    @property
    def state(self) -> str:
        """As of an engine's host; draining once it is wanted no longer."""
        return "draining" if self.left.is_set() else self.replica.state


class Deployments:
    """What this gateway runs of what the registry wants. `run` must be running for engines to come and go."""

    def __init__(
        self,
        directory: Directory,
        open_dedicated: Callable[[Deployment, int], Dedicated],
        *,
        base: str,
        merged: Path,
        engines: int,
        grace_s: float,
        refresh_s: float,
        forget: Callable[[str], None] = lambda _: None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """base: weights digest of the served base. merged: folder of the checkpoints. engines: shared ones of this machine.

        grace_s: for running answers when an engine is taken down. forget: told the id of one that is gone. draw: uniform in
        [0, 1), decides who goes to a version's engine.
        """
        self._directory = directory
        self._open = open_dedicated
        self._base = base
        self._merged = merged
        self._engines = engines
        self._grace_s = grace_s
        self._refresh_s = refresh_s
        self._forget = forget
        self._draw = draw
        self._live: dict[Key, Dedicated] = {}
        self._leaving: list[Dedicated] = []
        self._seen: Snapshot | None = None
        self._deferred = False  # one that is wanted waits until the one before it has let go of its socket
        self.problems: dict[Key, str] = {}  # why an engine could not even be tried

    @property
    def running(self) -> list[Dedicated]:
        """Those that leave too, as long as there is anything of them."""
        return [*self._live.values(), *self._leaving]

    def find(self, target: Target) -> Dedicated | None:
        """The engine of the version that is meant; None where it has none here.

        Raises, where the caller asks for the merged form by name, NoReplicaError when it is wanted but not here, and
        AdapterNotFoundError when it is not wanted.
        """
        version = target.version
        if version is None or not (self._live or target.form):
            return None
        key = version.tenant, version.adapter, version.version
        found = self._live.get(key)
        if found is None and target.form == MERGED:
            if key in self._directory.snapshot.deployments:
                raise NoReplicaError
            raise AdapterNotFoundError(target.requested)
        return found

    def chooses(self, one: Dedicated, target: Target) -> bool:
        """Whether this request goes to the engine of its version: as the caller says, else by its share while it is well."""
        if target.form:
            return target.form == MERGED
        return self._draw() < one.deployment.share and one.replica.available

    async def run(self) -> None:
        """Follow the registry for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                snapshot = self._directory.snapshot
                if snapshot is not self._seen or self._deferred:
                    wanted = await asyncio.to_thread(self._wanted, snapshot)
                    self._reconcile({one.key: one for one in wanted}, group)
                    self._seen = snapshot
                await asyncio.sleep(self._refresh_s)

    def _wanted(self, snapshot: Snapshot) -> list[Deployment]:
        """Of ready versions for this base, whose files are here."""
        return [
            one
            for key, one in snapshot.deployments.items()
            if servable(snapshot.versions[key], self._base) and (self._merged / one.folder).is_dir()
        ]

    def _reconcile(self, wanted: dict[Key, Deployment], group: asyncio.TaskGroup) -> None:
        for key, one in list(self._live.items()):
            now = wanted.get(key)
            if now is None or now.digest != one.deployment.digest or now.profile != one.deployment.profile:
                self._leaving.append(self._live.pop(key))
                one.left.set()
            else:
                one.deployment = now
        going = {one.deployment.key for one in self._leaving}
        self._deferred = not going.isdisjoint(wanted)
        self.problems = {key: why for key, why in self.problems.items() if key in wanted}
        for key in wanted.keys() - self._live.keys() - going:
            try:
                self._live[key] = self._open(wanted[key], self._free_number())
            except Exception as exc:  # one that cannot be had must not keep the others from being seen to
                logger.exception("deployment cannot be tried", extra={"engine": wanted[key].engine_id})
                self.problems[key] = str(exc) if isinstance(exc, EngineStartError) else f"{type(exc).__name__}: {exc}"
                continue
            self.problems.pop(key, None)
            group.create_task(self._keep(self._live[key]), name=f"deployment {wanted[key].engine_id}")

    def _free_number(self) -> int:
        taken = {one.number for one in self.running}
        return next(number for number in range(self._engines, self._engines + len(taken) + 1) if number not in taken)

    async def _keep(self, one: Dedicated) -> None:
        """Start and watch an engine until it is wanted no longer. When the gateway stops, `stop_all` of services stops it."""
        working = [asyncio.create_task(self._start(one)), asyncio.create_task(one.canary.watch(one.replica))]
        try:
            await one.left.wait()
            await self._drained(one.replica)
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        try:
            await one.replica.host.stop()
        except Exception:
            logger.exception("engine did not stop", extra={"engine": one.replica.id})
        self._leaving.remove(one)
        self._forget(one.replica.id)
        logger.info("engine taken down", extra={"engine": one.replica.id, "adapter": one.deployment.folder})

    async def _start(self, one: Dedicated) -> None:
        try:
            await one.replica.host.start()
            one.problem = None
        except Exception as exc:  # the host tries again
            logger.exception("engine did not start", extra={"engine": one.replica.id})
            one.problem = str(exc) if isinstance(exc, EngineStartError) else f"{type(exc).__name__}: {exc}"

    async def _drained(self, replica: Replica) -> None:
        """Return when nobody uses or awaits it any more, or the grace is over."""
        ends_s = time.monotonic() + self._grace_s
        while time.monotonic() < ends_s:
            if not (replica.admission.in_flight or replica.admission.waiting):
                return
            await asyncio.sleep(DRAIN_POLL_S)


def open_dedicated(
    deployment: Deployment,
    number: int,
    *,
    settings: Settings,
    profile: EngineProfile,
    registry: Registry,
    metrics: Metrics,
    make_host: MakeDedicated,
) -> Dedicated:
    """The engine of one version, not yet started, with everything the gateway keeps beside it. profile: of the shared engines.

    Raises EngineStartError, and ValidationError for a profile that is none.
    """
    own = profile_of(deployment, profile)
    store = reference_file(settings.home, deployment.digest, own.name)
    canary = Canary(
        BASE_NAME, store, settings.canary, failed=lambda engine: metrics.canary_failures.labels(engine).inc()
    )
    breaker = Breaker(failures=settings.failure.breaker_failures, open_s=settings.failure.breaker_open_s)

    async def on_ready(engine: Engine) -> None:
        await canary.calibrate(engine)
        await ask_goldens(engine, deployment, registry, settings.probe)
        breaker.renew(time.monotonic())
        metrics.starts.labels(engine.id).inc()

    scheduler = Scheduler(slots=1, max_in_flight=own.max_in_flight, patience_s=settings.requests.patience_s)
    admission = Admission(
        scheduler,
        max_queue=settings.requests.max_queue,
        tenant_queue=settings.requests.tenant_queue,
        longest_wait_s=settings.requests.queue_s,
    )
    host = make_host(deployment, own, number, on_ready)
    residency = Residency(_no_adapters, _nothing, capacity=1, settings=settings.residency, metrics=metrics)
    replica = Replica(host, residency, admission, breaker, slots=0)
    metrics.starts.labels(replica.id)
    metrics.canary_failures.labels(replica.id)
    return Dedicated(deployment, number, Fleet((replica,), max_waiting=settings.requests.max_queue), canary)


def profile_of(deployment: Deployment, shared: EngineProfile) -> EngineProfile:
    """The profile it was deployed with, else what is derived from that of the shared engines. Raises ValidationError."""
    if deployment.profile is None:
        return dedicated_profile(shared)
    return EngineProfile.model_validate(dict(deployment.profile)).model_copy(update={"lora": False})


async def ask_goldens(engine: Engine, deployment: Deployment, registry: Registry, settings: ProbeSettings) -> None:
    """The version's goldens, asked of its merged form before it takes traffic; without goldens nothing is asked.

    Raises EngineStartError when the answers are not those of training, and what asking an engine raises.
    """
    version, quantized = await asyncio.to_thread(_manifest_and_quantization, registry, deployment)
    goldens = version.manifest.goldens[: settings.goldens] if version.manifest is not None else []
    apart: list[float] = []
    for golden in goldens:
        ids = golden.prompt_token_ids + golden.completion_token_ids
        served = await score(engine, BASE_NAME, ids, timeout_s=settings.timeout_s)
        answer = served[-len(golden.completion_token_ids) :]
        apart += [abs(a - b) for a, b in zip(answer, golden.logprobs, strict=True)]
    mean, allowed = sum(apart) / max(len(apart), 1), settings.tolerance + quantized
    if not mean <= allowed:  # written so that NaN fails
        raise EngineStartError(
            f"Engine '{engine.id}' started, but answers the goldens of {deployment.adapter}@{deployment.version} with "
            f"log-probabilities {mean:.3f} nats from those of training on average (at most {allowed:.3g})."
        )


def _manifest_and_quantization(registry: Registry, deployment: Deployment) -> tuple[AdapterVersion, float]:
    """The version with its manifest read, and how far its form was from it when it was quantized."""
    version = registry.version(*deployment.key)
    forms = [form for form in registry.forms(*deployment.key) if form.digest == deployment.digest]
    version.manifest  # noqa: B018  read here, in a thread
    return version, max((quantized_difference(form.report) for form in forms), default=0.0)


async def _no_adapters(version: AdapterVersion) -> Path:
    raise AdapterLoadError(f"An engine of one merged version loads no adapter, such as '{version.engine_name}'.")


def _nothing() -> Iterable[AdapterVersion]:
    return ()
