"""What the endpoints are handed: built once, read-only, closed together."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import Request

from adapters.base import BaseModelInfo, find_base, read_base
from adapters.blobs import BlobStore, materialise
from adapters.database import open_database
from adapters.home import Home
from adapters.promotion import PromotionPolicy, load_policy
from adapters.registry import AdapterVersion, Registry, Scope, load_secret
from adapters.validation import EngineLimits
from gateway.admission import Admission, Scheduler
from gateway.canary import Canary, reference_file
from gateway.directory import Directory
from gateway.engines.detect import largest_gpu_mib, profile_for
from gateway.engines.process import EngineProcess
from gateway.engines.profile import BASE_NAME, EngineProfile, load_profile
from gateway.engines.protocol import Engine, EngineHost
from gateway.fleet import Fleet, Replica
from gateway.limits import OpenRequests
from gateway.metrics import Metrics
from gateway.onboarding import Onboarding
from gateway.residency import Residency
from gateway.resolve import Target, production_versions, resolve
from gateway.settings import Settings
from gateway.tasks import Tasks
from gateway.tenants import Caller, identify
from gateway.uploads import Uploads

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
    limits: EngineLimits
    promotion_policy: PromotionPolicy
    fleet: Fleet
    onboarding: Onboarding
    canary: Canary
    uploads: Uploads
    open_requests: OpenRequests
    metrics: Metrics
    started_at: int  # Unix seconds

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
    """The real thing: a supervised vLLM. Tests hand in another maker."""

    def make(on_ready: OnReady) -> EngineHost:
        home = settings.home
        return EngineProcess(profile, model, home.run, home.logs / "engine-0.log", on_ready=on_ready)

    return make


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
async def open_services(settings: Settings, make_host: MakeHost | None = None) -> AsyncIterator[Services]:
    """Everything started; the engine goes on starting in the background, and `/readyz` tells when it is there.

    Raises BaseModelError when the base model is not prepared, DatabaseError when the registry cannot be opened.
    """
    home = settings.home.create()
    model = base_folder(settings)
    base = await asyncio.to_thread(read_base, model)
    profile = await asyncio.to_thread(chosen_profile, settings)
    database = await asyncio.to_thread(open_database, settings.registry_url)
    registry = Registry(database, secret=load_secret(home.secret))
    await asyncio.to_thread(ensure_operator_key, home, registry)
    directory = await Directory.open(registry)
    blobs = await asyncio.to_thread(BlobStore.open, settings.blob_location)

    async def fetch(version: AdapterVersion) -> Path:
        folder = version_folder(home, version)
        await asyncio.to_thread(bring_to_disk, blobs, version, folder)
        return folder

    residency = Residency(
        fetch,
        lambda: production_versions(directory.snapshot, base.fingerprint.weights_digest),
        capacity=profile.host_adapters,
        settings=settings.residency,
    )
    canary = Canary(BASE_NAME, reference_file(home, base.fingerprint.weights_digest, profile.name), settings.canary)

    async def on_ready(engine: Engine) -> None:
        await canary.calibrate(engine)
        await residency.restore(engine)

    host = (make_host or engine_process(settings, profile, model))(on_ready)
    scheduler = Scheduler(
        slots=max(1, profile.slots - 1),  # one stays spare, for probes and swaps
        max_in_flight=profile.max_in_flight,
        patience_s=settings.requests.patience_s,
    )
    admission = Admission(scheduler, max_queue=settings.requests.max_queue, longest_wait_s=settings.requests.queue_s)
    fleet = Fleet((Replica(host, residency, admission, slots=profile.slots),))
    limits = EngineLimits(max_rank=profile.max_rank, allowed_modules=frozenset(profile.target_modules))
    onboarding = Onboarding(
        registry=registry,
        blobs=blobs,
        base=base,
        limits=limits,
        home=home,
        fleet=fleet,
        directory=directory,
        uploads=settings.uploads,
        probe=settings.probe,
    )
    services = Services(
        settings=settings,
        registry=registry,
        directory=directory,
        blobs=blobs,
        base=base,
        limits=limits,
        promotion_policy=await asyncio.to_thread(load_policy, settings.promotion_policy),
        fleet=fleet,
        onboarding=onboarding,
        canary=canary,
        uploads=Uploads(home, settings.uploads),
        open_requests=OpenRequests(settings.requests.tenant_max_in_flight),
        metrics=Metrics.create(),
        started_at=int(time.time()),
    )
    try:
        async with Tasks() as tasks:
            tasks.start(host.start(), name="engine start")
            tasks.start(directory.follow(settings.refresh_s), name="directory")
            tasks.start(residency.run(), name="residency")
            tasks.start(onboarding.run(), name="onboarding")
            tasks.start(services.uploads.run(), name="uploads")
            for replica in fleet.replicas:
                tasks.start(canary.watch(replica), name=f"canary {replica.id}")
            yield services
    finally:
        await host.stop()
        database.dispose()


def bring_to_disk(blobs: BlobStore, version: AdapterVersion, folder: Path) -> None:
    """Make the folder exist and read it once, so that the engine's own read, with every stream waiting, finds it in memory."""
    materialise(blobs, version.files, folder)
    for file in folder.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass
