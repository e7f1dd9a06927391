"""What a library's error says, in one line: for commands, whose errors are read on a terminal and in a log."""

import yaml
from pydantic import ValidationError


def one_line(exc: Exception) -> str:
    """Every field that is wrong, the place where YAML ends to be YAML, or the file and what the system says about it."""
    if isinstance(exc, ValidationError):
        return "; ".join(f"{_field(error['loc'])}{_plain(error['msg'])}" for error in exc.errors())
    if isinstance(exc, yaml.MarkedYAMLError) and exc.problem_mark is not None:
        mark = exc.problem_mark
        return f"not YAML: line {mark.line + 1}, column {mark.column + 1}: {exc.problem or exc.context}"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror if exc.filename is None else f"{exc.strerror}: {exc.filename}"
    return " ".join(str(exc).split())


def _field(location: tuple[int | str, ...]) -> str:
    return f"{'.'.join(map(str, location))}: " if location else ""


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")
