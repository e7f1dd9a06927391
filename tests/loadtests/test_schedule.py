import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loadtests.prompts import QUESTIONS, load_prompts
from loadtests.schedule import Workload, plan_phase, plan_schedule, save_schedule, windows
from tests.loadtests.factories import make_scenario

MODELS = {"default": ["a", "b", "c", "d"]}


def make_workload(models: dict[str, list[str]] | None = None, **fields: Any) -> Workload:
    scenario = make_scenario(**fields)
    return Workload(scenario, models or MODELS, load_prompts(scenario.requests.prompts))


def test_the_same_seed_plans_the_same_run_and_another_seed_another() -> None:
    load = {"kind": "poisson", "rate_per_s": 40}
    first, again, other = (plan_schedule(make_workload(load=load, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other


def test_a_phase_begins_where_the_one_before_ends() -> None:
    phases = [{"name": "warm-up", "duration_s": 2, "measured": False}, {"name": "steady", "duration_s": 3}]
    workload = make_workload(phases=phases)
    assert [(w.name, w.start_s, w.end_s) for w in windows(workload.scenario.phases)] == [
        ("warm-up", 0, 2),
        ("steady", 2, 5),
    ]
    assert plan_phase(workload, 1)[0].at_s == 2.0
    assert len(plan_phase(workload, 1)) == 120


def test_what_a_request_asks_does_not_depend_on_the_rate() -> None:
    slow = plan_phase(make_workload(load={"kind": "constant", "rate_per_s": 10}), 0)
    quick = plan_phase(make_workload(load={"kind": "constant", "rate_per_s": 40}), 0)
    assert [(p.id, p.adapter, p.prompt) for p in slow] == [(p.id, p.adapter, p.prompt) for p in quick[:10]]


def test_a_closed_loop_plans_no_instants_but_the_same_requests() -> None:
    closed = make_workload(load={"kind": "closed", "concurrency": 2})
    assert plan_phase(closed, 0) == []
    sequence = closed.requests(0)
    opened = plan_phase(make_workload(), 0)
    assert [(p.adapter, p.prompt) for p in opened] == [(p.adapter, p.prompt) for p, _ in zip(sequence, opened)]  # noqa: B905


def test_adapters_tenants_and_streams_come_in_their_shares() -> None:
    workload = make_workload(
        {"acme": ["a", "b", "c", "d"], "zeta": ["z"]},
        tenants=[{"name": "acme", "share": 3}, {"name": "zeta"}],
        popularity={"kind": "zipf", "exponent": 1.0},
        requests={"streaming_share": 0.5},
        phases=[{"name": "steady", "duration_s": 200}],
    )
    planned = plan_phase(workload, 0)
    counts = Counter(p.adapter for p in planned)
    assert counts["z"] / len(planned) == pytest.approx(0.25, abs=0.02)
    assert counts["a"] / counts["b"] == pytest.approx(2, rel=0.1)
    assert counts["a"] / counts["d"] == pytest.approx(4, rel=0.15)
    assert sum(p.stream for p in planned) / len(planned) == pytest.approx(0.5, abs=0.02)
    assert {p.tenant for p in planned if p.adapter == "z"} == {"zeta"}


def test_every_prompt_is_unlike_every_other_unless_asked_otherwise() -> None:
    planned = plan_phase(make_workload(phases=[{"name": "steady", "duration_s": 20}]), 0)
    assert len({p.prompt for p in planned}) == len(planned) == 800
    assert {p.prompt for p in plan_phase(make_workload(requests={"nonce": False}), 0)} <= set(QUESTIONS)


def test_synthetic_prompts_have_the_length_asked_for() -> None:
    shape = {"prompts": {"kind": "synthetic", "words": 33}, "nonce": False}
    assert {len(p.prompt.split()) for p in plan_phase(make_workload(requests=shape), 0)} == {33}


def test_the_schedule_is_kept_a_request_a_line(tmp_path: Path) -> None:
    schedule = plan_schedule(make_workload())
    save_schedule(tmp_path / "new" / "schedule.jsonl", schedule)
    lines = [json.loads(line) for line in (tmp_path / "new" / "schedule.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [planned.id for planned in schedule[0]]
