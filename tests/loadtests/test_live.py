import asyncio
import io

from rich.console import Console

from loadtests.live import LiveView, Tally, describe
from loadtests.record import Mark, Outcome
from loadtests.runner import Execution
from tests.loadtests.factories import WINDOWS, make_record


def lines(run: Execution) -> str:
    return "\n".join(describe(run, Tally()))


def test_before_the_first_answer_there_is_only_what_is_open() -> None:
    assert lines(Execution(WINDOWS, in_flight=3)) == "0 ok, 3 in flight"


def test_what_went_wrong_is_told_with_the_slowest_adapter_and_the_latest_event() -> None:
    run = Execution(
        WINDOWS,
        records=[make_record(i, ttft_s=0.1) for i in range(20)]
        + [make_record(i, ttft_s=0.4, adapter="legal[1]") for i in range(20)]
        + [make_record(0, outcome=Outcome.FAILED), make_record(1, outcome=Outcome.REFUSED), make_record(2, wrong="x")],
        marks=[Mark("upload", 2.0, 2.5), Mark("kill", 3.0, 3.1, "exit code [1]")],
    )
    said = lines(run)
    assert "41 ok, 0 in flight" in said
    assert "1 refused" in said
    assert "1 failed" in said
    assert "1 wrong" in said
    assert "slowest legal[1] (P50 400 ms)" in said
    assert "kill at 3.0 s" in said


def test_each_record_is_counted_once_however_often_one_looks() -> None:
    run, tally = Execution(WINDOWS), Tally()
    for number in range(5):
        run.records.append(make_record(number))
        for _ in range(3):
            assert next(iter(describe(run, tally))).startswith(f"{number + 1} ok")


async def test_the_view_draws_until_it_is_cancelled() -> None:
    out = io.StringIO()
    run = Execution(WINDOWS, records=[make_record(1)], marks=[Mark("kill", 3.0, 3.1, "exit code [1]")])
    drawing = asyncio.create_task(LiveView(Console(file=out, force_terminal=True, width=100)).show(run))
    await asyncio.sleep(0.1)
    drawing.cancel()
    await asyncio.gather(drawing, return_exceptions=True)
    assert "warm-up" in out.getvalue()
    assert "1 ok" in out.getvalue()
    assert "exit code [1]" in out.getvalue()
