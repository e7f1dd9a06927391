"""Who runs on a data folder, found out by a lock, and stopped whole."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters.home import Home
from gateway import daemon
from gateway.engines import leftovers

HOLDER = """
import sys, time, pathlib
from adapters.home import Home
from gateway import daemon
with daemon.hold(Home(pathlib.Path(sys.argv[1])), "http://127.0.0.1:1"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def other_process(home: Home) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, home.root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_nobody_runs_on_a_fresh_data_folder(tmp_path: Path) -> None:
    assert daemon.find(Home(tmp_path / "none")) is None


def test_a_second_gateway_on_one_data_folder_is_refused(home: Home) -> None:
    with daemon.hold(home, "http://127.0.0.1:1"), pytest.raises(daemon.AlreadyRunningError, match="lorikeet down"):
        with daemon.hold(home, "http://127.0.0.1:2"):
            pass
    with daemon.hold(home, "http://127.0.0.1:3"):
        pass
    assert not daemon.pid_file(home).exists()


def test_a_running_gateway_is_found_with_its_address_and_stopping_ends_it(home: Home) -> None:
    process = other_process(home)
    assert daemon.find(home) == daemon.Running(process.pid, "http://127.0.0.1:1")
    stopped = daemon.stop(home, patience_s=10)
    process.wait(5)
    assert stopped.was_running
    assert not stopped.left
    assert daemon.find(home) is None
    assert not list(home.run.iterdir())


def test_a_gateway_that_was_killed_does_not_count_as_running(home: Home) -> None:
    process = other_process(home)
    process.kill()
    process.wait(5)
    assert daemon.pid_file(home).exists()
    assert daemon.find(home) is None
    assert not daemon.stop(home, patience_s=1).was_running
    assert not daemon.pid_file(home).exists()


def test_stopping_ends_the_engine_that_a_killed_gateway_left_alone(home: Home) -> None:
    socket = home.run / "engine-0.sock"
    socket.touch()
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={leftovers.MARK: str(socket)})
    deadline = time.monotonic() + 5
    while not leftovers.processes_of(socket) and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped = daemon.stop(home, patience_s=1)
    assert (stopped.was_running, stopped.killed, stopped.left) == (False, 1, ())
    orphan.wait(5)
    assert not leftovers.processes_of(socket)
    assert not socket.exists()


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {n}\n" for n in range(100)), encoding="utf-8")
    assert daemon.tail(log, 2) == "line 98\nline 99"
    assert daemon.tail(tmp_path / "none") == ""
