"""From quarantine to ready, through engine failures and restarts of the gateway."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters.base import read_base
from adapters.database import open_database
from adapters.errors import ConflictError, InvalidAdapterError
from adapters.manifest import Golden, Manifest, write_manifest
from adapters.registry import AdapterVersion, Registry, VersionStatus
from gateway import onboarding
from gateway.admission import Admission, Scheduler, Ticket
from gateway.engines.echo import EchoEngine
from gateway.engines.echo_answers import logprob
from tests.factories import make_adapter, zip_folder
from tests.gateway.conftest import Gateway, running_gateway

ACTOR = "test"


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", tiny_base, seed=1)


@pytest.fixture
async def acme(gateway: Gateway) -> Gateway:
    """A gateway that knows the tenant acme and keeps the stand-in engine's own files."""
    await gateway.key("acme")
    gateway.services.onboarding.stored_files |= {"echo.txt", "echo-nan", "echo-no-effect"}
    return gateway


async def settled(gateway: Gateway, version: AdapterVersion) -> AdapterVersion:
    return await gateway.services.onboarding.wait(version.tenant, version.adapter, version.version, 10)


async def accept(gateway: Gateway, folder: Path, name: str = "support") -> AdapterVersion:
    version, _ = await gateway.services.onboarding.accept("acme", name, folder, actor=ACTOR)
    return version


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_version_goes_from_validated_to_ready_and_the_first_one_into_production(
    acme: Gateway, folder: Path
) -> None:
    version = await accept(acme, folder)
    assert version.status is VersionStatus.VALIDATED
    assert (await settled(acme, version)).status is VersionStatus.READY
    assert acme.services.directory.snapshot.adapters["acme", "support"].production == 1
    actions = [entry.action for entry in acme.services.registry.audit(tenant="acme")]
    assert actions[:4] == ["version.promote", "version.ready", "version.probing", "version.add"]


async def test_a_version_is_quarantined_until_it_is_checked(acme: Gateway, folder: Path) -> None:
    registry = acme.services.registry
    async with acme.checks_held_up():
        upload = asyncio.create_task(accept(acme, folder))
        await until(lambda: registry.adapters("acme") != [])
        (seen,) = await asyncio.to_thread(registry.versions, "acme", "support")
        assert seen.status is VersionStatus.QUARANTINED
    version = await upload
    assert (version.version, version.status) == (seen.version, VersionStatus.VALIDATED)


@pytest.mark.parametrize("others", [0, 1])
async def test_an_upload_that_fails_or_is_cut_off_takes_its_version_back(
    acme: Gateway, folder: Path, tiny_base: Path, others: int
) -> None:
    registry = acme.services.registry
    for seed in range(others):
        await settled(acme, await accept(acme, make_adapter(folder.parent / str(seed), tiny_base, seed=10 + seed)))
    before = registry.snapshot()
    pickle = folder / "optimizer.pt"
    pickle.touch()
    for cut_off in (False, True):
        async with acme.checks_held_up():
            upload = asyncio.create_task(accept(acme, folder))
            await until(lambda: len(registry.snapshot().versions) > others)
            if cut_off:
                upload.cancel()
        with pytest.raises(asyncio.CancelledError if cut_off else InvalidAdapterError):
            await upload
        after = registry.snapshot()
        assert (after.adapters, after.versions) == (before.adapters, before.versions)
    pickle.unlink()
    assert (await accept(acme, folder)).version == others + 1


async def test_an_upload_cut_off_while_it_takes_its_number_gives_it_back(acme: Gateway, folder: Path) -> None:
    upload = asyncio.create_task(accept(acme, folder))
    await asyncio.sleep(0)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert acme.services.registry.adapters() == []


