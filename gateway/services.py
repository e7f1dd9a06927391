"""What the endpoints are handed: built once, read-only, closed together."""

import asyncio
import functools
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import Request

from adapters.base import BaseModelInfo, find_base, read_base
from adapters.blobs import BlobStore, materialise
from adapters.database import open_database
from adapters.files import Files, open_file_blobs
from adapters.home import Home
from adapters.jobs import Jobs
from adapters.ledger import Ledger
from adapters.promotion import PromotionPolicy, load_policy
from adapters.registry import AdapterVersion, Deployment, LimitKind, LimitSubject, Registry, Scope, load_secret
from adapters.validation import EngineLimits
from gateway.admission import Admission, Scheduler
from gateway.breaker import Breaker
from gateway.canary import Canary, reference_file
from gateway.deployments import Deployments, MakeDedicated, open_dedicated
from gateway.directory import Directory
from gateway.drain import Drain
from gateway.engines.detect import largest_gpu_mib, profile_for
from gateway.engines.process import EngineProcess
from gateway.engines.profile import BASE_NAME, EngineProfile, load_profile, on_own_device
from gateway.engines.protocol import Engine, EngineHost
from gateway.files import Intake
from gateway.fleet import Fleet, Replica
from gateway.limits import Limiter
from gateway.metrics import Metrics
from gateway.onboarding import Onboarding
from gateway.pulse import beat
from gateway.residency import Fetch, Production, Residency
from gateway.resolve import Target, production_versions, resolve
from gateway.settings import Settings
from gateway.shared_buckets import SharedBuckets
from gateway.tasks import Tasks
from gateway.tenants import Caller, identify
from gateway.tracing import Tracer, open_tracer
from gateway.uploads import Uploads
from gateway.usage import Usage

logger = logging.getLogger(__name__)

OnReady = Callable[[Engine], Awaitable[None]]
MakeHost = Callable[[OnReady], EngineHost]


@dataclass(frozen=True)
class Services:
    """One gateway."""

    settings: Settings
    registry: Registry
    directory: Directory
    blobs: BlobStore
    base: BaseModelInfo
    limits: Limiter
    promotion_policy: PromotionPolicy
    fleet: Fleet
    deployments: Deployments
    onboarding: Onboarding
    canary: Canary
    uploads: Uploads
    intake: Intake
    jobs: Jobs
    metrics: Metrics
    tracer: Tracer
    ledger: Ledger
    usage: Usage
    drain: Drain
    started_at: int  # Unix seconds

    @property
    def ready(self) -> bool:
        """An engine has answered lately and takes requests, and so does the gateway."""
        proof_s = max(self.settings.failure.proof_s, 3 * self.settings.canary.interval_s)  # idle, only the canary asks
        return self.fleet.proven(proof_s) and not self.drain.began

    def resolve(self, model: str, tenant: str) -> Target:
        """What a tenant means by `model` now. Raises AdapterNotFoundError."""
        return resolve(
            model,
            tenant=tenant,
            snapshot=self.directory.snapshot,
            base=self.base.fingerprint.weights_digest,
            base_names=self.base_names,
        )

    @property
    def replicas(self) -> list[Replica]:
        """The shared engines, and those of one merged version each."""
        return [*self.fleet.replicas, *(one.replica for one in self.deployments.running)]

    @property
    def base_names(self) -> tuple[str, str]:
        """Names that mean the base model."""
        return self.base.name, self.base.slug


def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)


def identify_caller(request: Request, services: Services) -> Caller:
    return identify(request.headers, services.directory.snapshot, services.registry, now=time.time())


def caller_of(request: Request) -> Caller:
    return identify_caller(request, services_of(request))


ServicesDep = Annotated[Services, Depends(services_of)]
CallerDep = Annotated[Caller, Depends(caller_of)]


def base_folder(settings: Settings) -> Path:
    """Where the configured base model lies once it is prepared."""
    return find_base(settings.base, settings.home.models)


def chosen_profile(settings: Settings) -> EngineProfile:
    return load_profile(profile_for(largest_gpu_mib()) if settings.engine == "auto" else settings.engine)


