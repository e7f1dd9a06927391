"""What the README tells people to type works, in its order, on a real engine."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.machine import Machine
from tests.factories import make_adapter

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_two_commands_and_every_other_target_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", README, flags=re.MULTILINE))
    assert {"up", "down", "test", "demo"} <= named
    for target in sorted(named):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_command_of_the_readme_runs(machine: Machine, base_model: Path, tmp_path: Path) -> None:
    """The blocks marked `run`, on an installation that `lorikeet up` has just made; ADAPTER stands for a PEFT folder. Then the
    example in Python, and at last the merged model on an engine of its own.
    """
    machine.home.mkdir()
    (machine.home / "models").symlink_to(base_model.parent)
    first = machine.json("up")
    adapters = {
        name: str(make_adapter(tmp_path / name, base_model, rank=8, seed=len(name))) for name in ("ADAPTER", "ADAPTER2")
    }
    script = "\n".join(["set -euo pipefail", *blocks("sh run")])
    script = re.sub(r"\bADAPTER2?\b", lambda found: adapters[found[0]], script)
    script = script.replace("configs/", f"{ROOT}/configs/")
    environment = machine.environment | {
        "LORIKEET_URL": first["url"],
        "KEY": first["key"],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-x", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "merged" / "config.json").is_file()
    assert '"ready":true' in done.stdout

    (example,) = blocks("python")
    example = example.replace("http://127.0.0.1:8080", first["url"]).replace("lk-…", first["key"])
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

    machine.run("down")
    machine.environment["LORIKEET_BASE"] = str(tmp_path / "merged")
    second = machine.json("up")
    assert second["base_model"] != first["base_model"]
    with openai.OpenAI(base_url=f"{second['url']}/v1", api_key=first["key"]) as client:
        assert [model.id for model in client.models.list()] == [second["base_model"]]  # adapters belong to their base
        messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=second["base_model"], messages=messages, max_tokens=16)
    assert answer.choices[0].message.content
