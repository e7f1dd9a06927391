"""`lorikeet up` and `lorikeet down` with the real engine: a real answer at the end of one, nothing left after the other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.installed.machine import Machine

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


def shared_memory() -> set[Path]:
    """A database and joblib's workers that run beside are none of ours."""
    return {path for path in SHARED_MEMORY.iterdir() if not path.name.startswith(("PostgreSQL.", "sem.loky-"))}


def test_up_ends_with_a_real_answer_and_down_leaves_nothing(machine: Machine) -> None:
    shared_before = shared_memory()
    first = machine.json("up")
    made = shared_memory() - shared_before
    assert first["ready"]
    assert first["started"]
    assert (first["tenant"], first["key"][:3]) == ("default", "lk-")
    answer = httpx.post(
        f"{first['url']}/v1/chat/completions",
        headers={"authorization": f"Bearer {first['key']}"},
        json={
            "model": first["base_model"],
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 16,
            "temperature": 0,
        },
        timeout=120,
    )
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    assert machine.json("status")["engines"][0]["state"] == "ready"

    again = machine.json("up")
    assert not again["started"]
    assert "key" not in again

    stopped = machine.json("down")
    assert (stopped["stopped"], stopped["killed"], stopped["left"]) == (True, 0, [])
    assert machine.processes() == []
    assert list((machine.home / "run").iterdir()) == []
    for _ in range(20):  # tests in another process make segments too, and take them away again
        if not made & shared_memory():
            break
        time.sleep(0.5)
    assert not made & shared_memory()


def test_down_ends_the_engine_of_a_gateway_that_was_killed(machine: Machine) -> None:
    machine.run("up")
    pid = json.loads((machine.home / "run" / "gateway.pid").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    machine.json("down")
    deadline = time.monotonic() + 10
    while machine.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert machine.processes() == []
    assert list((machine.home / "run").iterdir()) == []


def test_a_gateway_that_cannot_start_says_why_and_leaves_nothing(machine: Machine) -> None:
    machine.environment["LORIKEET_ENGINE"] = "no-such-profile"
    done = subprocess.run(
        [sys.executable, "-m", "lorikeet", "up"], env=machine.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "no-such-profile" in done.stderr
    assert "Traceback" not in done.stderr.split("--- the end of")[0]
    assert machine.processes() == []
