import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.answers import is_another

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True)
VERSIONS = st.integers(1, 99)


@pytest.mark.parametrize(
    ("asked", "served_by"),
    [
        ("support", ""),  # a server that does not say
        ("support", "support@2"),
        ("support@2", "support@2"),
        ("acme/support", "support@2"),  # asked by acme itself
        ("acme/support", "acme/support@2"),
        ("acme/support@2", "acme/support@2"),
        ("base", "base"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/models/llama@home", "/models/llama@home"),
    ],
)
def test_the_label_of_the_asked_model_is_recognised(asked: str, served_by: str) -> None:
    assert not is_another(asked, served_by, tenant="acme")


@pytest.mark.parametrize(
    ("asked", "served_by"),
    [
        ("support", "legal@2"),
        ("support@2", "support@3"),
        ("support", "base"),
        ("base", "support@1"),
        ("support", "zeta/support@2"),  # another tenant's of the same name
        ("acme/support", "zeta/support@2"),
        ("zeta/support", "support@2"),  # zeta's was asked for, acme's own answers
        ("HuggingFaceTB/SmolLM2-135M", "support@1"),
    ],
)
def test_the_label_of_another_model_is_noticed(asked: str, served_by: str) -> None:
    assert is_another(asked, served_by, tenant="acme")


@given(name=NAMES, owner=NAMES, version=VERSIONS, other=NAMES)
def test_no_way_to_write_an_adapter_is_accused_and_no_other_name_is_let_through(
    name: str, owner: str, version: int, other: str
) -> None:
    for asked in (name, f"{name}@{version}", f"{owner}/{name}", f"{owner}/{name}@{version}"):
        assert not is_another(asked, f"{name}@{version}", tenant=owner)
        assert is_another(asked, f"{other}@{version}", tenant=owner) == (other != name)