def engine_process(settings: Settings, profile: EngineProfile, model: Path) -> MakeHost:
    """The real thing: supervised vLLMs, the next one with each call. Tests hand in another maker."""
    numbers = itertools.count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")

    def make(on_ready: OnReady) -> EngineHost:
        home, number = settings.home, next(numbers)
        own = on_own_device(profile, number, engines=settings.engines, visible=visible)
        name = f"engine-{number}"
        return EngineProcess(own, model, home.run, home.logs / f"{name}.log", id=name, on_ready=on_ready)

    return make


def dedicated_process(settings: Settings) -> MakeDedicated:
    """The real thing for one merged version. Tests hand in another maker."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")

    def make(deployment: Deployment, profile: EngineProfile, number: int, on_ready: OnReady) -> EngineHost:
        home, name = settings.home, deployment.engine_id
        own = on_own_device(profile, number, engines=number + 1, visible=visible)
        model, log = home.merged / deployment.folder, home.logs / f"{name}.log"
        return EngineProcess(own, model, home.run, log, id=name, on_ready=on_ready)

    return make


def open_replica(
    settings: Settings,
    profile: EngineProfile,
    make_host: MakeHost,
    *,
    fetch: Fetch,
    production: Production,
    canary: Canary,
    metrics: Metrics,
) -> Replica:
    """One engine, not yet started, with everything the gateway keeps beside it."""
    residency = Residency(
        fetch, production, capacity=profile.host_adapters, settings=settings.residency, metrics=metrics
    )
    breaker = Breaker(failures=settings.failure.breaker_failures, open_s=settings.failure.breaker_open_s)

    async def on_ready(engine: Engine) -> None:
        await canary.calibrate(engine)
        await residency.restore(engine)
        breaker.renew(time.monotonic())
        metrics.starts.labels(engine.id).inc()

    scheduler = Scheduler(
        slots=profile.slots,
        max_in_flight=profile.max_in_flight,
        patience_s=settings.requests.patience_s,
        spare_slots=settings.requests.spare_slots,
    )
    admission = Admission(
        scheduler,
        max_queue=settings.requests.max_queue,
        tenant_queue=settings.requests.tenant_queue,
        longest_wait_s=settings.requests.queue_s,
    )
    return Replica(make_host(on_ready), residency, admission, breaker, slots=profile.slots)


def open_limiter(settings: Settings, metrics: Metrics, usage: Usage) -> Limiter:
    """Raises SharedLimitsError for an address that cannot be one."""
    limits = settings.limits

    def spent(subject: LimitSubject) -> float:
        if subject.kind is LimitKind.KEY:
            return usage.key_spent_this_month(subject.name)
        return usage.spent_this_month(subject.tenant)

    shared = SharedBuckets(limits.redis_url, timeout_s=limits.redis_timeout_s) if limits.redis_url else None
    return Limiter(limits, metrics, spent=spent, shared=shared)


def ensure_operator_key(home: Home, registry: Registry) -> None:
    """A key for commands on this machine, in a file only its owner reads. Made once; made anew when it was revoked."""
    if home.operator_key.exists():
        known = {registry.hash_key(home.operator_key.read_text(encoding="utf-8").strip())}
        if known & registry.snapshot().keys.keys():
            return
    _, plaintext = registry.create_key(None, {Scope.ADMIN}, name="operator on this machine", actor="gateway")
    partial = home.operator_key.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(plaintext + "\n", encoding="utf-8")
    partial.replace(home.operator_key)


def version_folder(home: Home, version: AdapterVersion) -> Path:
    """The version's own folder, as the engine reads it: never changed, never used for another."""
    return home.versions / version.engine_name


