"""Errors of libraries, said in one line."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from adapters.base import BaseSpec
from adapters.wording import one_line


def test_every_wrong_field_is_named_in_one_line() -> None:
    with pytest.raises(ValidationError) as caught:
        BaseSpec.model_validate({"name": "x", "colour": "red"})
    assert one_line(caught.value) == (
        "model: Field required; licence: Field required; colour: Extra inputs are not permitted"
    )


def test_a_whole_that_is_wrong_needs_no_field() -> None:
    with pytest.raises(ValidationError) as caught:
        BaseSpec(name="x", model="x", licence="x")
    assert one_line(caught.value) == "give exactly one of package, folder and hub"


def test_broken_yaml_is_told_with_its_place() -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("a: [1\nb: }")
    assert one_line(caught.value) == "not YAML: line 2, column 2: expected ',' or ']', but got ':'"


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "nowhere").read_text(encoding="utf-8")
    assert one_line(caught.value) == f"No such file or directory: {tmp_path / 'nowhere'}"


def test_anything_else_is_folded() -> None:
    assert one_line(ValueError("first\n   second")) == "first second"
