"""Faults of a scenario, each with the line and the field it lies in."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

Location = tuple[str | int, ...]


class PlacedFaultsError(ValueError):
    """Faults between fields, each with its location below the part that was checked."""

    def __init__(self, faults: Sequence[tuple[Location, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(f"{field_name(location)}: {message}" for location, message in self.faults))


def describe_faults(root: yaml.Node | None, exc: ValidationError) -> list[str]:
    """Every fault as `line 3: phases[0].load: what is wrong`."""
    return [fault for error in exc.errors() for fault in _describe(root, error)]


def describe_yaml_error(exc: yaml.YAMLError) -> str:
    if isinstance(exc, yaml.MarkedYAMLError) and exc.problem_mark is not None:
        return f"line {exc.problem_mark.line + 1}: not YAML: {exc.problem or exc.context}"
    return f"not YAML: {' '.join(str(exc).split())}"


def field_name(keys: Iterable[str | int]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _describe(root: yaml.Node | None, error: Any) -> Iterator[str]:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, PlacedFaultsError):
        parts = [((*error["loc"], *location), message) for location, message in cause.faults]
    else:
        parts = [(error["loc"], str(error["msg"]).removeprefix("Value error, "))]
    for location, message in parts:
        keys, line = _place(root, location, missing=error["type"] == "missing")
        name = field_name(keys)
        yield f"line {line}: {name}: {message}" if name else f"line {line}: {message}"


def _place(root: yaml.Node | None, location: Location, *, missing: bool) -> tuple[list[str | int], int]:
    """Follow pydantic's location into the YAML tree, past the union tags it puts in; the keys and the line found.

    missing: the last step is a field that should be there.
    """
    node = root
    keys: list[str | int] = []
    line = 1 if root is None else root.start_mark.line + 1
    for position, step in enumerate(location):
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == step), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
            elif position < len(location) - 1 or not missing:
                continue  # the tag of a union ("poisson"), or a union's branch
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        elif position:
            continue
        keys.append(step)
    return keys, line
