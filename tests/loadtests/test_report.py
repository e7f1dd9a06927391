import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import orjson
import pytest

from loadtests.calibration import Case, Figure, case_json
from loadtests.record import Mark, Outcome, PhaseWindow, Record, Run, Sample, read_run
from loadtests.report import REASONS_SHOWN, ROWS_OPEN, render_report
from loadtests.summary import summarise
from tests.loadtests.factories import HEALTHY, make_record, make_run

pytestmark = pytest.mark.slow  # draws whole reports

PHASES = ("steady", "cold", "set-2", "set-4", "chaos")
WINDOWS = tuple(
    PhaseWindow(name, name != "warm-up", 30.0 * i, 30.0 * i + 30) for i, name in enumerate(("warm-up", *PHASES))
)


def at(number: int, at_s: float, ttft_s: float, outcome: Outcome = Outcome.OK, **fields: Any) -> Record:
    content_s = [at_s + ttft_s] if outcome is Outcome.OK else []
    return make_record(
        number, intended_s=at_s, sent_s=at_s, content_s=content_s, end_s=at_s + ttft_s, outcome=outcome, **fields
    )


def full_run() -> Run:
    """A bit of everything: a cliff at four adapters, an engine killed at 160 s, a tenant over its limit."""
    records = []
    for phase, window in zip(PHASES, WINDOWS[1:], strict=True):
        for i in range(60):
            at_s = window.start_s + i / 2
            slow_s = 1.0 if phase == "set-4" else 0.0
            down = phase == "chaos" and 160 <= at_s < 165
            visit = ("first", "again", "after_eviction")[i % 3] if phase == "cold" else ""
            cold = visit in ("first", "after_eviction")
            outcome = Outcome.FAILED if down else Outcome.OK
            fields: dict[str, Any] = {
                "id": f"{phase}-{i}",
                "phase": phase,
                "adapter": f"a{i % 4}",
                "tenant": f"t{i % 2}",
                "visit": visit,
            }
            records.append(at(i, at_s, 0.1 + slow_s + cold, outcome, load_s=float(cold), error="503" * down, **fields))
    run = make_run(
        records,
        objectives=["p95(ttft) < 800 ms per adapter in steady", "goodput > 90 % per phase in set-*"],
        goodput={"ttft": "500 ms"},
        price_per_hour=1.0,
        tenants=[{"name": "t0"}, {"name": "t1"}],
        limits={"t0": {"requests_per_minute": 10, "burst": 2}},
        phases=[
            {"name": "steady", "duration_s": 30, "audit": True},
            {"name": "cold", "duration_s": 30, "load": {"kind": "touch", "gap_s": 0.5}},
            {"name": "set", "duration_s": 30, "working_set": [2, 4]},
            {"name": "chaos", "duration_s": 30},
        ],
    )
    case = Case("plain", 200.0, 4000, 0, (Figure("ttft", 95.0, 0.2, 0.203), Figure("e2e", 95.0, 0.2, None)), 0, 0, 0, 0)
    calibration = {
        "measured_at": "2026-01-01T10:00:00+00:00",
        "worst_error": {"plain": 0.015},
        "cases": [case_json(case)],
    }
    return replace(
        run,
        windows=WINDOWS,
        events=(Mark("upload", 150.5, 155.0, "http 409"), Mark("kill", 160.0, 160.1)),
        samples=tuple(
            Sample(float(i), {"gateway:waiting_requests": float(i % 3), "gateway:slots": 2.0}) for i in range(180)
        ),
        calibration=orjson.loads(orjson.dumps(calibration)),  # as read_run gives it
    )


