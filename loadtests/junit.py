"""A run's judgements as JUnit XML, for CI that reads nothing else: one test case each. Pure."""

import re
from collections import Counter
from collections.abc import Iterator
from xml.etree import ElementTree

from loadtests.record import Run
from loadtests.slo import Verdict
from loadtests.summary import Summary, describe_judgement, describe_wrong

RESULTS = {Verdict.MISSED: "failure", Verdict.UNDECIDED: "skipped", Verdict.VOID: "error"}
# What XML 1.0 cannot hold in any form. Adapter names and error texts are the server's.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(run: Run, summary: Summary) -> bytes:
    """Missed is a failure, undecided is skipped; a void run is an error everywhere but at wrong answers.

    All pass only when the run does.
    """
    void = "; ".join(f"The load generator could not keep up: {fault}" for fault in run.health.faults)
    suite = ElementTree.Element("testsuite", name=f"loadtest {summary.scenario.name}")
    results: Counter[str] = Counter()
    for kind, name, judged, text in _cases(run, summary):
        verdict = Verdict.VOID if void and not (kind == "answers" and judged is Verdict.MISSED) else judged
        classname = f"loadtest.{summary.scenario.name}.{kind}"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=_clean(name), time="0")
        if verdict is Verdict.PASS:
            ElementTree.SubElement(case, "system-out").text = _clean(text)
        else:
            result = ElementTree.SubElement(
                case, RESULTS[verdict], message=_clean(f"{void}. {text}" if verdict is Verdict.VOID else text)
            )
            if verdict is not Verdict.UNDECIDED:  # a skipped has no type
                result.set("type", verdict.value)
            results[RESULTS[verdict]] += 1
    suite.attrib |= {
        "tests": str(len(suite)),
        "failures": str(results["failure"]),
        "errors": str(results["error"]),
        "skipped": str(results["skipped"]),
        "time": f"{max((window.end_s for window in run.windows), default=0.0):.3f}",
        "timestamp": run.started_at[:19],  # UTC; the format has no time zone
    }
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _cases(run: Run, summary: Summary) -> Iterator[tuple[str, str, Verdict, str]]:
    """Kind, name, verdict and what was found."""
    found = describe_wrong(summary.wrong) if summary.wrong else "no sign of an answer that belonged to somebody else"
    yield "answers", "every answer is its own", Verdict.MISSED if summary.wrong else Verdict.PASS, found
    for judgement in summary.judgements:
        one = judgement.group
        where = "" if one.kind == "overall" else f" ({one.kind} {one.name})"
        yield "objectives", f"{judgement.objective.text}{where}", judgement.verdict, describe_judgement(judgement)
    if summary.audit:
        found = "; ".join(summary.audit.reasons) or "admitted and refused as the token bucket says"
        yield "limits", "rate limits are kept", summary.audit.verdict, found
    if run.interrupted:
        yield "run", "the run came to its end", Verdict.UNDECIDED, "it was interrupted"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
