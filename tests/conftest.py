"""The real engine, one for the whole run. It lies above `e2e/` and `contract/`, which both use it.

Run alone it takes some 20 s to come up; the base model is prepared once under LORIKEET_HOME and found there ever after.
"""

import shutil
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from adapters.base import load_spec, prepare_base
from adapters.home import home
from gateway.engines.leftovers import processes_of
from gateway.engines.process import EngineProcess
from gateway.engines.profile import load_profile
from gateway.engines.protocol import Engine
from gateway.engines.vllm import VllmEngine

SHARES_ENGINE = ("tests/e2e", "tests/contract/engine")

# A run says something of the change under test, so every run has the same examples; and none is timed, for a busy machine
# says nothing about the code. `pytest --hypothesis-profile exploring` looks for new ones.
settings.register_profile("exploring", deadline=None)
settings.register_profile("same", settings.get_profile("exploring"), derandomize=True)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no process ends with one of them alone."""
    marks: defaultdict[Path, set[str]] = defaultdict(set)
    for item in items:
        marks[item.path] |= {mark.name for mark in item.iter_markers()}
    items.sort(
        key=lambda item: next((rank for rank, mark in enumerate(("e2e", "slow")) if mark in marks[item.path]), 2)
    )


class OneEngine(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Each file whole in one process, and in one of them all that share the session's engine: it starts once.

    The last process begins with what comes last. What waits more than it computes runs there beside the engines of the others.
    """

    def _assign_work_unit(self, node: Any) -> None:
        if node is self.nodes[-1]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "engine" if str(Path(path).parent) in SHARES_ENGINE else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneEngine | None:
    return OneEngine(config, log) if config.getvalue("dist") == "loadfile" else None


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
