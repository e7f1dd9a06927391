import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.leftovers import SHARED_MEMORY, processes_of, sweep
from gateway.engines.process import LONGEST_BACKOFF_S, STABLE_S, EngineProcess, OnReady, backoff_s, failures_after
from gateway.engines.profile import EngineProfile, load_profile
from gateway.engines.protocol import Engine, EngineHost
from gateway.errors import EngineStartError, EngineUnavailableError

CHILD = Path(__file__).with_name("child.py")
Make = Callable[..., EngineProcess]


def profile(**changes: float) -> EngineProfile:
    return load_profile("test").model_copy(update={"start_timeout_s": 20.0, "shutdown_timeout_s": 1, **changes})


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes supervised children of a mode; stops them afterwards."""
    made: list[EngineProcess] = []

    def _make(mode: str, *, on_ready: OnReady | None = None, **changes: float) -> EngineProcess:
        host = EngineProcess(
            profile(**changes),
            tmp_path,
            tmp_path / "run",
            tmp_path / "engine.log",
            on_ready=on_ready,
            command=[sys.executable, str(CHILD), str(tmp_path / "run" / "engine-0.sock"), mode],
            backoff=lambda failures: 0.01 * failures,
            stop_margin_s=0.5,
        )
        made.append(host)
        return host

    yield _make
    for host in made:
        await host.stop()


def starts(host: EngineProcess) -> int:
    return len(host.socket.with_name("starts").read_text().splitlines())


def left_behind(host: EngineProcess) -> list[object]:
    """Everything an engine could leave: processes, socket, record."""
    files = [path for path in (host.socket, host.socket.with_suffix(".json")) if path.exists()]
    return [*processes_of(host.socket), *files]


@given(st.integers(0, 10_000))
def test_the_back_off_grows_and_never_exceeds_its_cap(failures: int) -> None:
    assert 0 <= backoff_s(failures) <= backoff_s(failures + 1) <= LONGEST_BACKOFF_S


def test_the_back_off_doubles_from_one_second() -> None:
    assert [backoff_s(failures) for failures in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]


@given(st.integers(0, 100), st.floats(0, STABLE_S, exclude_max=True))
def test_exits_in_quick_succession_add_up(failures: int, ready_s: float) -> None:
    assert failures_after(failures, ready_s=ready_s) == failures + 1


def test_a_stable_run_makes_failures_forgotten() -> None:
    assert failures_after(7, ready_s=STABLE_S) == 0


async def test_a_started_engine_is_ready_and_a_stopped_one_leaves_nothing(make: Make) -> None:
    host: EngineHost = make("plain")
    assert host.state == "stopped"
    await host.start()
    assert host.state == "ready"
    assert await host.engine.healthy()
    await host.stop()
    assert host.state == "stopped"
    assert isinstance(host, EngineProcess)
    assert left_behind(host) == []


async def test_the_engine_runs_in_a_process_group_and_session_of_its_own(make: Make) -> None:
    host = make("plain")
    await host.start()
    assert host.pid is not None
    assert os.getpgid(host.pid) == os.getsid(host.pid) == host.pid


async def test_adapters_are_restored_before_it_counts_as_ready(make: Make) -> None:
    seen = []

    async def restore(engine: Engine) -> None:
        seen.append((host.state, await engine.healthy()))

    host = make("plain", on_ready=restore)
    await host.start()
    assert seen == [("restoring", True)]
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)
    await host.reached("restarting")
    await host.reached("ready")
    assert seen == [("restoring", True)] * 2
    assert (host.restarts, host.last_exit) == (1, -signal.SIGKILL)


async def test_an_exit_while_adapters_are_restored_is_a_failed_start(make: Make) -> None:
    async def restore(_engine: Engine) -> None:
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        await asyncio.sleep(60)

    host = make("plain", on_ready=restore)
    with pytest.raises(EngineStartError, match="code -9"):
        await host.start()
    assert host.state == "failed"
    await host.stop()
    assert left_behind(host) == []


async def test_an_engine_that_cannot_start_says_what_its_log_says(make: Make) -> None:
    host = make("broken")
    with pytest.raises(EngineStartError, match=r"exited with code 3(.|\n)*no weights here"):
        await host.start()
    assert host.state == "failed"
    await host.stop()
    assert left_behind(host) == []


async def test_an_engine_that_never_gets_ready_is_given_up_and_killed(make: Make) -> None:
    host = make("silent+grandchild", start_timeout_s=1.0)
    with pytest.raises(EngineStartError, match="not ready after 1 s"):
        await host.start()
    await host.stop()
    assert left_behind(host) == []


async def test_a_crash_loop_is_tried_until_it_comes_back(make: Make) -> None:
    host = make("broken2")
    await host.start()
    assert host.pid is not None
    os.kill(host.pid, signal.SIGTERM)
    await host.reached("failed")
    await host.reached("ready")
    assert starts(host) == 4
    assert await host.engine.healthy()


async def test_a_first_start_that_fails_says_so_and_is_tried_again(make: Make) -> None:
    calls = 0

    async def restore(_engine: Engine) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise EngineUnavailableError("not yet")

    host = make("plain", on_ready=restore)
    with pytest.raises(EngineUnavailableError):
        await host.start()
    await host.reached("ready")
    assert (calls, starts(host), host.restarts) == (2, 2, 0)


async def test_a_restore_that_fails_after_a_restart_is_tried_again(make: Make) -> None:
    calls = 0

    async def restore(_engine: Engine) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise EngineUnavailableError("gone again")

    host = make("plain", on_ready=restore)
    await host.start()
    await host.restart("a test")
    await host.reached("ready")
    assert (calls, starts(host)) == (3, 3)


async def test_a_restart_asked_for_brings_a_new_process(make: Make) -> None:
    host = make("stubborn")
    await host.start()
    before = host.pid
    await host.restart("the canary deviated")
    await host.restart("twice is once")
    await host.reached("ready")
    assert host.pid != before
    assert starts(host) == 2


async def test_a_record_that_cannot_be_written_does_not_keep_an_engine_from_its_restart(make: Make) -> None:
    host = make("stubborn")
    await host.start()
    first = host.pid
    blocked = host.socket.with_suffix(".draft")  # as good as a full disk
    blocked.mkdir()
    await host.restart("canary")
    blocked.rmdir()
    await host.reached("ready")
    assert host.pid != first


async def test_an_engine_that_ignores_sigterm_is_killed_with_its_children(make: Make) -> None:
    host = make("stubborn+grandchild", shutdown_timeout_s=0)
    await host.start()
    assert len(processes_of(host.socket)) == 2
    await host.stop()
    assert left_behind(host) == []


@pytest.mark.parametrize("mode", ["nameless", "renamed"])
async def test_processes_that_hide_their_environment_are_found_all_the_same(make: Make, mode: str) -> None:
    if mode == "renamed":
        pytest.importorskip("setproctitle")
    host = make(mode)
    await host.start()
    everyone = [process for process in psutil.process_iter() if session_of(process) == host.pid]
    assert len(everyone) == (2 if mode == "nameless" else 1)
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)
    await host.reached("restarting")
    await host.reached("ready")
    assert not any(process.is_running() for process in everyone)


def session_of(process: psutil.Process) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return None


async def test_children_left_by_a_killed_parent_are_swept_before_the_next_start(make: Make) -> None:
    host = make("grandchild")
    await host.start()
    before = set(processes_of(host.socket))
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)
    await host.reached("restarting")
    await host.reached("ready")
    assert len(before) == 2
    assert not before & set(processes_of(host.socket))


async def test_shared_memory_and_temporary_files_go_with_their_engine(make: Make) -> None:
    host = make("shared+temp")
    foreign = SHARED_MEMORY / f"psm_lorikeet_test_{os.getpid()}"
    foreign.write_bytes(b"another's")
    try:
        await host.start()
        segment = SHARED_MEMORY / host.socket.with_name("segment").read_text()
        scratch = Path(host.socket.with_name("temp").read_text()).parent
        semaphore = SHARED_MEMORY / host.socket.with_name("semaphore").read_text()
        assert segment.exists()
        assert semaphore.exists()
        assert host.pid is not None
        os.kill(host.pid, signal.SIGKILL)
        await host.reached("restarting")
        await host.reached("ready")
        assert not segment.exists()
        assert not semaphore.exists()
        assert not scratch.exists()
        again = SHARED_MEMORY / host.socket.with_name("segment").read_text()
        await host.stop()
        assert not again.exists()
        assert foreign.exists()
    finally:
        foreign.unlink()


async def test_a_stale_socket_does_not_block_the_start(make: Make) -> None:
    host = make("plain")
    host.socket.parent.mkdir()
    host.socket.write_text("left by a killed engine")
    await host.start()
    assert await host.engine.healthy()


async def test_two_gateways_cannot_run_the_same_engine(make: Make) -> None:
    first, second = make("plain"), make("plain")
    await first.start()
    with pytest.raises(EngineStartError, match="already run by process"):
        await second.start()
    assert await first.engine.healthy()


async def test_a_socket_path_too_long_for_the_kernel_is_said_so(tmp_path: Path) -> None:
    host = EngineProcess(profile(), tmp_path, tmp_path / ("long" * 30), tmp_path / "log")
    with pytest.raises(EngineStartError, match="107 bytes"):
        await host.start()


GATEWAY = """
    import asyncio, sys
    from pathlib import Path
    from gateway.engines.process import EngineProcess
    from gateway.engines.profile import load_profile

    async def main(folder, child, mode):
        run = folder / "run"
        command = [sys.executable, child, str(run / "engine-0.sock"), mode]
        host = EngineProcess(load_profile("test"), folder, run, folder / "log", command=command)
        await host.start()
        print("ready", flush=True)
        await asyncio.sleep(600)

    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


