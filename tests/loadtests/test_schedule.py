import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.errors import ScenarioError
from loadtests.inputs import load_inputs
from loadtests.prompts import QUESTIONS
from loadtests.schedule import Planned, Workload, plan_phase, plan_schedule, save_schedule, windows
from tests.loadtests.factories import make_scenario

MODELS = {"default": ["a", "b", "c", "d"]}
LONG = [{"name": "steady", "duration_s": 50}]  # at 40 a second: 2000 requests
TENANTS = [{"name": "acme", "share": 3}, {"name": "zeta"}]


def make_workload(models: dict[str, list[str]] | None = None, **fields: Any) -> Workload:
    scenario = make_scenario(**fields)
    return Workload(scenario, models or MODELS, load_inputs(scenario))


def plan(models: dict[str, list[str]] | None = None, **fields: Any) -> list[Planned]:
    """The first phase."""
    return plan_phase(make_workload(models, **fields), 0)


def share(planned: list[Planned], having: Any) -> float:
    return sum(map(bool, map(having, planned))) / len(planned)


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


def test_a_phase_that_is_changed_or_put_before_leaves_the_requests_of_others_alone() -> None:
    steady = {"name": "steady", "duration_s": 5, "load": {"kind": "gamma", "rate_per_s": 20, "cv": 2}}
    other = {"name": "other", "duration_s": 2, "popularity": {"kind": "geometric", "ratio": 0.5}}
    alone = plan_schedule(make_workload(phases=[steady]))[0]
    behind = plan_schedule(make_workload(phases=[other, steady]))[1]
    np.testing.assert_allclose([p.at_s or 0 for p in behind], [2 + (p.at_s or 0) for p in alone])
    assert [(p.id, p.adapter, p.prompt, p.stream) for p in behind] == [
        (p.id, p.adapter, p.prompt, p.stream) for p in alone
    ]


def test_what_a_request_asks_does_not_depend_on_the_rate() -> None:
    slow = plan(load={"kind": "constant", "rate_per_s": 10})
    quick = plan(load={"kind": "constant", "rate_per_s": 40})
    assert [(p.id, p.adapter, p.prompt) for p in slow] == [(p.id, p.adapter, p.prompt) for p in quick[:10]]


def test_a_closed_loop_plans_no_instants_but_the_same_requests() -> None:
    closed = make_workload(load={"kind": "closed", "concurrency": 2})
    assert plan_phase(closed, 0) == []
    sequence = closed.requests(0)
    assert [(p.adapter, p.prompt) for p in plan()] == [(p.adapter, p.prompt) for p, _ in zip(sequence, range(40))]  # noqa: B905


def test_adapters_tenants_and_streams_come_in_their_shares() -> None:
    planned = plan(
        {"acme": ["a", "b", "c", "d"], "zeta": ["z"]},
        tenants=TENANTS,
        popularity={"kind": "zipf", "exponent": 1.0},
        requests={"streaming_share": 0.5},
        phases=[{"name": "steady", "duration_s": 200}],
    )
    counts = Counter(p.adapter for p in planned)
    assert counts["z"] / len(planned) == pytest.approx(0.25, abs=0.02)
    assert counts["a"] / counts["b"] == pytest.approx(2, rel=0.1)
    assert counts["a"] / counts["d"] == pytest.approx(4, rel=0.15)
    assert share(planned, lambda p: p.stream) == pytest.approx(0.5, abs=0.02)
    assert {p.tenant for p in planned if p.adapter == "z"} == {"zeta"}


def test_a_phase_may_have_its_own_popularity_rotation_and_adapters() -> None:
    hot = {"kind": "hot_set", "size": 1, "share": 1.0}
    phases = [
        {"name": "all", "duration_s": 1},
        {"name": "hot", "duration_s": 3, "popularity": hot, "rotate_s": 1, "adapters": ["d", "b", "a"]},
        {"name": "set", "duration_s": 1, "working_set": [1, 3]},
    ]
    workload = make_workload(phases=phases, popularity={"kind": "round_robin"})
    everyone, rotating, one, three = plan_schedule(workload)
    assert [p.adapter for p in everyone] == list("abcd") * 10
    assert [p.adapter for p in rotating] == ["d"] * 40 + ["b"] * 40 + ["a"] * 40
    assert [p.adapter for p in one] == ["a"] * 40
    assert [p.adapter for p in three] == (list("abc") * 14)[:40]
    assert [p.phase for p in (one[0], three[0])] == ["set-1", "set-3"]


def test_every_prompt_is_unlike_every_other_unless_asked_otherwise() -> None:
    planned = plan(phases=LONG)
    assert len({p.prompt for p in planned}) == len(planned) == 2000
    assert all(p.prompt.startswith(f"[{p.mark}] ") for p in planned)
    plain = plan(requests={"nonce": False})
    assert {p.prompt for p in plain} <= set(QUESTIONS)
    assert {p.mark for p in plain} == {""}


