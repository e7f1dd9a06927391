"""Do to the server what a phase plans beside its requests (an upload, a moved alias, a killed engine), and note when.

An event that fails is a mark with its error, and nothing else: what it was to show then shows in the requests, or not.
"""

import asyncio
import math
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from loadtests.client import Client
from loadtests.phases import Event, Phase
from loadtests.record import Mark, PhaseWindow
from loadtests.runner import Execution

CUT_OFF = "not finished when the run was over"
GRACE_S = 2.0  # between SIGTERM and SIGKILL
ERROR_CHARACTERS = 200


async def play_events(run: Execution, phases: Sequence[Phase], client: Client, *, drain_s: float) -> None:
    """Every event of every phase, and as often as it says; each leaves its mark in `run`.

    What is not finished drain_s after the last phase is ended.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(run.windows[-1].end_s + drain_s - run.clock()), asyncio.TaskGroup() as group:
            for phase, window in zip(phases, run.windows, strict=True):
                for event in phase.events:
                    group.create_task(_repeat(run, event, window, client))


async def _repeat(run: Execution, event: Event, window: PhaseWindow, client: Client) -> None:
    number: int | None = 0
    while number is not None:
        await asyncio.sleep(window.start_s + event.at_s + number * (event.every_s or 0.0) - run.clock())
        start_s = run.clock()
        error = CUT_OFF
        try:
            error = await _perform(event, client)
        except Exception as exc:  # noqa: BLE001  whatever it is, the run goes on
            error = f"{type(exc).__name__}: {exc}"
        finally:
            run.marks.append(Mark(event.name, start_s, run.clock(), error))
        number = next_number(event, window, number, run.clock())


def next_number(event: Event, window: PhaseWindow, number: int, now_s: float) -> int | None:
    """Which repetition comes after this one: the first that now_s has not missed. None when the phase is over by then."""
    if event.every_s is None:
        return None
    first_s = window.start_s + event.at_s
    following = max(number + 1, math.ceil((now_s - first_s) / event.every_s))
    return following if first_s + following * event.every_s < window.end_s else None


async def _perform(event: Event, client: Client) -> str:
    """What went wrong; empty when nothing did."""
    if event.run is not None:
        return await run_command(event.run)
    assert event.request is not None  # noqa: S101  it has one or the other
    request = event.request
    return await client.call(
        request.method, request.path, tenant=request.tenant, body=request.body, files=request.files
    )


async def run_command(arguments: Sequence[str]) -> str:
    """Exit code and the end of standard error where it failed, else nothing. No shell reads the arguments.

    Cancelling this ends the command and what it started in its process group.
    """
    # Not a pipe: what the command leaves running in the background would hold it open.
    with tempfile.TemporaryFile() as said:
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as exc:
            return f"{arguments[0]}: {exc.strerror or exc}"
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            raise
        if not code:
            return ""
        said.seek(0)
        text = said.read().decode("utf-8", "replace").strip()
        return f"exit code {code}" + (f": {text[-ERROR_CHARACTERS:]}" if text else "")


async def _end(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE_S)
            return
