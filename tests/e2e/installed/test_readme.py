"""What the README tells people to type works, in its order, on a real engine."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.home import home
from tests.e2e.installed.machine import Machine
from tests.factories import make_adapter

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def is_installed() -> bool:
    """Whether `make` finds this interpreter's packages as it wants them and will install nothing: see scripts/install.sh."""
    parts = [(ROOT / "locks" / "cpu.txt").read_bytes(), (ROOT / "pyproject.toml").read_bytes(), f"{ROOT}\n".encode()]
    stamp = Path(sys.prefix) / "lorikeet-cpu.stamp"
    return stamp.is_file() and stamp.read_text().strip() == hashlib.sha256(b"".join(parts)).hexdigest()


def make(target: str, machine: Machine) -> str:
    """What `make up` or `make down` prints; where it would have to install something first, the command behind it."""
    command = ["make", target, "PROFILE=cpu", f"VENV={sys.prefix}"]
    if not is_installed():
        logger.warning("no make: %s is not what `make install` makes of locks/cpu.txt and pyproject.toml", sys.prefix)
        command = [sys.executable, "-m", "lorikeet", target]
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the `make test` that runs this
    environment = {name: value for name, value in machine.environment.items() if name not in outer}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def find(pattern: str, text: str) -> str:
    found = re.search(pattern, text, flags=re.MULTILINE)
    assert found, f"{pattern} is not in\n{text}"
    return found[1]


def pattern_of(line: str) -> str:
    """A line that the README shows, with what differs from run to run left open."""
    open_parts = {r"lk-…": r"lk-\S+", r"\d+\.\d s": r"\d+\.\d s", r"http://\S+(?=/v1)": r"\S+", r"~/\.lorikeet": r"\S+"}
    for shown, meant in open_parts.items():
        if found := re.search(shown, line):
            return rf"^ *({re.escape(line[: found.start()])}{meant}{re.escape(line[found.end() :])})$"
    return f"^ *({re.escape(line)})$"


def write_reduced(kind: str, folder: Path, **changes: Any) -> None:
    """The configuration of the README's training or evaluation, reduced to seconds."""
    name = find(rf"^lorikeet {kind} (\S+)", README)
    reduced = yaml.safe_load((ROOT / "configs" / kind / f"{name}.yaml").read_text(encoding="utf-8"))
    for field, value in changes.items():
        reduced[field] = reduced.get(field, {}) | value if isinstance(value, dict) else value
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(reduced), encoding="utf-8")


def test_the_two_commands_and_every_other_target_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", README, flags=re.MULTILINE))
    assert {"up", "down", "test", "demo"} <= named
    for target in sorted(named):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_command_of_the_readme_runs(machine: Machine, base_model: Path, tmp_path: Path) -> None:
    """`make up` and the line it prints; the blocks marked `run`, with training and evaluation reduced to seconds, and a PEFT
    folder for ADAPTER; the example in Python; and `make down`.
    """
    machine.home.mkdir()
    home().datasets.mkdir(parents=True, exist_ok=True)
    for kept in (base_model.parent, home().datasets):  # made or fetched once a machine
        (machine.home / kept.name).symlink_to(kept)
    printed = make("up", machine)
    for line in blocks("text")[0].splitlines():
        find(pattern_of(line), printed)
    key, url, model = (find(rf"^ +{label}$", printed) for label in (r"(lk-\S+)", r"Address +(\S+)/v1", r"Model +(\S+)"))
    assert url.endswith(machine.environment["LORIKEET_PORT"])
    curl = find(r"^(curl (?:.*\\\n)*.*)$", printed)
    done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=120, check=False)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"], done.stderr

    adapters = {
        name: str(make_adapter(tmp_path / name, base_model, rank=8, seed=len(name))) for name in ("ADAPTER", "ADAPTER2")
    }
    optimizer = {"max_steps": 2, "evaluations": 1}
    write_reduced("train", tmp_path, data={"train_rows": 8, "eval_rows": 4}, optimizer=optimizer, goldens=2)
    judge = {"url": url, "model": model, "key_env": "KEY", "max_tokens": 16}  # the base itself: a real, if poor, judge
    write_reduced("eval", tmp_path, rows=4, judge=judge)
    script = "\n".join(["set -euo pipefail", *blocks("sh run")])
    script = re.sub(r"\bADAPTER2?\b", lambda found: adapters[found[0]], script)
    script = re.sub(r"^lorikeet (train|eval) \S+", r"lorikeet \1 \1.yaml", script, flags=re.MULTILINE)
    script = script.replace("configs/", f"{ROOT}/configs/")
    environment = machine.environment | {
        "LORIKEET_URL": url,
        "KEY": key,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-x", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "merged" / "config.json").is_file()
    assert '"ready":true' in done.stdout
    (evaluated,) = (machine.home / "runs").glob("eval-*/report.json")
    report = json.loads(evaluated.read_text(encoding="utf-8"))
    assert report["metrics"]["adapter"]
    assert report["judge"]["spent"]["asked"] + report["judge"]["spent"]["kept"] == 8  # both orders of four pairs

    (example,) = blocks("python")
    example = example.replace("http://127.0.0.1:8080", url).replace("lk-…", key)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

    make("down", machine)
    assert machine.processes() == []