def test_another_run_asks_the_same_but_for_its_marks() -> None:
    scenario = make_scenario()
    first, second = (plan_phase(Workload(scenario, MODELS, load_inputs(scenario), salt=salt), 0) for salt in "ab")
    assert not {p.mark for p in first} & {p.mark for p in second}
    bare = [[replace(p, mark="", prompt=p.prompt.replace(p.mark, "")) for p in some] for some in (first, second)]
    assert bare[0] == bare[1]


@pytest.mark.parametrize("nonce", [True, False])
def test_another_run_begins_with_other_words_and_equally_many_unless_asked_otherwise(
    tmp_path: Path, nonce: bool
) -> None:
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1]}
    (tmp_path / "trace.jsonl").write_text(json.dumps(row) + "\n")
    load = {"kind": "trace", "path": tmp_path / "trace.jsonl", "format": "mooncake"}
    phases = [{"name": "trace", "duration_s": 1, "load": load}, {"name": "prefixed", "duration_s": 1}]
    shape = {"nonce": nonce, "shared_prefix": {"words": 50, "share": 1}}
    scenario = make_scenario(phases=phases, requests=shape)
    for phase, shared in ((0, 512), (1, 50)):
        workloads = [Workload(scenario, MODELS, load_inputs(scenario), salt=salt) for salt in "aab"]
        first, same, other = (plan_phase(workload, phase)[0].prompt.split() for workload in workloads)
        assert first == same
        assert (first[:shared] == other[:shared]) is not nonce
        assert first[shared + nonce :] == other[shared + nonce :]


def test_a_shared_prefix_stands_before_the_nonce_where_a_cache_can_use_it() -> None:
    planned = plan(phases=LONG, requests={"shared_prefix": {"words": 50, "share": 0.3}})
    beginnings = Counter(" ".join(p.prompt.split()[:50]) for p in planned)
    prefix, count = beginnings.most_common(1)[0]
    assert count / len(planned) == pytest.approx(0.3, abs=0.04)
    assert all(p.prompt.removeprefix(prefix + " ").startswith(f"[{p.mark}] ") for p in planned)


def test_lengths_are_drawn_for_prompts_and_caps() -> None:
    caps = {"kind": "uniform", "low": 10, "high": 20}
    words = {"kind": "lognormal", "median": 30, "sigma": 0.4, "high": 200}
    shape = {"prompts": {"kind": "synthetic", "words": words}, "nonce": False, "max_tokens": caps}
    planned = plan(phases=LONG, requests=shape)
    assert {p.max_tokens for p in planned} == set(range(10, 21))
    assert np.median([len(p.prompt.split()) for p in planned]) == pytest.approx(30, rel=0.05)


def test_a_conversation_has_its_questions_planned() -> None:
    for planned in plan(requests={"turns": {"count": 3, "think_s": 0.5}}):
        assert len(planned.follow_ups) == 2
        assert set(planned.follow_ups) <= set(QUESTIONS)
        assert planned.think_s == 0.5


def test_some_clients_leave_and_some_read_slowly_and_the_rest_ask_what_they_would_have_asked() -> None:
    plain = plan(phases=LONG)
    shape = {"cancel": {"share": 0.1, "after_s": 0.2}, "slow_readers": {"share": 0.3, "pause_s": 0.05}}
    planned = plan(phases=LONG, requests=shape)
    assert share(planned, lambda p: p.cancel_after_s == 0.2) == pytest.approx(0.1, abs=0.03)
    assert share(planned, lambda p: p.read_pause_s == 0.05) == pytest.approx(0.3, abs=0.04)
    assert {p.cancel_after_s for p in plain} == {None}
    assert [(p.id, p.adapter, p.prompt) for p in planned] == [(p.id, p.adapter, p.prompt) for p in plain]


def test_no_choice_hangs_on_another() -> None:
    shape = {
        "streaming_share": 0.5,
        "cancel": {"share": 0.5, "after_s": 1},
        "slow_readers": {"share": 0.5, "pause_s": 1},
        "shared_prefix": {"words": 30, "share": 0.5},
        "nonce": False,
    }
    canaries = [{"adapter": name, "prompt": "?", "expect": "!"} for name in "abcd"]
    planned = [p for p in plan(phases=LONG, requests=shape, canaries=canaries, canary_share=0.5) if not p.expect]
    chosen = [
        (p.stream, p.cancel_after_s is not None, p.read_pause_s > 0, len(p.prompt.split()) > 30, p.adapter in "ab")
        for p in planned
    ]
    np.testing.assert_allclose(np.mean(chosen, axis=0), 0.5, atol=0.06)
    np.testing.assert_allclose(np.corrcoef(np.array(chosen).T), np.eye(5), atol=0.12)


