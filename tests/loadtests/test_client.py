import asyncio
import time
from collections.abc import Collection
from typing import Any

import pytest

from loadtests.client import open_client, run_clock
from loadtests.errors import TargetError
from loadtests.record import Outcome, Record
from loadtests.schedule import Planned
from tests.loadtests.server import DONE, GOOD, ROLE, USAGE, FakeServer, event, token


async def ask(
    server: FakeServer,
    *,
    stream: bool = True,
    timeout_s: float = 10,
    url: str = "",
    marks: Collection[str] = (),
    temperature: float = 0.0,
    extra: dict[str, Any] | None = None,
    **fields: Any,
) -> Record:
    planned = Planned("steady-0", "steady", 0.0, "acme", "support", stream, 8, "hello", **fields)
    record = Record("steady-0", "steady", "acme", "support", stream, 0.0)
    async with open_client(
        url or server.url, {"acme": "lk-acme"}, timeout_s=timeout_s, temperature=temperature, extra=extra
    ) as client:
        client.marks.update(marks)
        await client.send(planned, record, run_clock())
    return record


async def test_a_whole_stream_is_timed_part_by_part(server: FakeServer) -> None:
    server.script = lambda _: [ROLE, 0.2, token("a"), 0.05, token("b"), 0.1, token("c", "stop"), USAGE, DONE]
    record = await ask(server)
    assert (record.outcome, record.finish_reason, record.output_tokens) == (Outcome.OK, "stop", 3)
    assert (record.served_by, record.queue_s, record.wrong) == ("support@1", 0.0125, "")
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


async def test_what_the_gateway_tells_in_headers_is_kept(server: FakeServer) -> None:
    server.headers = {"x-lorikeet-load-ms": "250", "x-lorikeet-overhead-ms": "1.75"}
    told = await ask(server)
    assert (told.load_s, told.overhead_s, told.retry_after_s) == (0.25, 0.00175, None)
    server.status, server.headers = 429, {"retry-after": "3", "retry-after-ms": "2600"}
    assert (await ask(server)).retry_after_s == 2.6
    server.headers = {"retry-after": "3"}
    assert (await ask(server)).retry_after_s == 3
    server.headers = {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}
    assert (await ask(server)).retry_after_s is None


async def test_a_planned_cancellation_is_neither_a_failure_nor_an_answer(server: FakeServer) -> None:
    left = asyncio.Event()
    server.left = left.set
    endless: list[bytes | float] = [0.05, token("c")]
    server.script = lambda _: [ROLE, token("a"), *endless * 100]
    record = await ask(server, cancel_after_s=0.3)
    assert (record.outcome, record.error, record.wrong) == (Outcome.CANCELLED, "", "")
    assert record.sent_s is not None
    assert record.end_s is not None
    assert 0.25 < record.end_s - record.sent_s < 2
    assert record.content_s
    await asyncio.wait_for(left.wait(), 5)  # the server was told


async def test_of_clients_that_leave_not_only_the_quick_answers_count(server: FakeServer) -> None:
    record = await ask(server, cancel_after_s=9)
    assert (record.outcome, record.finish_reason, record.output_tokens) == (Outcome.CANCELLED, "stop", 3)
    server.status = 500
    assert (await ask(server, cancel_after_s=9)).outcome is Outcome.FAILED
    server.status = 200
    server.script = lambda _: [ROLE, 5.0]
    assert (await ask(server, cancel_after_s=9, timeout_s=0.1)).error == "timeout"