async def test_a_quarantined_version_that_is_deleted_ends_its_upload_and_leaves_nothing(
    acme: Gateway, folder: Path
) -> None:
    onboarding, registry = acme.services.onboarding, acme.services.registry
    onboarding.departures.grace_s = 0
    async with acme.checks_held_up():
        upload = asyncio.create_task(accept(acme, folder))
        await until(lambda: registry.adapters("acme") != [])
        await onboarding.delete_version("acme", "support", 1, actor=ACTOR)
    with pytest.raises(ConflictError, match="was deleted while it was being checked"):
        await upload
    await onboarding.departures.done()
    assert registry.adapters() == []
    assert [path for path in acme.settings.home.blobs.rglob("*") if path.is_file()] == []
    assert (await accept(acme, folder)).version == 1


async def test_the_same_content_uploaded_twice_at_once_is_one_version(acme: Gateway, folder: Path) -> None:
    async with acme.checks_held_up():
        uploads = [asyncio.create_task(accept(acme, folder)) for _ in range(3)]
        await until(lambda: len(acme.services.registry.snapshot().versions) == len(uploads))
    (version,) = {upload.version for upload in await asyncio.gather(*uploads)}
    assert [kept.version for kept in acme.services.registry.versions("acme", "support")] == [version]


@pytest.mark.parametrize(("marker", "code"), [("echo-no-effect", "no_effect"), ("echo-nan", "not_finite")])
async def test_a_probe_that_fails_refuses_with_the_numbers_and_frees_the_engine(
    acme: Gateway, folder: Path, marker: str, code: str
) -> None:
    (folder / marker).touch()
    version = await settled(acme, await accept(acme, folder))
    assert version.status is VersionStatus.REFUSED
    assert [fault.code for fault in version.faults] == [code]
    assert version.probe is not None
    assert version.probe["tokens"] > 0
    assert acme.services.directory.snapshot.adapters["acme", "support"].production is None
    await until(lambda: acme.engine.voices == {})


async def test_goldens_of_the_manifest_are_replayed(acme: Gateway, folder: Path, tiny_base: Path) -> None:
    name = await read_seed(folder)
    right = [logprob(name, at, at) for at in range(3, 13)]
    base = [logprob(b"", at, at) for at in range(3, 13)]
    for number, values in enumerate([right, right[::-1]], start=1):
        add_manifest(folder, tiny_base, values, base)
        version = await settled(acme, await accept(acme, folder))
        assert version.version == number
        assert version.probe is not None
        assert version.probe["method"] == "goldens"
        assert version.status is (VersionStatus.READY if number == 1 else VersionStatus.REFUSED), version.faults


async def read_seed(folder: Path) -> bytes:
    engine = EchoEngine()
    await engine.load("a", folder)
    return engine.voices["a"].seed


