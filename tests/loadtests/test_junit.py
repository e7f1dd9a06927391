from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.junit import junit_xml
from loadtests.record import Outcome, Run
from loadtests.slo import Verdict
from loadtests.summary import summarise
from tests.loadtests.factories import HEALTHY, make_record, make_run

GOOD = [make_record(i, adapter="ab"[i % 2]) for i in range(50)]
SLOW = [make_record(i, adapter="c", ttft_s=3.0) for i in range(20)]
FEW = [make_record(i, adapter="d") for i in range(3)]
PER_ADAPTER = ["p95(ttft) < 1 s per adapter"]
SICK = replace(HEALTHY, faults=("send lag P99 9 ms",))


def suite_of(run: Run) -> ElementTree.Element:
    root = ElementTree.fromstring(junit_xml(run, summarise(run)))  # noqa: S314  our own text
    assert root.tag == "testsuites"
    (suite,) = root
    return suite


def results(run: Run) -> dict[str, str]:
    return {
        str(case.get("name")): next((part.tag for part in case if part.tag != "system-out"), "passed")
        for case in suite_of(run)
    }


def test_each_judgement_is_a_test_case() -> None:
    assert results(make_run([*GOOD, *SLOW, *FEW], objectives=PER_ADAPTER)) == {
        "every answer is its own": "passed",
        "p95(ttft) < 1 s per adapter (adapter a)": "passed",
        "p95(ttft) < 1 s per adapter (adapter b)": "passed",
        "p95(ttft) < 1 s per adapter (adapter c)": "failure",
        "p95(ttft) < 1 s per adapter (adapter d)": "skipped",
        "success_rate > 99 %": "passed",
        "success_rate > 99 % per adapter (adapter a)": "passed",
        "success_rate > 99 % per adapter (adapter b)": "passed",
        "success_rate > 99 % per adapter (adapter c)": "passed",
        "success_rate > 99 % per adapter (adapter d)": "skipped",
    }


@pytest.mark.parametrize(
    "run",
    [
        make_run(GOOD, objectives=PER_ADAPTER),
        make_run([*GOOD, *SLOW], objectives=PER_ADAPTER),
        make_run([*GOOD, *FEW], objectives=PER_ADAPTER),
        make_run(GOOD, interrupted=True),
        make_run([*GOOD, make_record(60, wrong="legal")]),
        make_run(
            GOOD,
            phases=[{"name": "steady", "duration_s": 1, "audit": True}],
            limits={"default": {"requests_per_minute": 1, "burst": 1}},
        ),
        make_run([]),
        make_run(SLOW, objectives=PER_ADAPTER, health=SICK),
        make_run([make_record(i, outcome=Outcome.FAILED) for i in range(30)]),
    ],
)
def test_a_reader_of_junit_alone_comes_to_the_same_verdict(run: Run) -> None:
    suite, found = suite_of(run), Counter(results(run).values())
    assert int(suite.get("tests", "")) == len(suite) == found.total()
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.get(attribute, "")) == found[tag]
    if found["error"]:
        verdict = Verdict.VOID
    elif found["failure"]:
        verdict = Verdict.MISSED
    else:
        verdict = Verdict.UNDECIDED if found["skipped"] else Verdict.PASS
    assert verdict is summarise(run).verdict


def test_a_void_run_is_an_error_in_every_case_but_that_of_wrong_answers() -> None:
    run = make_run([*GOOD, make_record(60, wrong="legal")], objectives=PER_ADAPTER, health=SICK)
    answers, *others = suite_of(run)
    errors = [case.find("error") for case in others]
    assert errors
    assert all(error is not None and "send lag P99 9 ms" in error.get("message", "") for error in errors)
    failure = answers.find("failure")
    assert failure is not None
    assert "belonged to somebody else" in failure.get("message", "")


@settings(max_examples=30)
@given(name=st.text(min_size=1, max_size=20))
def test_any_adapter_name_gives_well_formed_xml(name: str) -> None:
    assert len(suite_of(make_run([make_record(1, adapter=name)], objectives=PER_ADAPTER))) == 4
