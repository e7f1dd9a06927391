"""The locks agree with each other and with pyproject.toml, and the gateway installs alone."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("gateway", "cpu", "dev", "gpu", "trainer")
EXTRAS = {
    "gateway": (),
    "cpu": ("engine-cpu", "trainer", "loadtests"),
    "dev": ("engine-cpu", "trainer", "loadtests", "dev", "postgres", "redis", "otel"),
    "gpu": ("engine-gpu", "trainer", "loadtests", "postgres", "redis", "otel"),
    "trainer": ("trainer",),
}
BREAKS_ON_CPU = {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"}


def locked(name: str) -> dict[str, str]:
    text = (ROOT / f"locks/{name}.txt").read_text(encoding="utf-8")
    return {
        canonicalize_name(project): version for project, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    }


def requirements(name: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in EXTRAS[name] for line in project["optional-dependencies"][extra]),
    ]
    return [Requirement(line) for line in wanted]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_every_requirement_in_a_version_that_satisfies_it(name: str) -> None:
    versions = locked(name)
    for requirement in requirements(name):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"locks/{name}.txt lacks {requirement.name}: run make lock"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} against {version}: run make lock"
        )


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_of_a_lock_is_pinned_and_hashed(name: str) -> None:
    text = (ROOT / f"locks/{name}.txt").read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("#")]
    assert len(entries) > 20
    for entry in entries:
        assert re.match(r"[\w.-]+==\S+ \\\n +--hash=sha256:[0-9a-f]{64}", entry), entry[:80]


@pytest.mark.parametrize(("smaller", "bigger"), [("gateway", "cpu"), ("cpu", "dev"), ("trainer", "gpu")])
def test_a_bigger_lock_holds_the_smaller_one_version_for_version(smaller: str, bigger: str) -> None:
    """So that installing one after another changes nothing, and having the bigger one is having both."""
    assert locked(smaller).items() <= locked(bigger).items()


@pytest.mark.parametrize("name", ["cpu", "dev"])
def test_the_cpu_locks_leave_out_what_breaks_beside_torchs_cpu_build(name: str) -> None:
    assert not BREAKS_ON_CPU & locked(name).keys()
    assert locked(name)["torch"].endswith("+cpu")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gateway_installs_alone_and_starts_without_torch_or_vllm(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
    pip: list[str | Path] = [
        venv / "bin/pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    subprocess.run([*pip, "--require-hashes", "-r", ROOT / "locks/gateway.txt"], check=True, timeout=300)
    wheel = tmp_path / "wheel"
    subprocess.run(
        [venv / "bin/pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheel, clean_copy(tmp_path / "source")],
        check=True,
        timeout=300,
    )
    subprocess.run([*pip, *wheel.glob("*.whl")], check=True, timeout=60)
    code = (
        "import importlib.util as u, sys, gateway.app, gateway.cli.running\n"
        "from gateway.settings import CONFIGS\n"
        "assert CONFIGS.is_dir() and (CONFIGS / 'gateway.yaml').is_file(), CONFIGS\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if u.find_spec(m) or m in sys.modules])"
    )
    done = subprocess.run([venv / "bin/python", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    shown = subprocess.run(
        [venv / "bin/lorikeet", "tenants", "list", "--json"],
        cwd=tmp_path,
        env={"LORIKEET_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    assert '"data": []' in shown.stdout


def clean_copy(target: Path) -> Path:
    """The tracked files alone: a build in the working tree would leave its own behind."""
    target.mkdir()
    archive = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=30).stdout
    for name in filter(None, archive.decode().split("\0")):
        source = ROOT / name
        if source.is_file() and name.split("/")[0] in {
            *("adapters", "gateway", "trainer", "loadtests", "configs"),
            *("lorikeet.py", "pyproject.toml", "README.md", "LICENSE"),
        }:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(source.read_bytes())
    return target