def add_manifest(folder: Path, base: Path, logprobs: list[float], base_logprobs: list[float]) -> None:
    golden = Golden(
        messages=[{"role": "user", "content": "hello"}],
        completion="",
        prompt_token_ids=[0, 1, 2],
        completion_token_ids=list(range(3, 3 + len(logprobs))),
        logprobs=logprobs,
        base_logprobs=base_logprobs,
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    manifest = Manifest(
        name="support",
        base=read_base(base).fingerprint,
        rank=config["r"],
        alpha=config["lora_alpha"],
        target_modules=config["target_modules"],
        created_at=1,
        base_licence="Apache-2.0",
        goldens=[golden],
    )
    write_manifest(manifest, folder)


async def test_an_upload_waits_for_an_engine_and_is_not_refused(acme: Gateway, folder: Path) -> None:
    acme.host.state = "restarting"
    version = await accept(acme, folder)
    waited = await acme.services.onboarding.wait("acme", "support", 1, 0.3)
    assert waited.status is VersionStatus.VALIDATED
    acme.host.state = "ready"
    assert (await settled(acme, version)).status is VersionStatus.READY


async def test_an_engine_that_dies_while_probing_is_a_retry_and_no_refusal(
    tmp_path: Path, tiny_base: Path, folder: Path
) -> None:
    async with running_gateway(
        tmp_path / "home", tiny_base, engine=lambda: EchoEngine(token_s=0.05), canary={"interval_s": 60}
    ) as gateway:
        await gateway.key("acme")
        gateway.services.onboarding.retry_s = 0.01
        version = await accept(gateway, folder)
        await until(lambda: gateway.engine.loads == 1)
        gateway.engine.die()
        await asyncio.sleep(0.05)
        await gateway.host.restart("test")
        assert (await settled(gateway, version)).status is VersionStatus.READY


async def test_what_keeps_failing_is_put_aside_and_others_go_on(acme: Gateway, folder: Path, tiny_base: Path) -> None:
    onboarding = acme.services.onboarding
    onboarding.retry_s = 0.001
    version = await accept(acme, folder, "killer")
    acme.engine.die_inside()
    await until(lambda: onboarding.waiting == 0)
    assert (await onboarding.wait("acme", "killer", 1, 0)).status is VersionStatus.VALIDATED
    await acme.host.restart("test")
    other = make_adapter(folder.parent / "other", tiny_base, seed=2)
    assert (await settled(acme, await accept(acme, other))).status is VersionStatus.READY
    assert (await settled(acme, await accept(acme, folder, "killer"))).status is VersionStatus.READY
    assert version.version == 1


async def test_an_adapter_the_engine_cannot_load_is_refused(acme: Gateway, folder: Path) -> None:
    acme.host.state = "restarting"
    version = await accept(acme, folder)
    acme.engine.refuse(version.engine_name)
    acme.host.state = "ready"
    found = await settled(acme, version)
    assert [fault.code for fault in found.faults] == ["engine_refused"]


async def test_refused_content_is_probed_again_when_it_is_uploaded_again(acme: Gateway, folder: Path) -> None:
    acme.host.state = "restarting"
    version = await accept(acme, folder)
    acme.engine.refuse(version.engine_name)
    acme.host.state = "ready"
    assert (await settled(acme, version)).status is VersionStatus.REFUSED
    await acme.host.restart("test")
    again = await accept(acme, folder)
    assert again.version == version.version
    assert (await settled(acme, again)).status is VersionStatus.READY
    assert (await settled(acme, again)).faults == ()


async def test_a_version_deleted_before_its_probe_is_forgotten(acme: Gateway, folder: Path) -> None:
    acme.host.state = "restarting"
    await accept(acme, folder)
    await acme.services.onboarding.delete_adapter("acme", "support", actor=ACTOR)
    acme.host.state = "ready"
    await until(lambda: acme.services.onboarding.waiting == 0)
    assert acme.engine.loads == 0


async def test_a_killed_gateway_goes_on_where_it_stopped(tmp_path: Path, tiny_base: Path, folder: Path) -> None:
    home = tmp_path / "home"
    async with running_gateway(home, tiny_base) as gateway:
        await gateway.key("acme")
        gateway.host.state = "restarting"
        version = await accept(gateway, folder)
        await asyncio.to_thread(gateway.services.registry.set_status, "acme", "support", 1, VersionStatus.PROBING)
    async with running_gateway(home, tiny_base) as gateway:
        assert (await settled(gateway, version)).status is VersionStatus.READY


async def test_a_start_sweeps_what_a_kill_left(tmp_path: Path, tiny_base: Path, folder: Path) -> None:
    home = tmp_path / "home"
    async with running_gateway(home, tiny_base) as gateway:
        await gateway.key("acme")
        await settled(gateway, await accept(gateway, folder))
    old, young = home / "quarantine" / "old", home / "quarantine" / "young"
    stranger = home / "versions" / "acme" / "gone@1-00000000"
    for leftover in (old, young, stranger):
        leftover.mkdir()
    long_ago = time.time() - 7200
    kept = next((home / "versions" / "acme").glob("support@1-*"))
    for leftover in (old, stranger, kept):
        os.utime(leftover, (long_ago, long_ago))
    async with running_gateway(home, tiny_base):
        await until(lambda: not old.exists() and not stranger.exists())
        assert young.exists()
        assert kept.exists()


async def test_a_start_takes_back_versions_that_a_killed_gateway_left_quarantined(
    tmp_path: Path, tiny_base: Path, folder: Path
) -> None:
    home = tmp_path / "home"
    async with running_gateway(home, tiny_base) as gateway:
        await gateway.key("acme")
        database = open_database(gateway.settings.registry_url)
        long_ago = Registry(database, secret=b"", clock=lambda: time.time() - 7200)
        long_ago.reserve_version("acme", "old")
        gateway.services.registry.reserve_version("acme", "young")
        database.dispose()
    async with running_gateway(home, tiny_base) as gateway:
        registry = gateway.services.registry
        await until(lambda: [record.name for record in registry.adapters()] == ["young"])
        assert gateway.services.onboarding.waiting == 0
        assert (await accept(gateway, folder, "old")).version == 1


async def test_nothing_is_kept_but_what_the_digest_covers(gateway: Gateway, folder: Path) -> None:
    await gateway.key("acme")
    (folder / "README.md").write_text("Trained on a Tuesday.")
    version = await accept(gateway, folder)
    assert set(version.files) == {"adapter_config.json", "adapter_model.safetensors"}


async def test_quarantine_is_empty_after_success_and_failure(acme: Gateway, folder: Path) -> None:
    archive = folder.parent / "a.zip"
    archive.write_bytes(zip_folder(folder))
    await accept(acme, archive)
    archive.write_bytes(b"broken")
    with pytest.raises(InvalidAdapterError):
        await accept(acme, archive)
    assert list(acme.settings.home.quarantine.iterdir()) == []


async def test_waiting_ends_with_the_time_given(acme: Gateway, folder: Path) -> None:
    acme.host.state = "restarting"
    await accept(acme, folder)
    started_s = time.monotonic()
    assert (await acme.services.onboarding.wait("acme", "support", 1, 0.2)).status is VersionStatus.VALIDATED
    assert time.monotonic() - started_s < 2


class Clock:
    """Time that passes only while somebody sleeps, or when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.ends: dict[float, Callable[[], None]] = {}

    async def sleep(self, delay_s: float) -> None:
        self.now_s += delay_s
        for at_s in [at_s for at_s in self.ends if at_s <= self.now_s]:
            self.ends.pop(at_s)()


async def paused(monkeypatch: pytest.MonkeyPatch, *, others: bool, others_end_s: float | None = None) -> float:
    """Seconds between the end of a prompt that took one and the next, at a fifth of the time."""
    clock, scheduler = Clock(), Scheduler(slots=2, max_in_flight=4, patience_s=1)
    admission = Admission(scheduler, max_queue=1, tenant_queue=1, longest_wait_s=1)
    ticket = Ticket(0, "globex", "globex/other@1", 0.0)
    if others:
        scheduler.add(ticket)
        scheduler.admit(0.0)
    if others_end_s is not None:
        clock.ends[clock.now_s + 1 + others_end_s] = lambda: scheduler.finish(ticket)
    monkeypatch.setattr(onboarding, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    monkeypatch.setattr(onboarding, "asyncio", SimpleNamespace(sleep=clock.sleep))
    async with onboarding.question(admission, "acme/support@1", 0.2):
        assert "acme/support@1" in scheduler.adapters_in_flight
        clock.now_s += 1
        ended_s = clock.now_s
    return clock.now_s - ended_s


async def test_a_probe_leaves_the_engine_to_others_for_most_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await paused(monkeypatch, others=True) == pytest.approx(4)


async def test_a_probe_does_not_wait_where_nobody_else_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await paused(monkeypatch, others=False) == 0
    assert await paused(monkeypatch, others=True, others_end_s=1) == pytest.approx(1)
