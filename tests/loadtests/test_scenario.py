import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from loadtests.errors import LoadTestError, ScenarioError
from loadtests.inputs import load_inputs
from loadtests.loads import Poisson
from loadtests.scenario import Scenario, load_scenario
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


def test_load_is_open_unless_said_otherwise() -> None:
    scenario = Scenario.model_validate({"name": "x", "phases": [{"name": "a", "duration_s": 1}]})
    assert scenario.load == Poisson(rate_per_s=1)


def test_every_fault_is_named_with_its_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path)
    places = {fault.rsplit(": ", 1)[0].split(": ")[0] + " " + fault.split(": ")[1] for fault in caught.value.faults}
    assert places == {"line 2 load.rate_per_s", "line 5 objectives[1]", "line 10 phases[1].bogus"}


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: [", "not YAML"), ("due: 2024-13-45", "not YAML: month must be"), ("- a", "expected a mapping")],
)
def test_what_is_no_scenario_at_all_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text(text)
    with pytest.raises(ScenarioError, match=said):
        load_scenario(tmp_path / "scenario.yaml")


def faults_of(folder: Path, fields: str, *, load: str = "{kind: poisson, rate_per_s: 1}", phase: str = "") -> list[str]:
    """fields begin on line 4; fields of a phase on line 3."""
    path = folder / "scenario.yaml"
    path.write_text(f"name: x\nload: {load}\nphases: [{{name: a, duration_s: 9{phase}}}]\n{fields}\n")
    try:
        load_scenario(path)
    except ScenarioError as exc:
        return list(exc.faults)
    return []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("keys: {b: c}", "keys.b: no such tenant: b"),
        ("limits: {b: {requests_per_minute: 1, burst: 1}}", "limits.b: no such tenant: b"),
        ("limits: {default: {requests_per_minute: 1, burst: 0}}", "limits.default.burst: Input should be greater"),
        ("adapters: []", "adapters: an empty list"),
        ("tenants: [{name: b, adapters: []}]", "tenants[0].adapters: an empty list"),
        ("tenants: [{name: b}, {name: b}]", "tenants[1].name: another one is called b"),
        ("tenants: [{name: b, share: 0}]", "tenants: at least one needs a share"),
        ("popularity: {kind: pareto}", "popularity: Input tag 'pareto'"),
        ("popularity: {kind: geometric, ratio: 2}", "popularity.ratio: Input should be less"),
        ("popularity: {kind: hot_set, size: 2}", "popularity.share: Field required"),
        ("popularity: {kind: weights, path: none.csv}", "popularity.path: no such file: "),
        ("rotate_s: .inf", "rotate_s: Input should be a finite number"),
        ("rotate_s: 0", "rotate_s: Input should be greater"),
        ("canary_share: 0.5", "canary_share: there are no canaries"),
        ("canaries: [{adapter: a, prompt: b, expect: c, tenant: d}]", "canaries[0].tenant: no such tenant: d"),
        ("canaries: [{adapter: a, prompt: b}]", "canaries[0].expect: Field required"),
        ("shards: 0", "shards: Input should be greater"),
        ("price_per_hour: -1", "price_per_hour: Input should be greater"),
        ("goodput: {tftt: 400 ms}", "goodput.tftt: no such metric"),
        ("goodput: {ttft: 400}", "goodput.ttft: Input should be a valid string"),
        ("goodput: {ttft: '400'}", "goodput.ttft: '400' is no time"),
        ("objectives: ['p95(ttft) < 1 s in b*']", "objectives[0]: no measured phase is called b*"),
        ("scrape: [{name: g, url: 'http://g/metrics', series: []}]", "scrape[0].series: List should have at least 1"),
        (
            "scrape: [{name: g, url: g, series: [a]}]",
            "scrape[0].url: g: write http://host/metrics, or unix:/path/of.sock",
        ),
        ("scrape: [{name: g, url: 'unix:/e.sock', series: [a]}]", "scrape[0].url: unix:/e.sock: write http://host"),
        (
            "scrape: [{name: g, url: 'unix:$/e:/m', series: [a]}]",
            "scrape[0].url: unix:$/e:/m: write a variable as $NAME",
        ),
        ("scrape: [{name: g, url: 'http://g', series: ['a.']}]", "scrape[0].series[0]: a.: write name, name{label="),
        ("requests: {extra: {a: !!set {b}}}", "requests.extra.a: cannot be sent as JSON"),
        ("requests: {max_tokens: 0}", "requests.max_tokens: Input should be greater"),
        ("requests: {max_tokens: {kind: uniform, low: 9, high: 3}}", "requests.max_tokens: low (9) is above high (3)"),
        ("requests: {max_tokens: {kind: uniform, low: 9}}", "requests.max_tokens.high: Field required"),
        ("requests: {max_tokens: {kind: normal}}", "requests.max_tokens: Input tag 'normal'"),
        (
            "requests: {prompts: {kind: synthetic, words: {kind: lognormal, median: 9, sigma: 1, high: 3}}}",
            "requests.prompts.words: median (9) is above high (3)",
        ),
        ("requests: {prompts: {kind: file, path: none.txt}}", "requests.prompts.path: no such file: "),
        ("requests: {shared_prefix: {words: 5, share: 2}}", "requests.shared_prefix.share: Input should be less"),
        ("requests: {turns: {count: 1}}", "requests.turns.count: Input should be greater"),
        ("requests: {cancel: {share: 1}}", "requests.cancel.after_s: Field required"),
        ("requests: {slow_readers: {share: 1, pause_s: 0}}", "requests.slow_readers.pause_s: Input should be greater"),
    ],
)
def test_a_fault_of_the_scenario_is_named_with_its_place(fields: str, said: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, fields)
    assert fault.startswith(f"line 4: {said}")


