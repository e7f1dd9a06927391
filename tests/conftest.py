"""The real engine, one for the whole run. It lies above `e2e/` and `contract/`, which both use it.

Run alone it takes some 20 s to come up; the base model is prepared once under LORIKEET_HOME and found there ever after.
"""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import settings

from adapters.base import load_spec, prepare_base
from adapters.home import home
from gateway.engines.leftovers import processes_of
from gateway.engines.process import EngineProcess
from gateway.engines.profile import load_profile
from gateway.engines.protocol import Engine
from gateway.engines.vllm import VllmEngine

# A run says something of the change under test, so every run has the same examples; and none is timed, for a busy machine
# says nothing about the code. `pytest --hypothesis-profile exploring` looks for new ones.
settings.register_profile("exploring", deadline=None)
settings.register_profile("same", settings.get_profile("exploring"), derandomize=True)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`: what uses a real engine first and in one process, beside it the rest, each file whole."""
    items.sort(key=_needs_no_engine)
    for item in items:
        group = item.nodeid.partition("::")[0] if _needs_no_engine(item) else "engine"
        item.add_marker(pytest.mark.xdist_group(group))


def _needs_no_engine(item: pytest.Item) -> bool:
    return item.get_closest_marker("e2e") is None


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The default base, prepared: a folder with config, tokenizer, weights and lorikeet-base.json."""
    return prepare_base(load_spec(), home().models)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine_process(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineProcess]:
    """A real vLLM under its supervisor, profile `test`. Watched only while tests of the session's loop run:
    those that end the process need `pytest.mark.asyncio(loop_scope="session")`.
    """
    folder = tmp_path_factory.mktemp("engine")
    host = EngineProcess(load_profile("test"), base_model, folder / "run", folder / "engine.log")
    await host.start()
    yield host
    await host.stop()
    assert processes_of(host.socket) == []
    assert list(host.socket.parent.iterdir()) == []


@pytest.fixture
async def engine(engine_process: EngineProcess) -> AsyncIterator[Engine]:
    """A client of the real engine in the test's own loop."""
    client = VllmEngine("engine-0", engine_process.socket)
    yield client
    await client.close()


@pytest.fixture
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for adapters that outlives the test: what the engine once read must not vanish under it."""
    folder = tmp_path_factory.mktemp("adapters")
    assert shutil.disk_usage(folder).free > 1 << 28
    return folder
