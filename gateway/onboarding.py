"""How an adapter comes in: quarantine, every offline check, storage, then a probe on an engine; and how it leaves.

A version is there to be seen, `quarantined`, from the moment its bytes are complete; one that fails a check disappears. No
engine hears of an upload before `validate_adapter` has passed it. What is on disk and in the registry is enough to go on after
a kill: versions that were not probed to the end are probed by the next start.
"""

import asyncio
import logging
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path

from adapters.archive import UploadLimits, unpack
from adapters.base import BaseModelInfo
from adapters.blobs import BlobStore
from adapters.errors import AdapterError, ConflictError, Fault, NotFoundError
from adapters.home import Home
from adapters.names import TunedName
from adapters.peft_format import FILES, WEIGHTS_FILE
from adapters.registry import AdapterVersion, Registry, VersionStatus
from adapters.validation import AdapterReport, EngineLimits, validate_adapter
from gateway.admission import Admission
from gateway.departures import Departures
from gateway.directory import Directory
from gateway.engines.profile import BASE_NAME
from gateway.errors import AdapterLoadError, GatewayError, NoReplicaError, PermissionDeniedError
from gateway.fleet import Fleet, Replica
from gateway.probe import ProbeResult, probe_adapter
from gateway.settings import ProbeSettings, UploadSettings

logger = logging.getLogger(__name__)

QUARANTINE_TTL_S = 3600.0  # leftovers of killed uploads; a live one is younger
ABANDONED_POLL_S = 600.0  # between two looks for versions that a killed gateway left quarantined
VALIDATIONS = 2  # at a time: each reads all of its tensors
PROBE_ATTEMPTS = 5  # engine failures before a version is put aside: it may be what kills the engine
RETRY_S = 2.0  # before the second attempt; doubles with each
ENGINE_POLL_S = 0.25
WAIT_POLL_S = 0.5
GRACE_S = 10.0  # between the last use of a deleted version and the end of its files

Key = tuple[str, str, int]  # tenant, adapter, version


