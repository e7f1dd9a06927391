"""A deleted version stays for whoever still uses it, and its files for as long as an engine knows them."""

import asyncio
from pathlib import Path

import pytest

from adapters.registry import AdapterVersion
from tests.factories import make_adapter
from tests.gateway.conftest import Gateway

PAUSE_S = 0.1


@pytest.fixture
async def version(gateway: Gateway, tmp_path: Path, tiny_base: Path) -> AdapterVersion:
    """Ready, in production, and on the engine."""
    await gateway.key("acme")
    onboarding = gateway.services.onboarding
    onboarding.departures.grace_s = 0.0
    onboarding.departures.ask_again_s = 0.01
    folder = make_adapter(tmp_path / "adapter", tiny_base)
    version, _ = await onboarding.accept("acme", "support", folder, actor="test")
    return await onboarding.wait("acme", "support", version.version, 10)


def files(gateway: Gateway, version: AdapterVersion) -> list[Path]:
    return list((gateway.settings.home.versions / version.engine_name).glob("*"))


async def delete(gateway: Gateway) -> None:
    await gateway.services.onboarding.delete_adapter("acme", "support", actor="test")


async def test_a_request_keeps_its_version_to_the_last_byte(gateway: Gateway, version: AdapterVersion) -> None:
    replica = gateway.services.fleet.replicas[0]
    async with replica.residency.hold(version):
        await delete(gateway)
        await asyncio.sleep(PAUSE_S)
        assert version.engine_name in gateway.engine.voices
        assert files(gateway, version)
    await gateway.services.onboarding.departures.done()
    assert version.engine_name not in gateway.engine.voices
    assert files(gateway, version) == []


async def test_files_wait_for_an_engine_that_is_away(gateway: Gateway, version: AdapterVersion) -> None:
    gateway.host.state = "restarting"
    await delete(gateway)
    await asyncio.sleep(PAUSE_S)
    assert files(gateway, version)
    gateway.host.state = "ready"
    await gateway.services.onboarding.departures.done()
    assert files(gateway, version) == []


async def test_files_wait_for_an_engine_that_still_lists_the_name(gateway: Gateway, version: AdapterVersion) -> None:
    replica = gateway.services.fleet.replicas[0]
    replica.residency.mark_missing(version.engine_name)  # ours forgot it, the engine did not
    await delete(gateway)
    await asyncio.sleep(PAUSE_S)
    assert files(gateway, version)
    await replica.residency.reconcile()
    await gateway.services.onboarding.departures.done()
    assert files(gateway, version) == []


async def test_bytes_that_an_archived_tenants_version_names_stay(
    gateway: Gateway, version: AdapterVersion, tmp_path: Path
) -> None:
    await gateway.key("globex")
    onboarding, registry = gateway.services.onboarding, gateway.services.registry
    same, _ = await onboarding.accept("globex", "other", tmp_path / "adapter", actor="test")
    await onboarding.wait("globex", "other", same.version, 10)
    assert set(same.files.values()) == set(version.files.values())
    await asyncio.to_thread(registry.archive_tenant, "globex")
    await delete(gateway)
    await onboarding.departures.done()
    assert all(gateway.services.blobs.exists(digest) for digest in same.files.values())


async def test_files_stay_through_the_grace_period(gateway: Gateway, version: AdapterVersion) -> None:
    gateway.services.onboarding.departures.grace_s = PAUSE_S
    await delete(gateway)
    await asyncio.sleep(PAUSE_S / 2)
    assert files(gateway, version)
    await gateway.services.onboarding.departures.done()
    assert files(gateway, version) == []
