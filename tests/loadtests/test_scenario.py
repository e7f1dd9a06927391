from pathlib import Path

import pytest

from loadtests.errors import LoadTestError, ScenarioError
from loadtests.inputs import load_inputs
from loadtests.prompts import load_prompts
from loadtests.scenario import load_scenario
from loadtests.session import resolve_keys
from tests.loadtests.factories import make_scenario

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "loadtests").glob("*.yaml"))
BROKEN = """\
name: broken
load: {kind: poisson, rate_per_s: -1}
objectives:
  - p95(ttft) < 1 s
  - p95(tft) < 1 s
phases:
  - {name: steady, duration_s: 10}
  - name: next
    duration_s: 5
    bogus: 1
"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_scenario_that_comes_along_can_be_run(path: Path) -> None:
    load_inputs(load_scenario(path))


def test_every_fault_is_named_with_its_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path)
    places = {fault.rsplit(": ", 1)[0].split(": ")[0] + " " + fault.split(": ")[1] for fault in caught.value.faults}
    assert places == {"line 2 load.rate_per_s", "line 5 objectives[1]", "line 10 phases[1].bogus"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "not YAML"),
        ("- a", "expected a mapping"),
        ("name: x\nload: {kind: gama}\nphases: []", "line 2: load"),
        (
            "name: x\nload: {kind: poisson, rate_per_s: 1}\nphases: [{name: a, duration_s: 1, measured: false}]",
            "one must be",
        ),
        (
            "name: x\nload: {kind: poisson, rate_per_s: 1}\nphases: [{name: a, duration_s: 1}]\nkeys: {b: c}",
            "no such tenant",
        ),
        (
            "name: x\nload: {kind: poisson, rate_per_s: 1}\nphases: [{name: a, duration_s: 1}]\nadapters: []",
            "empty list",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        load_scenario(path)


def test_a_missing_scenario_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_scenario(tmp_path / "none.yaml")


def test_prompt_files_lie_beside_the_scenario(tmp_path: Path) -> None:
    text = "name: x\nload: {kind: poisson, rate_per_s: 1}\nphases: [{name: a, duration_s: 1}]\n"
    (tmp_path / "s.yaml").write_text(text + "requests: {prompts: {kind: file, path: p.jsonl}}")
    with pytest.raises(ScenarioError, match=r"line 4: requests.prompts.path: no such file"):
        load_scenario(tmp_path / "s.yaml")
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n{"promt": 1}\n')
    prompts = load_scenario(tmp_path / "s.yaml").requests.prompts
    with pytest.raises(ScenarioError, match="prompt 2"):
        load_prompts(prompts)
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    load_prompts(prompts)


def test_keys_come_from_the_command_the_scenario_or_the_environment_in_this_order() -> None:
    scenario = make_scenario(
        tenants=[{"name": "a"}, {"name": "b-c"}, {"name": "d"}], keys={"a": "file-a", "d": "file-d"}
    )
    environment = {"LORIKEET_API_KEY_B_C": "env-b", "LORIKEET_API_KEY_D": "env-d", "LORIKEET_API_KEY": "nobody's"}
    assert resolve_keys(scenario, ["a=given-a"], environment) == {"a": "given-a", "b-c": "env-b", "d": "file-d"}


def test_a_single_tenant_needs_no_name_for_its_key() -> None:
    assert resolve_keys(make_scenario(), ["lk-1"], {}) == {"default": "lk-1"}
    assert resolve_keys(make_scenario(), [], {"LORIKEET_API_KEY": "lk-2"}) == {"default": "lk-2"}
    with pytest.raises(LoadTestError, match="TENANT=KEY"):
        resolve_keys(make_scenario(), ["nobody=lk-1"], {})