def test_phases_do_not_repeat_each_others_choices() -> None:
    first, second = plan_schedule(make_workload(phases=[{"name": name, "duration_s": 5} for name in "ab"]))
    assert [p.adapter for p in first] != [p.adapter for p in second]


def test_canaries_take_the_place_of_their_adapters_requests() -> None:
    canaries = [
        {"adapter": "a", "prompt": "rose?", "expect": "red"},
        {"adapter": "a", "prompt": "leaf?", "expect": "green"},
        {"adapter": "b", "prompt": "sky?", "expect": "blue"},
    ]
    shape = {
        "max_tokens": {"kind": "uniform", "low": 1, "high": 9},
        "turns": {"count": 2},
        "cancel": {"share": 1, "after_s": 1},
    }
    planned = plan(phases=LONG, canaries=canaries, canary_share=0.2, requests=shape)
    asked = {p.id: p for p in planned if p.expect}
    assert {(p.adapter, p.prompt, p.expect) for p in asked.values()} == {
        (canary["adapter"], canary["prompt"], canary["expect"]) for canary in canaries
    }
    for adapter in "ab":
        theirs = [p for p in planned if p.adapter == adapter]
        assert share(theirs, lambda p: p.expect) == pytest.approx(0.2, abs=0.05)
    # nothing that could keep the right answer from being seen
    assert {(p.mark, p.follow_ups, p.cancel_after_s, p.max_tokens) for p in asked.values()} == {("", (), None, 64)}
    without = {p.id: p for p in plan(phases=LONG, requests=shape)}
    assert all(p == without[p.id] for p in planned if p.id not in asked)


def test_a_canary_may_be_one_tenants_and_has_a_cap_of_its_own() -> None:
    canary = {"adapter": "a", "prompt": "rose?", "expect": "red", "max_tokens": 5}
    models = {"acme": ["a"], "zeta": ["a"]}
    everyone = plan(models, tenants=TENANTS, canaries=[canary], canary_share=1)
    assert {(p.tenant, p.expect, p.max_tokens) for p in everyone} == {("acme", "red", 5), ("zeta", "red", 5)}
    own = plan(models, tenants=TENANTS, canaries=[canary | {"tenant": "zeta"}], canary_share=1)
    assert {(p.tenant, p.expect, p.max_tokens) for p in own} == {("acme", "", 64), ("zeta", "red", 5)}
    with pytest.raises(ScenarioError, match="canaries: zeta may not ask a"):
        plan({"acme": ["a"], "zeta": ["b"]}, tenants=TENANTS, canaries=[canary | {"tenant": "zeta"}])


def test_touches_are_each_adapter_twice_and_then_all_once_more() -> None:
    models = {"acme": ["a", "b"], "zeta": ["b"], "idle": ["i"]}
    planned = plan(
        models,
        tenants=[*TENANTS, {"name": "idle", "share": 0}],
        phases=[{"name": "cold", "duration_s": 4.5}],
        load={"kind": "touch", "gap_s": 0.5},
        requests={"cancel": {"share": 1, "after_s": 1}, "turns": {"count": 2}},
    )
    assert [(p.at_s, p.tenant, p.adapter, p.visit) for p in planned] == [
        (0.0, "acme", "a", "first"),
        (0.5, "acme", "a", "again"),
        (1.0, "acme", "b", "first"),
        (1.5, "acme", "b", "again"),
        (2.0, "zeta", "b", "first"),  # another tenant's b is another adapter
        (2.5, "zeta", "b", "again"),
        (3.0, "acme", "a", "after_eviction"),
        (3.5, "acme", "b", "after_eviction"),
        (4.0, "zeta", "b", "after_eviction"),
    ]
    assert {(p.cancel_after_s, p.follow_ups) for p in planned} == {(None, ())}
    assert {p.visit for p in plan()} == {""}


def trace(tmp_path: Path, rows: int = 2000, sessions: int = 200) -> dict[str, Any]:
    """A BurstGPT trace: ten requests a second, of so many sessions in turn."""
    head = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path = tmp_path / "trace.csv"
    path.write_text(
        head + "".join(f"{n / 10},s{n % sessions},1,M,{n % 50 + 1},{n % 30},9,Conversation log\n" for n in range(rows))
    )
    return {"kind": "trace", "path": path, "format": "burstgpt"}


def test_a_trace_is_replayed_at_its_scaled_instants_with_its_lengths(tmp_path: Path) -> None:
    load = trace(tmp_path) | {"speed": 4.0, "start_s": 10.0}
    phases = [{"name": "warm-up", "duration_s": 5}, {"name": "real", "duration_s": 20, "load": load}]
    planned = plan_schedule(make_workload(phases=phases, requests={"nonce": False}))[1]
    assert len(planned) == 800
    np.testing.assert_allclose([p.at_s or 0 for p in planned], 5 + np.arange(800) / 40)
    numbers = range(100, 900)
    assert [len(p.prompt.split()) for p in planned] == [n % 50 + 1 for n in numbers]
    assert [p.max_tokens for p in planned] == [max(n % 30, 1) for n in numbers]
    assert {p.follow_ups for p in planned} == {()}


