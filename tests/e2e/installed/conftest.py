"""Installations of their own, with engines of their own, which commands start and end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.installed.machine import Machine


@pytest.fixture
def machine(tmp_path: Path, base_model: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "home", base_model)
    yield made
    made.run("down")