async def test_a_slow_reader_reads_everything_but_tells_only_of_the_first_content(server: FakeServer) -> None:
    quick: list[bytes | float] = [token("a"), 0.02]
    server.script = lambda _: [ROLE, 0.1, *quick * 10, token("b", "stop"), USAGE, DONE]
    began_s = time.monotonic()
    record = await ask(server, read_pause_s=0.4)
    assert (record.outcome, record.finish_reason, record.slow) == (Outcome.OK, "stop", True)
    assert record.ttft_s is not None
    assert record.ttft_s < 0.4  # it does not pause before there is something to read
    assert len(record.content_s) < 5  # of eleven chunks, several at a time
    assert time.monotonic() - began_s > 0.5
    assert (record.tpot_s, record.chunk_gaps_s, record.e2e_s, record.close_s) == (None, [], None, None)
    assert not (await ask(server, read_pause_s=0.4, stream=False)).slow


@pytest.mark.parametrize(
    ("script", "fields", "said"),
    [
        ([token("Ein Kak"), token("adu.", "stop"), DONE], {"expect": "Kakadu"}, ""),
        ([token("A parrot.", "stop"), DONE], {"expect": "Kakadu"}, "the canary's text is missing"),
        ([token("Ein K", "length"), DONE], {"expect": "Kakadu"}, ""),  # cut off before it could be told
        ([token("A parrot is", "length"), DONE], {"expect": "Kakadu"}, "the canary's text is missing"),
        ([token("Ein Papagei", "content_filter"), DONE], {"expect": "Kakadu"}, ""),
        ([token("[0a1b"), token("2c3d] yes", "stop"), DONE], {}, "the mark of another request: 0a1b2c3d"),
        ([token("[0a1b2c3d] yes", "stop"), DONE], {"mark": "0a1b2c3d"}, ""),
        ([token("[99999999] yes", "stop"), DONE], {}, ""),
        (
            [event(choices=[{"delta": {"reasoning": "0a1b2c3d"}}]), token("yes", "stop")],
            {},
            "the mark of another request",
        ),
        ([token("[0a1b2c3d] yes")], {"expect": "Kakadu"}, "the mark of another request"),  # though cut off
    ],
)
async def test_an_answer_that_cannot_be_of_this_request_is_wrong(
    server: FakeServer, script: list[bytes | float], fields: dict[str, Any], said: str
) -> None:
    server.script = lambda _: script
    record = await ask(server, marks=["0a1b2c3d", "44444444"], **fields)
    assert said in record.wrong
    assert bool(record.wrong) == bool(said)


async def test_only_a_canary_is_asked_without_what_would_make_its_answer_random_or_long(server: FakeServer) -> None:
    extra = {"top_p": 0.9, "temperature": 1.3, "ignore_eos": True, "user": "me"}
    for expect in ("", "a"):
        await ask(server, temperature=0.7, extra=extra, expect=expect)
    names = ("temperature", "top_p", "ignore_eos", "user")
    usual, canary = ([body.get(name) for name in names] for body, _ in server.requests)
    assert usual == [1.3, 0.9, True, "me"]
    assert canary == [0.0, None, None, "me"]


async def test_an_answer_of_another_adapter_is_wrong(server: FakeServer) -> None:
    server.headers = {"x-lorikeet-adapter": "legal@3"}
    record = await ask(server)
    assert (record.outcome, record.wrong) == (Outcome.OK, "asked for support, answered by legal@3")


async def test_no_connection_and_no_answer_in_time_are_failures(server: FakeServer) -> None:
    assert "connection" in (await ask(server, url="http://127.0.0.1:1")).error
    server.script = lambda _: [ROLE, 5.0]
    record = await ask(server, timeout_s=0.1)
    assert (record.outcome, record.error) == (Outcome.FAILED, "timeout")


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("http://h:99999", "lk", "no address of a server: Port out of range"),
        ("http://[h", "lk", "no address of a server"),
        ("http://:80", "lk", "no address of a server"),
        ("http://h/–", "lk", "no address of a server"),
        ("http://h", "lk–acme", "The API key of tenant 'acme'"),
        ("http://h", "lk\n", "The API key of tenant 'acme'"),
    ],
)
async def test_an_address_or_a_key_that_cannot_be_sent_is_refused(url: str, key: str, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        async with open_client(url, {"acme": key}, timeout_s=1):
            pass


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
