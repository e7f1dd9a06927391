"""The arrows between the rooms, and what importing one may drag in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("adapters", "gateway", "trainer", "loadtests")
MODULES = sorted(
    path.relative_to(ROOT)
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
    if "migrations/versions" not in path.as_posix()
)
HEAVY = ("torch", "vllm", "transformers", "peft", "trl", "datasets")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_rooms_import_each_other_only_along_the_arrows() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module", ["lorikeet", "gateway.app", "adapters.registry", "adapters.validation", "loadtests.cli"]
)
def test_importing_a_serving_module_loads_no_training_or_engine_library(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])").strip()
    assert loaded == "[]"


def test_the_lorikeet_command_imports_no_room_before_a_command_runs() -> None:
    loaded = run_python(f"import sys, lorikeet; print([m for m in {ROOMS} if m in sys.modules])").strip()
    assert loaded == "[]"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_opens_by_saying_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))), f"{path} has no docstring"
