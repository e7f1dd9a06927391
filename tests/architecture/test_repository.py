"""What may not be in the repository, and what must be."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".html", ".js", ".css", ".json", ".jinja", ".mako", ""}
# Where somebody's machine keeps things, and where packages come from: neither is anybody else's business.
MACHINE = re.compile(
    "|".join(
        (
            r"(?<![\w.}])/(?:home|Users|root|opt|work|mnt|media)/\w",
            r"file:///",
            r"index-url\s*[=:]?\s*\S*://",
            r"download\.pytorch",
            r"pypi\.",
            r"pythonhosted",
        )
    )
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_machine_path_or_a_package_index() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in tracked_files()
        if path.suffix in TEXT and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


def test_nothing_large_and_no_weights_are_tracked() -> None:
    for path in tracked_files():
        assert path.stat().st_size < 2_000_000, f"{path.relative_to(ROOT)} is too large for the repository"
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".gguf"}, path.relative_to(ROOT)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", ".ci/run"])
def test_what_a_newcomer_looks_for_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0
