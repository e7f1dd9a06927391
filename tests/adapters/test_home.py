from pathlib import Path

import pytest

from adapters.home import Home


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://localhost:8080/v1", True),
        ("http://[::1]:8080", True),
        ("https://models.example", False),
        ("http://127.evil.example", False),
        ("http://10.0.0.7:8080", False),
    ],
)
def test_the_operators_key_never_leaves_its_machine(tmp_path: Path, url: str, given: bool) -> None:
    (tmp_path / "operator-key").write_text("lk-operator\n")
    assert Home(tmp_path).operator_key_for(url) == ("lk-operator" if given else None)


def test_where_no_gateway_ran_there_is_no_key(tmp_path: Path) -> None:
    assert Home(tmp_path).operator_key_for("http://127.0.0.1:8080") is None
