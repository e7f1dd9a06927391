"""Chosen series of a page in the Prometheus text format. Pure.

A page may hold thousands of series, so it is searched for the wanted ones instead of parsed as a whole: while it is read
no request leaves and no answer is noticed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_SERIES = re.compile(
    r"(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)(?:\{(?P<labels>.*)\}|\.(?P<counted>[A-Za-z_][A-Za-z0-9_]*))?", re.DOTALL
)
_LABEL = re.compile(r'\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*"(?P<value>(?:[^"\\]|\\.)*)"\s*(?:,|$)')


@dataclass(frozen=True)
class Series:
    """Every series of a metric whose labels include these; or the entries that a label of one of them lists."""

    name: str
    labels: Mapping[str, str]
    counted: str = ""  # a label


def parse_series(text: str) -> Series:
    """`name`, `name{label="value", …}` or `name.label`. Raises ValueError."""
    match = _SERIES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'{text}: write name, name{{label="value"}}, or name.label')
    return Series(match["name"], _labels(match["labels"] or ""), match["counted"] or "")


def read_series(page: str, series: Series) -> float | None:
    """The sum over the series; None where the page (Prometheus text format) has no finite number for it.

    Of `name.label` the number of entries, parted by commas, in the label of the series with the highest value: where a
    server tells names by a label, as vLLM does of adapters, the value is when it did.
    """
    found = list(_lines(page, series))
    if not series.counted:
        return math.fsum(value for value, _ in found) if found else None
    named = [(value, labels[series.counted]) for value, labels in found if series.counted in labels]
    return float(sum(map(bool, max(named)[1].split(",")))) if named else None


def _lines(page: str, series: Series) -> Iterator[tuple[float, dict[str, str]]]:
    at = page.find(series.name)
    while at >= 0:
        end = page.find("\n", at)
        line = page[at : end if end >= 0 else len(page)]
        if at == 0 or page[at - 1] == "\n":
            read = _value(line, series)
            if read is not None and math.isfinite(read[0]):
                yield read
        at = page.find(series.name, at + len(line))


def _value(line: str, series: Series) -> tuple[float, dict[str, str]] | None:
    rest = line[len(series.name) :]
    labels: dict[str, str] = {}
    try:
        if rest.startswith("{"):
            inner, _, rest = rest[1:].rpartition("}")
            labels = _labels(inner)
        elif not rest[:1].isspace():
            return None  # a longer name
        value = float(rest.split()[0])  # a time stamp may follow
    except (ValueError, IndexError):
        return None
    return (value, labels) if series.labels.items() <= labels.items() else None


def _labels(text: str) -> dict[str, str]:
    labels, at = {}, 0
    while at < len(text.rstrip()):
        match = _LABEL.match(text, at)
        if match is None:
            raise ValueError(f'{text[at:]}: write label="value"')
        labels[match["name"]] = match["value"]  # escaped, as in the series asked for
        at = match.end()
    return labels
