"""What was scraped, as lines: series on one subject share a panel. Pure."""

import re
from collections.abc import Sequence
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
    metric = series.partition("{")[0].partition(":")[2]
    if metric.endswith("_total"):  # a counter has a scale of its own
        return metric
    return next((name for name, words in SUBJECTS.items() if any(word in metric for word in words)), metric)


def short_names(series: Sequence[str]) -> dict[str, str]:
    """Without the words that all metrics begin with, and without labels when all series have the same."""
    words = {name: tuple(re.split("[:_]", name.partition("{")[0])) for name in series}
    labels = {name: name.partition("{")[2].rstrip("}") for name in series}
    metrics = set(words.values())
    heads = zip(*(metric[:-1] for metric in metrics), strict=False) if len(metrics) > 1 else ()
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, heads))
    told = len(set(labels.values())) > 1
    return {name: " ".join([*words[name][shared:], *([labels[name]] if told else [])]) for name in series}
