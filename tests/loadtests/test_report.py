import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from loadtests.record import Outcome, Run
from loadtests.report import render_report
from loadtests.summary import summarise
from tests.loadtests.factories import make_record, make_run

MIXED = [make_record(i, ttft_s=0.1 + (i % 7) / 50, adapter=f"a{i % 12}", tenant=f"t{i % 2}") for i in range(300)]
RUNS = {
    "mixed": make_run(
        [*MIXED, make_record(1, outcome=Outcome.FAILED, error="http 500")], objectives=["p95(ttft) < 1 s"]
    ),
    "empty": make_run([]),
    "not streamed": make_run([make_record(i, stream=False, content_s=[]) for i in range(20)]),
    "very spread": make_run(
        [make_record(i, ttft_s=0.01 if i else 40.0) for i in range(20)], objectives=["max(ttft) < 1 s"]
    ),
    "closed": make_run(MIXED, load={"kind": "closed", "concurrency": 2}),
}


class References(HTMLParser):
    """Whatever a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "img", "iframe", "object"} or any(name in {"src", "href"} for name, _ in attrs):
            self.found.append(tag)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_report_is_one_file_with_well_formed_plots(run: Run) -> None:
    html = render_report(run, summarise(run))
    references = References()
    references.feed(html)
    assert references.found == []
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) >= 2
    for plot in plots:
        ElementTree.fromstring(plot)  # noqa: S314  our own text
        assert "nan" not in plot


def test_the_verdict_stands_first() -> None:
    run = RUNS["mixed"]
    body = render_report(run, summarise(run)).split("<body>")[1]
    assert body.index("<h1>PASS</h1>") < body.index("P95 time to first token") < body.index("<svg")


def test_names_cannot_smuggle_markup_in() -> None:
    evil = "<script>alert(1)</script>"
    run = make_run([make_record(i, adapter=evil, error=evil) for i in range(20)], description=evil)
    assert evil not in render_report(run, summarise(run))