@pytest.fixture
def engine_folder(tmp_path: Path) -> Iterator[Path]:
    """For a gateway that is killed: what it left goes afterwards, whatever the test found."""
    yield tmp_path
    sweep(tmp_path / "run" / "engine-0.json", tmp_path / "run" / "engine-0.sock")


def killed_gateway(folder: Path, mode: str) -> tuple[psutil.Process, list[psutil.Process]]:
    """Run a gateway with one engine until it is ready, and kill it. Returns the engine and all its processes."""
    script = folder / "killed.py"
    script.write_text(textwrap.dedent(GATEWAY))
    command = [sys.executable, str(script), str(folder), str(CHILD), mode]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as gateway:
        assert gateway.stdout is not None
        assert gateway.stdout.readline() == b"ready\n"
        record = json.loads((folder / "run" / "engine-0.json").read_text())
        engine = psutil.Process(record["engine_pid"])
        everyone = processes_of(folder / "run" / "engine-0.sock")
        gateway.kill()
    return engine, everyone


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_an_engine_ends_with_a_gateway_that_was_killed(engine_folder: Path) -> None:
    engine, _ = killed_gateway(engine_folder, "plain")
    with contextlib.suppress(psutil.NoSuchProcess):
        engine.wait(timeout=10)
    assert not engine.is_running()


async def test_what_a_killed_gateway_left_is_swept_by_the_next(make: Make, engine_folder: Path) -> None:
    engine, everyone = await asyncio.to_thread(killed_gateway, engine_folder, "stubborn+grandchild+shared")
    segment = SHARED_MEMORY / (engine_folder / "run" / "segment").read_text()
    assert engine.is_running()
    assert len(everyone) > 1  # the engine, its child, and what Python adds for shared memory
    assert segment.exists()
    host = make("plain")
    await host.start()
    assert not any(process.is_running() for process in everyone)
    assert not segment.exists()