class Onboarding:
    """The way in and out for adapter versions. `run` must be running for versions to become ready and files to go."""

    def __init__(
        self,
        *,
        registry: Registry,
        blobs: BlobStore,
        base: BaseModelInfo,
        limits: EngineLimits,
        home: Home,
        fleet: Fleet,
        directory: Directory,
        uploads: UploadSettings,
        probe: ProbeSettings,
        stored_files: frozenset[str] = frozenset(FILES),
        grace_s: float = GRACE_S,
    ) -> None:
        """stored_files: what of an upload is kept and reaches an engine: the files its digest covers, and nothing else."""
        self._registry = registry
        self._blobs = blobs
        self._base = base
        self._limits = limits
        self._home = home
        self._fleet = fleet
        self._directory = directory
        self._unpack_limits = UploadLimits(
            max_bytes=uploads.max_bytes, max_entries=uploads.max_entries, max_expanded_bytes=uploads.max_expanded_bytes
        )
        self._probe = probe
        self.stored_files = stored_files
        self.retry_s = RETRY_S
        self.validating = asyncio.Semaphore(VALIDATIONS)
        self._storing = asyncio.Lock()
        self.departures = Departures(registry, blobs, home, fleet, self._storing, grace_s=grace_s)
        self._to_probe: asyncio.Queue[Key] = asyncio.Queue()
        self._attempts: dict[Key, int] = {}  # versions still to be probed, and how often an engine failed on them
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Versions that are still to be probed."""
        return len(self._attempts)

    @asynccontextmanager
    async def quarantine(self) -> AsyncIterator[Path]:
        """A fresh folder for bytes nobody has looked at; gone with everything in it when the block ends."""
        folder = self._home.quarantine / uuid.uuid4().hex
        await asyncio.to_thread(folder.mkdir, parents=True)
        try:
            yield folder
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))

    async def accept(
        self,
        tenant: str,
        name: str,
        source: Path,
        *,
        actor: str,
        templates: bool = False,
        model_name: TunedName | None = None,
    ) -> tuple[AdapterVersion, bool]:
        """Take in an archive or a PEFT folder. The version, queued for its probe, and True; or the one there is already with
        this content, and False.

        templates: whether it may bring a chat template of its own, a program that the engine runs. model_name: another name
        of the version; of one that is taken, what it means is returned.
        Raises InvalidNameError, ArchiveError, InvalidAdapterError with every fault, PermissionDeniedError, BlobError, and
        ConflictError when the version was deleted while it was quarantined.
        """
        async with self._reserved(tenant, name) as reserved, self.quarantine() as folder:
            if not await asyncio.to_thread(source.is_dir):
                async with self.validating:
                    await asyncio.to_thread(unpack, source, folder / "unpacked", self._unpack_limits)
                source = folder / "unpacked"
            async with self.validating:
                report = await asyncio.to_thread(validate_adapter, source, self._base, self._limits)
            if not templates and report.manifest is not None and report.manifest.serving.chat_template is not None:
                raise PermissionDeniedError(
                    "This API key lacks the scope 'chat-template', which an adapter with a chat template of its own needs."
                )
            async with self._storing:
                version, created = await asyncio.to_thread(self._store, reserved, source, report, actor, model_name)
        logger.info(
            "adapter accepted",
            extra={"adapter": version.engine_name, "new": created, "size_bytes": version.size_bytes},
        )
        if version.status is not VersionStatus.READY:
            self._enqueue((tenant, name, version.version))
        await self._directory.refresh()
        return version, created

    async def wait(self, tenant: str, name: str, version: int, timeout_s: float) -> AdapterVersion:
        """The version when it is ready or refused, or as it is when the time is up. Raises VersionNotFoundError."""
        ends_s = time.monotonic() + timeout_s
        while True:
            changed = self._changed
            found = await asyncio.to_thread(self._registry.version, tenant, name, version)
            settled = found.status is VersionStatus.READY or (
                found.status is VersionStatus.REFUSED and (tenant, name, version) not in self._attempts
            )
            left_s = ends_s - time.monotonic()
            if settled or left_s <= 0:
                return found
            try:
                async with asyncio.timeout(min(WAIT_POLL_S, left_s)):  # the poll is for another gateway's probe
                    await changed.wait()
            except TimeoutError:
                continue

    async def delete_version(self, tenant: str, name: str, version: int, *, actor: str) -> None:
        """Raises VersionNotFoundError, ConflictError for a production version that another could replace."""
        gone = await asyncio.to_thread(self._registry.delete_version, tenant, name, version, actor=actor)
        await self._directory.refresh()
        self.departures.add([gone])

    async def delete_adapter(self, tenant: str, name: str, *, actor: str) -> None:
        """Every version of it. Raises AdapterNotFoundError."""
        gone = await asyncio.to_thread(self._registry.delete_adapter, tenant, name, actor=actor)
        await self._directory.refresh()
        self.departures.add(gone)

    async def run(self) -> None:
        """Sweep what a killed gateway left, then probe and see off for ever."""
        await asyncio.to_thread(self._sweep)
        for key, version in (await self._directory.refresh()).versions.items():
            unsettled = version.status in (VersionStatus.VALIDATED, VersionStatus.PROBING)
            if unsettled and version.fits(self._base.fingerprint.weights_digest):
                self._enqueue(key)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.departures.run(), name="departures")
            group.create_task(self._release_abandoned(), name="abandoned versions")
            while True:
                key = await self._to_probe.get()
                retry_s = await self._probe_one(key)
                if retry_s is None:
                    self._settle(key)
                else:
                    group.create_task(self._requeue(key, retry_s), name="probe again")

    # Taking in

    @asynccontextmanager
    async def _reserved(self, tenant: str, name: str) -> AsyncIterator[AdapterVersion]:
        """A quarantined version, for who lists them meanwhile; taken back when the block fails or is cancelled."""
        reserving = asyncio.create_task(asyncio.to_thread(self._registry.reserve_version, tenant, name))
        try:
            yield await asyncio.shield(reserving)
        except BaseException:
            await asyncio.shield(self._release(reserving))
            raise

    async def _release(self, reserving: asyncio.Task[AdapterVersion]) -> None:
        await asyncio.wait([reserving])
        if reserving.exception() is not None:
            return
        reserved = reserving.result()
        try:
            await asyncio.to_thread(self._registry.release_version, reserved)
        except Exception:
            logger.exception("quarantined version stays", extra={"adapter": reserved.engine_name})

    async def _release_abandoned(self) -> None:
        """For ever. Only old versions: another gateway on this registry may be checking the young ones."""
        while True:
            try:
                await asyncio.to_thread(self._release_older, time.time() - QUARANTINE_TTL_S)
            except Exception:
                logger.exception("quarantined versions stay")
            await asyncio.sleep(ABANDONED_POLL_S)

    def _release_older(self, oldest: float) -> None:
        for version in self._registry.snapshot().versions.values():
            if version.status is VersionStatus.QUARANTINED and version.created_at < oldest:
                self._registry.release_version(version)
                logger.info("abandoned version removed", extra={"adapter": version.engine_name})

    def _store(
        self,
        reserved: AdapterVersion,
        folder: Path,
        report: AdapterReport,
        actor: str,
        model_name: TunedName | None,
    ) -> tuple[AdapterVersion, bool]:
        files = {path.name: self._blobs.put(path) for path in self._kept(folder)}
        try:
            version, created = self._registry.add_version(
                reserved.tenant,
                reserved.adapter,
                digest=report.digest,
                size_bytes=report.size_bytes,
                base=self._base.fingerprint.weights_digest,
                rank=report.rank,
                alpha=report.alpha,
                files=files,
                manifest=report.manifest,
                warnings=report.warnings,
                model_name=model_name,
                reserved=reserved,
                actor=actor,
            )
        except AdapterError:  # deleted meanwhile
            self.departures.remove_blobs(files.values())
            raise
        if not created:  # under the same `model_name` there may be another content
            self.departures.remove_blobs(files.values())
        return version, created

    def _kept(self, folder: Path) -> Iterator[Path]:
        return (path for path in sorted(folder.iterdir()) if path.name in self.stored_files and path.is_file())

    def _sweep(self) -> None:
        """Quarantine folders and version folders that nobody will come back for."""
        known = {version.engine_name for version in self._registry.snapshot().versions.values()}
        strangers = [
            folder for folder in self._home.versions.glob("*/*") if f"{folder.parent.name}/{folder.name}" not in known
        ]
        oldest = time.time() - QUARANTINE_TTL_S
        for folder in (*self._home.quarantine.glob("*"), *strangers):
            with suppress(FileNotFoundError):
                if folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)
                    logger.info("leftover removed", extra={"folder": folder.name})

    # Probing

    def _enqueue(self, key: Key) -> None:
        if key not in self._attempts:
            self._attempts[key] = 0
            self._to_probe.put_nowait(key)

    async def _requeue(self, key: Key, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._to_probe.put_nowait(key)

    def _settle(self, key: Key) -> None:
        self._attempts.pop(key, None)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _probe_one(self, key: Key) -> float | None:
        """None when the version is settled, or seconds until the next attempt after a failure that was not its own."""
        try:
            replica = await self._ready_replica()
            version = await asyncio.to_thread(self._registry.version, *key)
            if version.status is VersionStatus.READY:
                return None
            await asyncio.to_thread(self._registry.set_status, *key, VersionStatus.PROBING)
            started_s = time.monotonic()
            result = await self._try_on(replica, version)
            numbers = result.numbers | {"engine": replica.id, "took_s": round(time.monotonic() - started_s, 3)}
            status = VersionStatus.REFUSED if result.faults else VersionStatus.READY
            await asyncio.to_thread(self._registry.set_status, *key, status, faults=result.faults, probe=numbers)
            await self._directory.refresh()
            logger.info(
                "adapter probed", extra={"adapter": version.engine_name, "status": status.value, "probe": numbers}
            )
            if result.faults:
                await replica.residency.forget(version.engine_name)
        except (NotFoundError, ConflictError):  # deleted meanwhile, or settled by another gateway
            return None
        except (GatewayError, AdapterError) as exc:
            return await self._failed(key, str(exc))
        except Exception as exc:
            logger.exception("probe failed")
            return await self._failed(key, f"{type(exc).__name__}: {exc}")
        return None

    async def _ready_replica(self) -> Replica:
        """Waits for as long as it takes: an upload is never refused for want of an engine."""
        while True:
            try:
                return self._fleet.choose(None)
            except NoReplicaError:
                await asyncio.sleep(ENGINE_POLL_S)

    async def _try_on(self, replica: Replica, version: AdapterVersion) -> ProbeResult:
        manifest = await asyncio.to_thread(lambda: version.manifest)
        try:
            async with replica.residency.hold(version) as held:
                return await probe_adapter(
                    held.engine,
                    version.engine_name,
                    base_model=BASE_NAME,
                    goldens=manifest.goldens if manifest else (),
                    settings=self._probe,
                    template=version.serving.chat_template,
                    around=lambda model: question(replica.admission, model, self._probe.stall_share),
                )
        except AdapterLoadError as exc:
            fault = Fault(
                "engine_refused",
                f"The engine could not load the adapter: {exc}",
                WEIGHTS_FILE,
                "Export it again with PEFT's save_pretrained; if it passes `lorikeet inspect`, tell the operator.",
            )
            return ProbeResult((fault,), {})

    async def _failed(self, key: Key, reason: str) -> float | None:
        """An engine failure is never held against the adapter; but one that fails again and again is put aside."""
        attempts = self._attempts[key] = self._attempts.get(key, 0) + 1
        name = f"{key[0]}/{key[1]}@{key[2]}"
        logger.warning("probe interrupted", extra={"adapter": name, "attempts": attempts, "reason": reason})
        if attempts < PROBE_ATTEMPTS:
            return self.retry_s * float(2 ** (attempts - 1))
        logger.error("adapter put aside until it is uploaded again or the gateway restarts", extra={"adapter": name})
        try:
            note = {"interrupted": reason, "attempts": attempts}
            await asyncio.to_thread(self._registry.set_status, *key, VersionStatus.VALIDATED, probe=note)
        except AdapterError:
            logger.info("probe's end not recorded", extra={"adapter": name}, exc_info=True)
        return None


@asynccontextmanager
async def question(admission: Admission, model: str, stall_share: float) -> AsyncIterator[None]:
    """Around one prompt of a probe: a slot for its adapter, and a pause afterwards while the engine serves others.

    Each prompt makes a step of theirs longer; in a row they would all the steps of an answer. stall_share: of the time.
    """
    began_s = time.monotonic()
    with admission.swap(model) if model != BASE_NAME else nullcontext():
        yield
    ended_s = time.monotonic()
    until_s = ended_s + (ended_s - began_s) * (1 / stall_share - 1)
    while admission.in_flight and (left_s := until_s - time.monotonic()) > 0:  # noqa: ASYNC110 - the clock decides as well
        await asyncio.sleep(min(ENGINE_POLL_S, left_s))
