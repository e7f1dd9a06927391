import asyncio

import pytest

from loadtests.client import open_client, run_clock
from loadtests.errors import TargetError
from loadtests.record import Outcome, Record
from loadtests.schedule import Planned
from tests.loadtests.server import DONE, GOOD, ROLE, USAGE, FakeServer, event, token


async def ask(server: FakeServer, *, stream: bool = True, timeout_s: float = 10, url: str = "") -> Record:
    planned = Planned("steady-0", "steady", 0.0, "acme", "support", stream, 8, "hello")
    record = Record("steady-0", "steady", "acme", "support", stream, 0.0)
    async with open_client(url or server.url, {"acme": "lk-acme"}, timeout_s=timeout_s) as client:
        await client.send(planned, record, run_clock())
    return record


async def test_a_whole_stream_is_timed_part_by_part(server: FakeServer) -> None:
    server.script = lambda _: [ROLE, 0.2, token("a"), 0.05, token("b"), 0.1, token("c", "stop"), USAGE, DONE]
    record = await ask(server)
    assert (record.outcome, record.finish_reason, record.output_tokens) == (Outcome.OK, "stop", 3)
    assert (record.served_by, record.queue_s) == ("support@1", 0.0125)
    assert len(record.content_s) == 3
    assert record.ttft_s is not None
    assert record.ttft_sent_s is not None
    assert 0.2 <= record.ttft_sent_s <= record.ttft_s  # the early chunk that names only the role is no token
    assert record.max_gap_s is not None
    assert record.max_gap_s >= 0.09
    assert record.tpot_s == pytest.approx((record.content_s[-1] - record.content_s[0]) / 2)
    assert record.e2e_s == record.content_s[-1]
    body, authorization = server.requests[0]
    assert (body["model"], body["max_tokens"], authorization) == ("support", 8, "Bearer lk-acme")


async def test_an_answer_in_one_piece_has_only_its_end(server: FakeServer) -> None:
    record = await ask(server, stream=False)
    assert (record.outcome, record.finish_reason, record.output_tokens) == (Outcome.OK, "stop", 3)
    assert (record.ttft_s, record.tpot_s) == (None, None)
    assert record.e2e_s == record.end_s


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (
            [event(error={"message": "engine died", "code": "engine_error"}), DONE],
            "error event: engine_error: engine died",
        ),
        ([b"event: error\n" + event(message="gone"), DONE], "error event"),
        ([token("c", "stop"), event(error={"message": "late"}), DONE], "error event: late"),
        ([DONE], "no finish_reason"),
        ([], "no finish_reason"),
        ([b"data: {broken\n\n", DONE], "unreadable"),
        ([b"data: []\n\n", DONE], "unreadable"),
        ([event(choices=["x"]), DONE], "unreadable"),
    ],
)
async def test_only_a_finish_reason_without_an_error_is_success(
    server: FakeServer, tail: list[bytes | float], said: str
) -> None:
    server.script = lambda _: [ROLE, token("a"), *tail]
    record = await ask(server)
    assert (record.outcome, record.status) == (Outcome.FAILED, 200)
    assert said in record.error


async def test_a_refusal_is_told_from_a_failure(server: FakeServer) -> None:
    server.status = 429
    assert (await ask(server)).outcome is Outcome.REFUSED
    server.status = 503
    failed = await ask(server)
    assert (failed.outcome, failed.error) == (Outcome.FAILED, "http 503: told_to: no")


async def test_no_connection_and_no_answer_in_time_are_failures(server: FakeServer) -> None:
    assert "connection" in (await ask(server, url="http://127.0.0.1:1")).error
    server.script = lambda _: [ROLE, 5.0]
    record = await ask(server, timeout_s=0.1)
    assert (record.outcome, record.error) == (Outcome.FAILED, "timeout")


async def test_a_cancelled_request_stays_censored(server: FakeServer) -> None:
    server.script = lambda _: [ROLE, 5.0, *GOOD]
    record = Record("steady-0", "steady", "acme", "support", True, 0.0)
    planned = Planned("steady-0", "steady", 0.0, "acme", "support", True, 8, "hello")
    async with open_client(server.url, {}, timeout_s=10) as client:
        task = asyncio.create_task(client.send(planned, record, run_clock()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert record.outcome is Outcome.CENSORED


async def test_the_models_of_a_key_are_listed_or_the_reason_is_told(server: FakeServer) -> None:
    server.key = "lk-acme"
    async with open_client(server.url + "/v1", {"acme": "lk-acme", "zeta": "lk-wrong"}, timeout_s=5) as client:
        assert await client.models("acme") == ["base", "support"]
        with pytest.raises(TargetError, match="refused for tenant 'zeta'"):
            await client.models("zeta")
        with pytest.raises(TargetError, match="wants an API key"):
            await client.models("nobody")
    async with open_client(server.url + "/elsewhere", {}, timeout_s=5) as client:
        with pytest.raises(TargetError, match="without a list of models"):
            await client.models("acme")
    async with open_client("http://127.0.0.1:1", {}, timeout_s=5) as client:
        with pytest.raises(TargetError, match="No server answers"):
            await client.models("acme")