def test_what_yaml_reads_as_dates_and_numbers_is_sent_as_json_has_it(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text("""\
name: x
load: {kind: poisson, rate_per_s: 1}
requests: {extra: {logit_bias: {50256: -100}}}
phases:
  - name: a
    duration_s: 9
    events: [{at_s: 1, name: e, request: {path: /x, tenant: default, json: {due: 2026-01-02}}}]
""")
    scenario = load_scenario(path)
    request = scenario.phases[0].events[0].request
    assert request is not None
    assert (scenario.requests.extra, request.body) == ({"logit_bias": {"50256": -100}}, {"due": "2026-01-02"})


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ("{kind: gama}", "load: Input tag 'gama'"),
        ("{rate_per_s: 1}", "load: Unable to extract tag"),
        ("{kind: gamma, rate_per_s: 1, cv: 0}", "load.cv: Input should be greater"),
        ("{kind: ramp, from_per_s: 0, to_per_s: 0}", "load: from_per_s and to_per_s are both 0"),
        ("{kind: trace, path: none.csv, format: azure}", "load.path: no such file: "),
        ("{kind: trace, path: scenario.yaml, format: alibaba}", "load.format: Input should be 'azure', 'burstgpt' or"),
        ("{kind: touch}", "load.gap_s: Field required"),
    ],
)
def test_a_fault_of_a_load_is_named_with_its_place(load: str, said: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, "", load=load)
    assert fault.startswith(f"line 2: {said}")


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("measured: false", "phases: at least one must be measured"),
        ("adapters: 0", "phases[0].adapters: Input should be greater"),
        ("adapters: []", "phases[0].adapters: List should have at least 1"),
        ("working_set: [0]", "phases[0].working_set[0]: Input should be greater"),
        ("working_set: [2, 2]", "phases[0].name: another one is called a-2"),
        ("working_set: [2], adapters: 3", "phases[0].adapters: either adapters or working_set"),
        (
            "neighbour: {tenant: b, load: {kind: poisson, rate_per_s: 1}}",
            "phases[0].neighbour.tenant: no such tenant: b",
        ),
        ("neighbour: {tenant: default, load: {kind: touch, gap_s: 1}}", "phases[0].neighbour.load: Input tag 'touch'"),
        ("audit: true", "phases[0].audit: needs `limits`"),
        ("load: {kind: closed, concurrency: 1}, rotate_s: 3", "phases[0].rotate_s: needs an open loop"),
        (
            "load: {kind: touch, gap_s: 1}, popularity: {kind: uniform}",
            "phases[0].popularity: a touch load has its own",
        ),
        ("events: [{at_s: 9, name: kill, run: [kill]}]", "phases[0].events[0].at_s: the phase ends at 9 s"),
        ("events: [{at_s: 1, name: nothing}]", "phases[0].events[0]: needs either run or request"),
        ("events: [{at_s: 1, name: kill, run: []}]", "phases[0].events[0].run: List should have at least 1"),
        (
            "events: [{at_s: 1, name: up, request: {path: /v1/x, tenant: b}}]",
            "phases[0].events[0].request.tenant: no such tenant: b",
        ),
        (
            "events: [{at_s: 1, name: up, request: {path: /v1/x, tenant: default, files: {file: none.zip}}}]",
            "phases[0].events[0].request.files.file: no such file: ",
        ),
        (
            "events: [{at_s: 1, name: up, request: {path: /x, tenant: default, json: {a: 1}, files: {f: scenario.yaml}}}]",
            "phases[0].events[0].request: either json or files",
        ),
    ],
)
def test_a_fault_of_a_phase_is_named_with_its_place(phase: str, said: str, tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path, "", phase=f", {phase}")
    assert fault.startswith(f"line 3: {said}")


def test_a_working_set_becomes_a_phase_per_size_and_a_run_keeps_it_so(tmp_path: Path) -> None:
    sweep = {"name": "set", "duration_s": 5, "working_set": [2, 16], "audit": True}
    request = {"path": "/v1/x", "tenant": "default", "json": {"a": 1}}
    events = [{"at_s": 0, "name": "move", "request": request}]
    scenario = make_scenario(
        phases=[{"name": "steady", "duration_s": 1, "events": events}, sweep],
        limits={"default": {"requests_per_minute": 60, "burst": 5}},
        requests={"max_tokens": {"kind": "uniform", "low": 1, "high": 3}},
    )
    assert [(p.name, p.adapters, p.duration_s, p.audit) for p in scenario.phases] == [
        ("steady", None, 1, False),
        ("set-2", 2, 5, True),
        ("set-16", 16, 5, True),
    ]
    assert Scenario.model_validate(json.loads(json.dumps(scenario.model_dump(mode="json")))) == scenario


def test_a_missing_scenario_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_scenario(tmp_path / "none.yaml")


def test_an_objective_on_a_phase_that_is_not_measured_is_refused() -> None:
    phases = [
        {"name": "warm-up", "duration_s": 1, "measured": False},
        {"name": "set", "duration_s": 1, "working_set": [2]},
    ]
    make_scenario(phases=phases, objectives=["p95(ttft) < 1 s in set-*"])
    with pytest.raises(ValidationError, match="no measured phase is called warm-up"):
        make_scenario(phases=phases, objectives=["p95(ttft) < 1 s in warm-up"])


def test_files_lie_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text('{"a": 1}')
    assert faults_of(tmp_path, "popularity: {kind: weights, path: w.json}") == []
    assert faults_of(tmp_path, f"popularity: {{kind: weights, path: {tmp_path}/w.json}}") == []


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