MIXED = [make_record(i, ttft_s=0.1 + (i % 7) / 50, adapter=f"a{i % 12}", tenant=f"t{i % 2}") for i in range(300)]
RUNS = {
    "mixed": make_run(
        [*MIXED, make_record(1, outcome=Outcome.FAILED, error="http 500")], objectives=["p95(ttft) < 1 s"]
    ),
    "empty": make_run([]),
    "not begun": replace(make_run([], interrupted=True), windows=()),
    "not streamed": make_run([make_record(i, stream=False, content_s=[]) for i in range(20)]),
    "very spread": make_run(
        [make_record(i, ttft_s=0.01 if i else 40.0) for i in range(20)], objectives=["max(ttft) < 1 s"]
    ),
    "closed": make_run(MIXED, load={"kind": "closed", "concurrency": 2}),
    "full": full_run(),
    "version 1": read_run(Path(__file__).parent / "data/records-v1.jsonl"),
    "all wrong": make_run([make_record(i, wrong="legal") for i in range(40)]),
}


class References(HTMLParser):
    """Whatever a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "img", "iframe", "object"} or any(name in {"src", "href"} for name, _ in attrs):
            self.found.append(tag)


def body(run: Run) -> str:
    return render_report(run, summarise(run)).split("<body>")[1]


def rows(html: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first row."""
    table = html.partition(f"<h2>{heading}</h2>")[2].partition("<table>")[2].partition("</table>")[0]
    return [
        [unescape(re.sub("<.*?>", "", cell)).strip() for cell in re.findall("<td.*?>(.*?)</td>", row, re.DOTALL)]
        for row in table.split("<tr>")[2:]
    ]


def in_order(html: str, words: Sequence[str]) -> bool:
    places = [html.find(word) for word in words]
    return -1 not in places and places == sorted(places)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_report_is_one_file_with_well_formed_plots(run: Run) -> None:
    html = render_report(run, summarise(run))
    references = References()
    references.feed(html)
    assert references.found == []
    assert "url(" not in html
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) >= 2
    for plot in plots:
        ElementTree.fromstring(plot)  # noqa: S314  our own text
        assert not re.search(r"\b(nan|inf)\b", plot)


def test_the_verdict_stands_first_and_then_the_picture() -> None:
    assert in_order(
        body(RUNS["mixed"]),
        ["<h1>PASS</h1>", "P95 time to first token", "<svg", "<h2>Objectives</h2>", "load generator"],
    )
    assert in_order(
        body(RUNS["full"]), ["<h1>MISSED</h1>", "goodput &gt; 90 % per phase in set-* (phase set-4)", "<svg"]
    )


def test_wrong_answers_are_told_before_all_other_figures() -> None:
    run = full_run()
    run.records[7].wrong = "the mark of another request is in it"
    html = body(run)
    assert in_order(html, ["<h1>MISSED</h1>", "wrong adapter", "belonged to somebody else", "Wrong answers: 1", "<svg"])
    assert rows(html, "Wrong answers: 1")[0][-1] == "the mark of another request is in it"
    assert "Wrong answers" not in body(full_run())


def test_a_long_list_of_reasons_is_cut_and_says_so() -> None:
    run = make_run(MIXED, objectives=["p95(ttft) < 1 ms per adapter"])
    html = body(run)
    banner = html.partition("<ul>")[2].partition("</ul>")[0]
    assert banner.count("<li>") == REASONS_SHOWN + 1
    assert f"and {12 - REASONS_SHOWN} more" in banner


def test_each_event_says_what_failed_and_when_answers_were_ok_again() -> None:
    found = rows(body(full_run()), "Events")
    assert found == [
        ["2:30", "chaos", "upload", "4.5 s", "none", "nothing failed", "http 409"],
        ["2:40", "chaos", "kill", "100 ms", "10", "5 s", ""],
    ]


def test_an_engine_that_stays_down_never_recovers_in_the_report_either() -> None:
    run = full_run()
    run = replace(run, records=tuple(record for record in run.records if record.intended_s < 166))
    assert rows(body(run), "Events")[1][5] == "not before the end"


def test_the_working_set_names_its_cliff_and_holds_a_row_for_each_size() -> None:
    html = body(full_run())
    assert "The cliff: 2 adapters fit, 4 do not." in html
    assert [(row[0], row[4]) for row in rows(html, "Working set: set")] == [("2", "100.0 %"), ("4", "0.0 %")]