def test_prompts_of_a_trace_begin_with_the_blocks_they_share_and_not_with_the_nonce(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    first, second = plan(load={"kind": "trace", "path": path, "format": "mooncake"})
    assert first.mark != second.mark
    assert first.prompt.split()[:512] == second.prompt.split()[:512]
    assert [p.prompt.split()[512] for p in (first, second)] == [f"[{p.mark}]" for p in (first, second)]


def test_a_session_of_a_trace_keeps_its_tenant_and_adapter_and_sessions_follow_zipf(tmp_path: Path) -> None:
    load = trace(tmp_path, rows=8000, sessions=4000) | {"sessions": 1.0}
    models = {"acme": ["a", "b", "c", "d"], "zeta": ["z"]}
    phases = [{"name": name, "duration_s": 800, "load": load} for name in ("one", "two")]
    workload = make_workload(models, tenants=TENANTS, phases=phases, popularity={"kind": "uniform"})
    first, second = plan_schedule(workload)
    targets = [(p.tenant, p.adapter) for p in first]
    assert targets[:4000] == targets[4000:] == [(p.tenant, p.adapter) for p in second][:4000]
    counts = Counter(targets[:4000])
    assert counts["zeta", "z"] / 4000 == pytest.approx(0.25, abs=0.03)
    assert counts["acme", "a"] / counts["acme", "b"] == pytest.approx(2, rel=0.15)
    assert counts["acme", "a"] / counts["acme", "d"] == pytest.approx(4, rel=0.2)


def test_a_request_of_a_trace_without_sessions_is_a_session_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.68,3,4\n" * 1000)
    load = {"kind": "trace", "path": path, "format": "azure", "sessions": 0.0}
    counts = Counter(p.adapter for p in plan(load=load))
    assert [counts[name] / 1000 for name in "abcd"] == pytest.approx([0.25] * 4, abs=0.05)


def test_a_neighbour_adds_its_traffic_and_changes_none_of_the_rest() -> None:
    models = {"acme": ["a", "b", "c"], "zeta": ["z"]}
    tenants = [{"name": "acme"}, {"name": "zeta", "share": 0}]
    phase: dict[str, Any] = {"name": "steady", "duration_s": 20, "adapters": 2}
    neighbour = {"tenant": "zeta", "load": {"kind": "poisson", "rate_per_s": 100}}
    alone = plan(models, tenants=tenants, phases=[phase])
    both = plan(models, tenants=tenants, phases=[{**phase, "neighbour": neighbour}])
    added = [p for p in both if p.tenant == "zeta"]
    assert [p for p in both if p.tenant != "zeta"] == alone
    assert len(added) == pytest.approx(2000, rel=0.1)
    assert {p.adapter for p in added} == {"z"}
    assert [p.at_s for p in both] == sorted(p.at_s or 0 for p in both)
    assert len({p.id for p in both}) == len({p.mark for p in both}) == len(both)
    closed = plan(
        models, tenants=tenants, phases=[{**phase, "neighbour": neighbour}], load={"kind": "closed", "concurrency": 1}
    )
    assert closed == added


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"phases": [{"name": "set", "duration_s": 1, "working_set": [2, 8]}]}, "phase set-8: 8 adapters wanted"),
        ({"phases": [{"name": "one", "duration_s": 1, "adapters": ["x"]}]}, "phase one: no tenant may ask x"),
        ({"load": {"kind": "touch", "gap_s": 1}}, "phase steady: 12 requests 1 s apart take 12 s; duration_s is 1"),
        ({"canaries": [{"adapter": "x", "prompt": "?", "expect": "!"}]}, "canaries: no tenant may ask x"),
    ],
)
def test_what_the_servers_adapters_do_not_allow_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        make_workload(**fields)


def test_weights_that_leave_a_tenant_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text('{"d": 1, "x": 2}')
    weights = {"kind": "weights", "path": tmp_path / "w.json"}
    assert {p.adapter for p in plan(popularity=weights)} == {"d"}
    with pytest.raises(ScenarioError, match="none of the adapters of tenant default"):
        make_workload({"default": ["a"]}, popularity=weights)


def test_the_schedule_is_kept_a_request_a_line(tmp_path: Path) -> None:
    schedule = plan_schedule(make_workload())
    save_schedule(tmp_path / "new" / "schedule.jsonl", schedule)
    lines = [json.loads(line) for line in (tmp_path / "new" / "schedule.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [planned.id for planned in schedule[0]]
