"""What was scraped, as lines: series on one subject share a panel. Pure."""

import re
from collections.abc import Collection, Sequence
from itertools import takewhile

from loadtests.plots.canvas import COLOURS
from loadtests.plots.timeline import Line
from loadtests.record import Sample

# Series whose names hold one of these words share a panel; every other metric has one of its own.
SUBJECTS = {"requests": ("request",), "adapters": ("adapter", "slot", "lora")}


def panels(samples: Sequence[Sample]) -> tuple[list[list[Line]], int]:
    """Of each subject the lines, and how many series found no room: of many, those that rose highest are shown."""
    points: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        for name, value in sample.values.items():
            points.setdefault(name, []).append((sample.at_s, value))
    short = short_names(list(points))
    subjects: dict[str, list[str]] = {subject: [] for subject in SUBJECTS}
    for name in sorted(points, key=lambda name: -max(value for _, value in points[name])):
        subjects.setdefault(_subject(name), []).append(name)
    shown = [sorted(names[:COLOURS]) for names in subjects.values() if names]
    lines = [[Line(short[name], points[name]) for name in names] for names in shown]
    return lines, len(points) - sum(map(len, lines))


def _subject(series: str) -> str:
    """series: beginning with the name of the page it is from."""
    metric = _words(series)[1]
    if metric.endswith("_total"):  # a counter has a scale of its own
        return metric
    return next((name for name, words in SUBJECTS.items() if any(word in metric for word in words)), metric)


def _words(series: str) -> tuple[str, str]:
    """Page, and metric without labels; where the entries of a label are counted, that label."""
    page, _, metric = series.partition("{")[0].partition(":")
    return page, metric.rpartition(".")[2]


def short_names(series: Sequence[str]) -> dict[str, str]:
    """Without the words that all metrics of a page begin with, and without labels when all series have the same.

    Of several pages, each name begins with its page's.
    """
    pages: dict[str, set[tuple[str, ...]]] = {}
    words = {}
    for name in series:
        page, metric = _words(name)
        words[name] = page, tuple(re.split("[:_]", metric))
        pages.setdefault(page, set()).add(words[name][1])
    labels = {name: name.partition("{")[2].rstrip("}") for name in series}
    told = len(set(labels.values())) > 1
    short = {}
    for name, (page, parts) in words.items():
        shared = _shared(pages[page])
        short[name] = " ".join(
            [*([page] if len(pages) > 1 else []), *parts[shared:], *([labels[name]] if told else [])]
        )
    return short


def _shared(metrics: Collection[tuple[str, ...]]) -> int:
    """Words that all begin with, of several; each keeps its last."""
    heads = zip(*(metric[:-1] for metric in metrics), strict=False) if len(metrics) > 1 else ()
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, heads))
