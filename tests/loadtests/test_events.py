import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.client import open_client
from loadtests.events import CUT_OFF, next_number, play_events, run_command
from loadtests.phases import Event
from loadtests.record import Mark, PhaseWindow
from loadtests.runner import Execution
from loadtests.schedule import windows
from tests.loadtests.factories import make_scenario
from tests.loadtests.server import FakeServer


async def play(
    server: FakeServer, *events: dict[str, Any], duration_s: float = 1, drain_s: float = 5, timeout_s: float = 10
) -> list[Mark]:
    scenario = make_scenario(phases=[{"name": "steady", "duration_s": duration_s, "events": list(events)}])
    run = Execution(windows(scenario.phases))
    async with open_client(server.url, {"default": "lk-acme"}, timeout_s=timeout_s) as client:
        await play_events(run, scenario.phases, client, drain_s=drain_s)
    return run.marks


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_an_upload_and_a_moved_alias_carry_the_tenants_key(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    files = {name: str(tmp_path / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    marks = await play(
        server,
        {"at_s": 0, "name": "upload", "request": {"path": "/v1/adapters/a", "tenant": "default", "files": files}},
        {
            "at_s": 0.3,
            "name": "move",
            "request": {"method": "PUT", "path": "/v1/adapters/a/alias", "tenant": "default", "json": {"version": 2}},
        },
    )
    assert [(mark.name, mark.error) for mark in marks] == [("upload", ""), ("move", "")]
    assert 0.3 <= marks[1].start_s <= marks[1].end_s
    upload = {
        "adapter_config.json": "adapter_config.json: {}",
        "adapter_model.safetensors": "adapter_model.safetensors: weights",
    }
    assert server.deeds == [
        ("POST", "/v1/adapters/a", "Bearer lk-acme", upload),
        ("PUT", "/v1/adapters/a/alias", "Bearer lk-acme", {"version": "2"}),
    ]


async def test_an_event_that_fails_is_a_mark_with_its_error(server: FakeServer, tmp_path: Path) -> None:
    server.status = 409
    request = {"path": "/v1/adapters/a", "tenant": "default", "json": {}}
    missing = {"path": "/v1/adapters/a", "tenant": "default", "files": {"file": str(tmp_path / "none")}}
    marks = await play(
        server,
        {"at_s": 0.0, "name": "refused", "request": request},
        {"at_s": 0.1, "name": "missing", "request": missing},
        {"at_s": 0.2, "name": "exits", "run": python("import sys; sys.exit('told to')")},
        {"at_s": 0.3, "name": "absent", "run": ["/no/such/program"]},
        {"at_s": 0.3, "name": "null", "run": ["true", "nul\0byte"]},
    )
    errors = {mark.name: mark.error for mark in marks}
    assert errors.keys() == {"refused", "missing", "exits", "absent", "null"}
    assert errors["null"].startswith("ValueError: ")
    assert errors["refused"] == "http 409: told_to: no"
    assert "No such file" in errors["missing"]
    assert errors["exits"] == "exit code 1: told to"
    assert errors["absent"] == "/no/such/program: No such file or directory"


async def test_a_server_that_is_gone_or_does_not_answer_is_an_error_too(server: FakeServer) -> None:
    server.frozen_s = (0.0, 3.0)
    request = {"path": "/v1/chat/completions", "tenant": "default", "json": {"stream": False}}
    (late,) = await play(server, {"at_s": 0, "name": "late", "request": request}, timeout_s=0.2)
    assert late.error == "TimeoutError"
    server.url = "http://127.0.0.1:1"
    (gone,) = await play(server, {"at_s": 0, "name": "gone", "request": request})
    assert gone.error.startswith("ClientConnectorError: Cannot connect")


async def test_an_event_comes_again_until_its_phase_is_over(server: FakeServer) -> None:
    request = {"path": "/v1/adapters/a", "tenant": "default", "json": {}}
    marks = await play(server, {"at_s": 0.2, "name": "again", "every_s": 0.3, "request": request})
    assert len(marks) in (2, 3)  # at 0.2, 0.5 and 0.8 s, unless the machine slept through one
    assert all(mark.start_s >= 0.2 + 0.3 * i for i, mark in enumerate(marks))


@pytest.mark.slow
async def test_what_is_not_finished_long_after_the_last_phase_is_ended(server: FakeServer, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    began_s = time.monotonic()
    marks = await play(server, {"at_s": 0, "name": "hangs", "run": python(code)}, duration_s=0.5, drain_s=1.5)
    assert [(mark.name, mark.error) for mark in marks] == [("hangs", CUT_OFF)]
    assert time.monotonic() - began_s < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


async def test_a_command_may_leave_something_running() -> None:
    began_s = time.monotonic()
    assert await run_command(["sh", "-c", "sleep 3 & exit 0"]) == ""
    assert time.monotonic() - began_s < 2.5


@given(
    at_s=st.floats(0, 5),
    every_s=st.floats(0.01, 3),
    number=st.integers(0, 20),
    now_s=st.floats(100, 111),
)
def test_repetitions_keep_their_rhythm_and_end_with_the_phase(
    at_s: float, every_s: float, number: int, now_s: float
) -> None:
    event = Event(at_s=at_s, name="e", every_s=every_s, run=["true"])
    window = PhaseWindow("steady", True, 100, 110)
    following = next_number(event, window, number, now_s)
    first_missed = [i for i in range(number + 1, number + 1200) if 100 + at_s + i * every_s >= now_s - 1e-6]
    if following is None:
        assert 100 + at_s + first_missed[0] * every_s >= 110 - 1e-6 - every_s * 1e-6
    else:
        assert following > number
        assert 100 + at_s + following * every_s < 110
        assert following in first_missed[:2]


async def test_interrupting_a_run_ends_its_commands(server: FakeServer) -> None:
    playing = asyncio.create_task(play(server, {"at_s": 0, "name": "hangs", "run": ["sleep", "60"]}, duration_s=60))
    await asyncio.sleep(0.5)
    playing.cancel()
    began_s = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert time.monotonic() - began_s < 20
