"""What the dashboard and the alerts ask Prometheus, taken apart."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import yaml

FOLDER = Path(__file__).parents[2] / "configs/observability"
ENGINE_SERIES = Path(__file__).parents[1] / "contract/engine/vllm_series.json"  # of vLLM 0.32: name -> labels
OF_PROMETHEUS = {"instance", "job", "le"}  # labels that every target, or every histogram, has
SUBSTITUTES = {"$__rate_interval": "5m", "$adapter": ".*"}  # what Grafana puts in


@dataclass(frozen=True)
class Use:
    """A series that an expression asks for, the labels it names, and the values they are to have."""

    where: str
    series: str
    labels: frozenset[str]
    values: tuple[tuple[str, str], ...]  # label, and a value or an alternative of a regular expression


def load_rules(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def load_scrapes(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["scrape_configs"]
    return found


def load_dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Where each stands, and the expression as Prometheus gets it."""
    for rule in load_rules(FOLDER / "alerts.yaml"):
        yield rule["alert"], rule["expr"]
    for panel in load_dashboard()["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"]
            for variable, value in SUBSTITUTES.items():
                text = text.replace(variable, value)
            yield f"{panel['title']} {target['refId']}", text


def uses() -> list[Use]:
    """Raises ValueError for an expression that does not parse."""
    found: list[Use] = []
    for where, text in expressions():
        _walk(promql.parse(text), where, frozenset(), found)
    return found


def _walk(node: promql.Expr, where: str, grouped: frozenset[str], found: list[Use]) -> None:
    """grouped: labels that aggregations and matchings around the node name."""
    match node:
        case promql.VectorSelector():
            found.append(_use(node, where, grouped))
        case promql.MatrixSelector():
            found.append(_use(node.vector_selector, where, grouped))
        case promql.AggregateExpr():
            inside = frozenset(node.modifier.labels) if node.modifier else frozenset()
            _walk(node.expr, where, grouped | inside, found)
        case promql.BinaryExpr():
            matching = node.modifier.matching if node.modifier else None
            inside = grouped | frozenset(matching.labels if matching else ())
            _walk(node.lhs, where, inside, found)
            _walk(node.rhs, where, inside, found)
        case promql.Call():
            for argument in node.args:
                _walk(argument, where, grouped, found)
        case promql.ParenExpr() | promql.UnaryExpr():
            _walk(node.expr, where, grouped, found)
        case promql.NumberLiteral() | promql.StringLiteral():
            pass
        case _:
            raise ValueError(f"{where}: {type(node).__name__} is not understood here")


def _use(selector: promql.VectorSelector, where: str, grouped: frozenset[str]) -> Use:
    matchers = selector.matchers.matchers
    values = tuple((one.name, value) for one in matchers for value in one.value.split("|"))
    return Use(where, selector.name or "", grouped | {one.name for one in matchers}, values)