def test_a_size_of_the_working_set_that_is_not_judged_says_why() -> None:
    run = full_run()
    few = body(replace(run, scenario={**run.scenario, "sample_floor": 500}))
    assert all(row[6].endswith(" of 500 samples needed") for row in rows(few, "Working set: set"))
    assert all(row[6] == "" for row in rows(body(run), "Working set: set"))


def test_each_phase_has_a_row_with_its_fairness_its_cost_and_what_was_not_ok() -> None:
    found = rows(body(full_run()), "By phase")
    assert [row[0] for row in found] == ["all requests", *PHASES]
    steady, chaos = found[1], found[-1]
    # 2 good ones a second at 1 an hour
    assert (steady[4], steady[11:]) == ("2", ["0.139", "1.000", "1.000", ""])
    assert chaos[-1] == "10 failed"


def test_what_loading_an_adapter_costs_is_told_from_the_visits() -> None:
    html = body(full_run())
    assert "above that of asking again at once by 1 s the first time and by 1 s after eviction." in html
    assert "warm and cold" in html
    assert "again at once" not in body(RUNS["mixed"])


def test_a_broken_rate_limit_is_told_in_the_banner_and_in_its_table() -> None:
    found = rows(body(full_run()), "Rate limits")
    assert [row[0] for row in found] == ["t0", "t1"]
    assert found[0][1] == "10 a minute, burst 2"
    assert found[0][2:5] == ["30", "30", "6"]
    assert "let through above 10 a minute" in found[0][-1]
    assert found[1][1] == "none"
    assert [row[10] for row in found] == ["250 ms", "–"]


def test_a_run_that_only_broke_a_rate_limit_does_not_blame_the_objectives() -> None:
    run = make_run(
        MIXED,
        phases=[{"name": "steady", "duration_s": 1, "audit": True}],
        limits={"t0": {"requests_per_minute": 1, "burst": 1}},
        tenants=[{"name": "t0"}],
    )
    assert in_order(body(run), ["<h1>MISSED</h1>", "The objectives hold, but a rate limit was not kept to."])


def test_the_generators_own_error_stands_in_the_report() -> None:
    html = body(full_run())
    assert "measured 2026-01-01 10:00:00 UTC" in html
    assert "plain at most 1.5 %" in html
    assert rows(html, "Its own error") == [["200/s plain", "4000", "+1.5%", "–"]]
    assert "loadtest calibrate" in body(RUNS["mixed"])


@pytest.mark.parametrize("wrong", ["", "legal"])
def test_what_an_unhealthy_generator_measured_gets_no_green_badge(wrong: str) -> None:
    sick = replace(HEALTHY, faults=("send lag P99 40 ms",))
    html = body(make_run([*MIXED, make_record(1, wrong=wrong)], objectives=["p95(ttft) < 1 s"], health=sick))
    assert in_order(html, ["<h1>", "send lag P99 40 ms", "<svg"])
    assert ("<h1>VOID</h1>" in html) or wrong
    assert "badge pass" not in html
    assert "else: pass" in html


def test_long_tables_are_folded() -> None:
    run = make_run([make_record(i, adapter=f"a{i}") for i in range(ROWS_OPEN + 5)])
    assert f"<summary>{ROWS_OPEN + 6} rows</summary>" in body(run)
    assert "rows</summary>" not in body(RUNS["mixed"])


def test_conversations_are_not_sold_as_an_open_loop() -> None:
    said = "each after the first waits for the answer before"
    assert said in body(make_run([make_record(0)], requests={"turns": {"count": 2}}))
    assert said not in body(make_run([make_record(0)]))


def test_names_cannot_smuggle_markup_in() -> None:
    evil = "<script>alert(1)</script>"
    marked = [make_record(i, adapter=evil, tenant=evil, error=evil, wrong=evil, served_by=evil) for i in range(20)]
    run = make_run(marked, description=evil)
    run = replace(run, events=(Mark(evil, 2.0, 3.0, evil),), samples=(Sample(1.0, {evil: 1.0}),), url=evil)
    assert evil not in render_report(run, summarise(run))