@asynccontextmanager
async def open_services(
    settings: Settings,
    make_host: MakeHost | None = None,
    *,
    make_dedicated: MakeDedicated | None = None,
    drain: Drain | None = None,
) -> AsyncIterator[Services]:
    """Everything started; the engine goes on starting in the background, and `/readyz` tells when it is there.

    Raises BaseModelError when the base model is not prepared, DatabaseError when the registry cannot be opened.
    """
    home = settings.home.create()
    model = base_folder(settings)
    base = await asyncio.to_thread(read_base, model)
    profile = await asyncio.to_thread(chosen_profile, settings)
    database = await asyncio.to_thread(open_database, settings.registry_url)
    registry = Registry(database, secret=load_secret(home.secret), default_limits=settings.limits.of_tenants)
    await asyncio.to_thread(ensure_operator_key, home, registry)
    directory = await Directory.open(registry)
    blobs = await asyncio.to_thread(BlobStore.open, settings.blob_location)

    async def fetch(version: AdapterVersion) -> Path:
        folder = version_folder(home, version)
        await asyncio.to_thread(bring_to_disk, blobs, version, folder)
        return folder

    metrics = Metrics.create(settings.metrics.max_adapters, settings.metrics.max_tenants)
    canary = Canary(
        BASE_NAME,
        reference_file(home, base.fingerprint.weights_digest, profile.name),
        settings.canary,
        failed=lambda engine: metrics.canary_failures.labels(engine).inc(),
    )
    maker = make_host or engine_process(settings, profile, model)

    def production() -> list[AdapterVersion]:
        return production_versions(directory.snapshot, base.fingerprint.weights_digest)

    replicas = [
        open_replica(settings, profile, maker, fetch=fetch, production=production, canary=canary, metrics=metrics)
        for _ in range(settings.engines)
    ]
    for replica in replicas:  # at nought from the start, so that the first is seen as a rise
        metrics.starts.labels(replica.id)
        metrics.canary_failures.labels(replica.id)
    fleet = Fleet(tuple(replicas), max_waiting=settings.requests.max_queue)
    deployments = Deployments(
        directory,
        functools.partial(
            open_dedicated,
            settings=settings,
            profile=profile,
            registry=registry,
            metrics=metrics,
            make_host=make_dedicated or dedicated_process(settings),
        ),
        base=base.fingerprint.weights_digest,
        merged=home.merged,
        engines=settings.engines,
        grace_s=settings.failure.drain_s,
        refresh_s=settings.refresh_s,
        forget=metrics.forget_engine,
    )
    engine_limits = EngineLimits(max_rank=profile.max_rank, allowed_modules=frozenset(profile.target_modules))
    onboarding = Onboarding(
        registry=registry,
        blobs=blobs,
        base=base,
        limits=engine_limits,
        home=home,
        fleet=fleet,
        directory=directory,
        uploads=settings.uploads,
        probe=settings.probe,
    )
    ledger = Ledger(database)
    file_blobs = await asyncio.to_thread(open_file_blobs, settings.blob_location)
    files = Files(database, file_blobs, default_limits=settings.limits.of_tenants)
    async with AsyncExitStack() as opened:
        opened.callback(database.dispose)
        usage = await Usage.open(ledger, home.usage, settings.usage, metrics)
        opened.push_async_callback(usage.close)
        tracer = open_tracer(settings.traces_endpoint)
        opened.push_async_callback(tracer.close)
        limiter = await opened.enter_async_context(open_limiter(settings, metrics, usage))
        services = Services(
            settings=settings,
            registry=registry,
            directory=directory,
            blobs=blobs,
            base=base,
            limits=limiter,
            promotion_policy=await asyncio.to_thread(load_policy, settings.promotion_policy),
            fleet=fleet,
            deployments=deployments,
            onboarding=onboarding,
            canary=canary,
            uploads=Uploads(home, settings.uploads),
            intake=Intake(files),
            jobs=Jobs(database, default_limits=settings.limits.of_tenants),
            metrics=metrics,
            tracer=tracer,
            ledger=ledger,
            usage=usage,
            drain=drain or Drain(),
            started_at=int(time.time()),
        )
        opened.push_async_callback(stop_all, services)
        tasks = await opened.enter_async_context(Tasks())
        for replica in fleet.replicas:
            tasks.start(replica.host.start(), name=f"start {replica.id}")
            tasks.start(replica.residency.run(), name=f"residency {replica.id}")
            tasks.start(canary.watch(replica), name=f"canary {replica.id}")
        tasks.start(directory.follow(settings.refresh_s), name="directory")
        tasks.start(deployments.run(), name="deployments")
        tasks.start(onboarding.run(), name="onboarding")
        tasks.start(limiter.run(), name="limits")
        tasks.start(beat(metrics.loop_lag.observe), name="pulse")
        tasks.start(services.uploads.run(), name="uploads")
        tasks.start(services.intake.run(settings.files.sweep_s), name="files")
        yield services


async def stop_all(services: Services) -> None:
    await asyncio.gather(*(replica.host.stop() for replica in services.replicas))


def bring_to_disk(blobs: BlobStore, version: AdapterVersion, folder: Path) -> None:
    """Make the folder exist and read it once, so that the engine's own read, with every stream waiting, finds it in memory."""
    materialise(blobs, version.files, folder)
    for file in folder.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass
