import asyncio
from pathlib import Path

import pytest

from adapters.registry import AdapterVersion, VersionStatus
from gateway.engines.echo import EchoEngine
from gateway.engines.protocol import EngineAdapters
from gateway.errors import AdapterLoadError, EngineError, EngineUnavailableError, NoReplicaError
from gateway.residency import Residency
from gateway.settings import ResidencySettings
from tests.gateway.test_onboarding import until

SETTINGS = ResidencySettings(retire_grace_s=0.0, stall_share=1.0)


def version(name: str, number: int = 1) -> AdapterVersion:
    return AdapterVersion("acme", name, number, "0" * 64, VersionStatus.READY, float(number), 8, 16, 100, {})


class Shelf:
    """Version folders on disk, and the versions production points at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.production: list[AdapterVersion] = []
        self.fetched: list[str] = []

    async def fetch(self, wanted: AdapterVersion) -> Path:
        folder = self.root / wanted.engine_name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(wanted.engine_name.encode())
        self.fetched.append(wanted.engine_name)
        return folder


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


async def resident(shelf: Shelf, engine: EchoEngine, *, capacity: int = 4) -> Residency:
    residency = Residency(shelf.fetch, lambda: shelf.production, capacity=capacity, settings=SETTINGS)
    await residency.restore(engine)
    return residency


async def test_a_version_is_loaded_once_for_all_who_ask_at_once(shelf: Shelf) -> None:
    engine = EchoEngine(load_s=0.01)
    residency = await resident(shelf, engine)

    async def use() -> None:
        async with residency.hold(version("a")):
            assert version("a").engine_name in engine.voices

    await asyncio.gather(*(use() for _ in range(8)))
    assert engine.loads == 1


async def test_an_idle_version_that_is_not_production_is_freed_and_a_leased_one_is_not(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine)
    shelf.production = [version("kept")]
    async with residency.hold(version("kept")), residency.hold(version("old")):
        await residency.sweep()
        assert engine.removed == 0
    await residency.sweep()
    assert residency.resident == [version("kept").engine_name]
    assert set(engine.voices) == {version("kept").engine_name}


async def test_forgetting_waits_for_the_last_lease(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine)
    async with residency.hold(version("a")):
        forgetting = asyncio.create_task(residency.forget(version("a").engine_name))
        await asyncio.sleep(0.01)
        assert not forgetting.done()
    await forgetting
    assert engine.voices == {}


async def test_room_is_made_by_evicting_the_least_recently_used_and_production_last(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine, capacity=2)
    shelf.production = [version("a")]
    for name in "abc":
        async with residency.hold(version(name)):
            pass
    assert set(residency.resident) == {version("a").engine_name, version("c").engine_name}


async def test_production_is_warmed_before_anybody_asks(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine)
    shelf.production = [version("a", 2)]
    await residency.sweep()
    assert residency.resident == [version("a", 2).engine_name]


async def test_a_restarted_engine_gets_back_production_and_what_is_leased(shelf: Shelf) -> None:
    residency = await resident(shelf, EchoEngine())
    shelf.production = [version("a")]
    async with residency.hold(version("leased")), residency.hold(version("a")):
        async with residency.hold(version("idle")):
            pass
        fresh = EchoEngine()
        await residency.restore(fresh)
        assert set(fresh.voices) == {version("a").engine_name, version("leased").engine_name}


async def test_what_the_engine_lost_is_loaded_again_and_what_it_should_not_hold_is_removed(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine)
    async with residency.hold(version("a")):
        pass
    await engine.remove(version("a").engine_name)
    stray = version("stray")
    await engine.load(stray.engine_name, await shelf.fetch(stray))
    await residency.reconcile()
    assert residency.resident == []
    assert engine.voices == {}
    async with residency.hold(version("a")) as held:
        assert held.load_s > 0
    assert engine.loads == 3


async def test_a_refused_load_leaves_no_lease_behind(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine)
    engine.refuse(version("a").engine_name)
    with pytest.raises(AdapterLoadError):
        async with residency.hold(version("a")):
            pass
    await residency.forget(version("a").engine_name)


async def test_without_an_engine_there_is_no_lease(shelf: Shelf) -> None:
    residency = Residency(shelf.fetch, list, capacity=4, settings=SETTINGS)
    with pytest.raises(NoReplicaError):
        async with residency.hold(version("a")):
            pass


async def test_a_version_that_cannot_be_loaded_keeps_no_other_from_the_engine(shelf: Shelf) -> None:
    engine = EchoEngine()
    engine.refuse(version("broken").engine_name)
    shelf.production = [version("broken"), version("a")]
    residency = await resident(shelf, engine)
    assert residency.resident == [version("a").engine_name]
    shelf.production.append(version("b"))
    await residency.sweep()
    assert residency.resident == [version("a").engine_name, version("b").engine_name]


class LingeringEngine(EchoEngine):
    """Refuses the first removal of a name as vLLM does while it aborts a request: the name is gone, the weights are not."""

    def __init__(self) -> None:
        super().__init__()
        self.leaving: set[str] = set()

    async def remove(self, name: str) -> None:
        if name in self.voices:
            del self.voices[name]
            self.leaving.add(name)
            raise EngineError(f"'{name}' still has 1 running request(s); its weights are kept.")
        self.leaving.discard(name)

    async def adapters(self) -> EngineAdapters:
        held = await super().adapters()
        return EngineAdapters(held.registered, held.resident | self.leaving)


async def test_weights_the_engine_would_not_give_up_are_asked_for_again(shelf: Shelf) -> None:
    engine = LingeringEngine()
    residency = await resident(shelf, engine)
    async with residency.hold(version("a")):
        pass
    with pytest.raises(EngineError):
        await residency.forget(version("a").engine_name)
    assert engine.leaving
    await residency.reconcile()
    assert not engine.leaving


async def test_a_version_at_whose_load_engines_die_is_set_aside_and_the_others_come_back(shelf: Shelf) -> None:
    class Mortal(EchoEngine):
        async def load(self, name: str, folder: Path) -> None:
            if name == version("deadly").engine_name:
                raise EngineUnavailableError("gone")
            await super().load(name, folder)

    shelf.production = [version("deadly"), version("good")]
    residency = Residency(shelf.fetch, lambda: shelf.production, capacity=4, settings=SETTINGS)
    for _ in range(2):
        with pytest.raises(EngineUnavailableError):
            await residency.restore(Mortal())
    await residency.restore(Mortal())
    assert residency.resident == [version("good").engine_name]
    with pytest.raises(AdapterLoadError, match="set aside"):
        async with residency.hold(version("deadly")):
            pass


async def test_what_a_waiting_request_wants_is_loaded_ahead_of_its_turn(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine)
    with residency.claim(version("a")):
        residency.want(version("a"))
        await until(lambda: version("a").engine_name in residency.resident)
        async with residency.hold(version("a")) as held:
            assert held.load_s == 0.0
    assert engine.loads == 1


async def test_nothing_is_loaded_ahead_for_one_who_has_left(shelf: Shelf) -> None:
    engine = EchoEngine(load_s=0.01)
    residency = await resident(shelf, engine)
    with residency.claim(version("a")), residency.claim(version("b")):
        residency.want(version("a"))
        residency.want(version("b"))
        await until(lambda: bool(shelf.fetched))
    await asyncio.sleep(0.05)
    assert residency.resident == [version("a").engine_name]


async def test_loading_ahead_pushes_out_only_what_nobody_claims(shelf: Shelf) -> None:
    engine = EchoEngine()
    residency = await resident(shelf, engine, capacity=2)
    async with residency.hold(version("idle")):
        pass
    with residency.claim(version("waiting")), residency.claim(version("next")), residency.claim(version("last")):
        for name in ("waiting", "next", "last"):
            residency.want(version(name))
        await until(lambda: engine.loads == 3)
        await asyncio.sleep(0.01)
        assert residency.resident == [version("waiting").engine_name, version("next").engine_name]
        async with residency.hold(version("waiting")):
            pass
    async with residency.hold(version("last")):
        assert version("last").engine_name in engine.voices


async def test_a_version_that_cannot_be_loaded_ahead_fails_its_own_request_and_no_other(shelf: Shelf) -> None:
    class Picky(EchoEngine):
        async def load(self, name: str, folder: Path) -> None:
            if name == version("broken").engine_name:
                raise AdapterLoadError("cannot be read")
            await super().load(name, folder)

    residency = await resident(shelf, Picky())
    with residency.claim(version("broken")), residency.claim(version("sound")):
        residency.want(version("broken"))
        residency.want(version("sound"))
        await until(lambda: version("sound").engine_name in residency.resident)
        with pytest.raises(AdapterLoadError):
            async with residency.hold(version("broken")):
                pass
