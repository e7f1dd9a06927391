import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from loadtests.calibration import latest_calibration, save_calibration
from loadtests.cli import app
from loadtests.record import PhaseWindow, read_run, write_run
from tests.loadtests.factories import EASY_HEALTH, make_record, make_run
from tests.loadtests.server import GOOD, ROLE, FakeServer

pytestmark = pytest.mark.slow  # whole runs

SECRET = "lk-very-secret"


def invoke(server: FakeServer, folder: Path, *arguments: str, key: str = SECRET, **fields: Any) -> Result:
    scenario = {
        "name": "small",
        "load": {"kind": "constant", "rate_per_s": 40},
        "phases": [{"name": "steady", "duration_s": 0.5}],
        "objectives": ["p95(ttft) < 20 s per adapter"],
        "sample_floor": 3,
        "health": EASY_HEALTH,
        **fields,
    }
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(scenario))
    return CliRunner().invoke(
        app, ["run", str(path), "--url", server.url, "--out", str(folder / "out"), "--key", key, *arguments]
    )


def test_a_pass_leaves_its_files_and_exits_with_0(threaded_server: FakeServer, tmp_path: Path) -> None:
    threaded_server.key = SECRET
    result = invoke(threaded_server, tmp_path, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["verdict"] == "pass"
    assert {group["name"] for group in document["groups"]} == {"all", "base", "support", "default", "steady"}
    assert document["groups"][0]["metrics_s"]["queue"]["p50"]["value"] == 0.0125
    names = {"records.jsonl", "schedule.jsonl", "summary.json", "report.html", "junit.xml", "records.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 21


def test_the_latest_calibration_is_kept_with_a_run(
    threaded_server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORIKEET_HOME", str(tmp_path))
    assert invoke(threaded_server, tmp_path).exit_code == 0
    assert read_run(tmp_path / "out" / "records.jsonl").calibration is None
    kept = {"format": "lorikeet.loadtest.calibration", "version": 1, "measured_at": "2026-01-01T00:00:00+00:00"}
    save_calibration(tmp_path, kept | {"worst_error": {"plain": 0.001, "freeze": 0.02}, "cases": []})
    assert invoke(threaded_server, tmp_path).exit_code == 0
    assert read_run(tmp_path / "out" / "records.jsonl").calibration == latest_calibration(tmp_path)


@pytest.mark.slow
def test_no_run_asks_what_an_earlier_one_asked(threaded_server: FakeServer, tmp_path: Path) -> None:
    for closed in ({"kind": "closed", "concurrency": 2}, {"kind": "constant", "rate_per_s": 40}):
        for shards in (1, 2):
            assert invoke(threaded_server, tmp_path, load=closed, shards=shards).exit_code == 0
    prompts = [body["messages"][0]["content"] for body, _ in threaded_server.requests]
    assert len(set(prompts)) == len(prompts)


def test_keys_are_written_nowhere(threaded_server: FakeServer, tmp_path: Path) -> None:
    other = "lk-from-the-file"
    result = invoke(threaded_server, tmp_path, keys={"default": other})
    assert {authorization for _, authorization in threaded_server.requests} == {f"Bearer {SECRET}"}
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir()) + result.output
    assert SECRET not in written
    assert other not in written


@pytest.mark.parametrize(
    ("fields", "exit_code"),
    [
        ({"objectives": ["p95(ttft) < 1 ms"]}, 1),
        ({"objectives": ["p95(ttft) < 1 parsec"]}, 2),
        ({"sample_floor": 1000}, 3),
        ({"health": EASY_HEALTH | {"cpu_share": 1e-6}}, 4),
    ],
)
def test_other_verdicts_have_exit_codes_of_their_own(
    fields: dict[str, Any], exit_code: int, threaded_server: FakeServer, tmp_path: Path
) -> None:
    result = invoke(threaded_server, tmp_path, **fields)
    assert result.exit_code == exit_code, result.output
    if exit_code != 2:
        assert CliRunner().invoke(app, ["report", str(tmp_path / "out")]).exit_code == exit_code


def test_failing_fast_is_not_a_pass(threaded_server: FakeServer, tmp_path: Path) -> None:
    threaded_server.status = 500
    result = invoke(threaded_server, tmp_path, objectives=["p95(ttft) < 20 s"])
    assert result.exit_code == 1
    assert "http 500: told_to: no" in result.output


def test_a_server_that_does_not_answer_is_wrong_usage(tmp_path: Path) -> None:
    away = FakeServer()
    away.url = "http://127.0.0.1:1"
    result = invoke(away, tmp_path)
    assert result.exit_code == 2
    assert "No server answers" in result.output


def test_a_server_that_lists_no_models_can_be_measured_where_adapters_are_named(
    threaded_server: FakeServer, tmp_path: Path
) -> None:
    threaded_server.lists_models = False
    refused = invoke(threaded_server, tmp_path)
    assert (refused.exit_code, "name the adapters" in refused.output) == (2, True)
    assert invoke(threaded_server, tmp_path, adapters=["support"]).exit_code == 0


def test_a_tenant_that_only_has_events_needs_no_models(threaded_server: FakeServer, tmp_path: Path) -> None:
    threaded_server.key = SECRET
    tenants = [{"name": "acme"}, {"name": "operator", "share": 0}]
    result = invoke(threaded_server, tmp_path, key=f"acme={SECRET}", tenants=tenants)
    assert result.exit_code == 0, result.output
    load = {"kind": "poisson", "rate_per_s": 1}
    phases = [{"name": "a", "duration_s": 1, "neighbour": {"tenant": "operator", "load": load}}]
    result = invoke(threaded_server, tmp_path, key=f"acme={SECRET}", tenants=tenants, phases=phases)
    assert (result.exit_code, "tenant 'operator'" in result.output) == (2, True)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_sent(
    threaded_server: FakeServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(threaded_server, tmp_path, "--out", str(tmp_path / "file" / "out"))
    assert (result.exit_code, threaded_server.requests) == (2, [])
    assert "Not a directory" in result.output


def test_a_folder_without_records_is_wrong_usage(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2


def test_a_dry_run_shows_the_plan_and_sends_nothing(threaded_server: FakeServer, tmp_path: Path) -> None:
    result = invoke(threaded_server, tmp_path, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["phases"][0]["requests"] == 20
    assert sum(share["requests"] for share in document["adapters"]) == 20
    assert threaded_server.requests == []


def test_an_interrupted_run_writes_what_there_is(threaded_server: FakeServer, tmp_path: Path) -> None:
    def answer_nineteen(_: object) -> list[bytes | float]:
        if len(threaded_server.requests) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return GOOD if len(threaded_server.requests) < 20 else [ROLE, 60.0]

    threaded_server.script = answer_nineteen
    result = invoke(threaded_server, tmp_path, phases=[{"name": "steady", "duration_s": 30}])
    assert result.exit_code == 3, result.output
    assert "UNDECIDED" in result.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["interrupted"] is True


@pytest.mark.parametrize(
    ("objective", "exit_code", "verdicts"),
    [("p95(ttft) < 20 s", 3, ["pass", "pass"]), ("p95(ttft) < 1 ms", 1, ["missed", "missed"])],
)
def test_a_search_keeps_every_probe_and_says_how_it_ended(
    threaded_server: FakeServer, tmp_path: Path, objective: str, exit_code: int, verdicts: list[str]
) -> None:
    path = tmp_path / "scenario.yaml"
    scenario = {
        "name": "small",
        "load": {"kind": "constant", "rate_per_s": 1},
        "phases": [{"name": "steady", "duration_s": 0.5}],
        "objectives": [objective],
        "sample_floor": 3,
        "health": EASY_HEALTH,
    }
    path.write_text(yaml.safe_dump(scenario))
    where = ["--url", threaded_server.url, "--key", SECRET, "--out", str(tmp_path / "out")]
    limits = ["--start", "30", "--lowest", "15", "--highest", "60"]
    result = CliRunner().invoke(app, ["search", str(path), *where, *limits, "--json"])
    assert result.exit_code == exit_code, result.output
    document = json.loads(result.stdout)
    assert [probe["verdict"] for probe in document["probes"]] == verdicts
    assert document == json.loads((tmp_path / "out" / "search.json").read_text())
    assert (tmp_path / "out" / "probe-02" / "report.html").is_file()


def test_a_report_shows_wrong_answers_first_then_leaks_and_the_cliff(tmp_path: Path) -> None:
    phases = [{"name": "sweep", "duration_s": 1, "working_set": [2, 4], "audit": True}]
    run = make_run(
        [make_record(i, phase=f"sweep-{2 + 2 * (i % 2)}", ttft_s=0.1 + i % 2) for i in range(200)]
        + [make_record(900, phase="sweep-2", wrong="answered by legal@1")],
        phases=phases,
        limits={"default": {"requests_per_minute": 60, "burst": 5}},
    )
    write_run(
        tmp_path / "records.jsonl",
        replace(run, windows=(PhaseWindow("sweep-2", True, 0.0, 1.0), PhaseWindow("sweep-4", True, 1.0, 2.0))),
    )
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    findings = result.output.split("1 of the answers belonged to somebody else")[1]
    assert "let through above 60 a minute" in findings
    assert "sweep: 2 adapters fit, 4 do not (p95)" in findings


@pytest.mark.slow
def test_what_happened_beside_the_requests_is_in_the_records(threaded_server: FakeServer, tmp_path: Path) -> None:
    threaded_server.page = 'depth{engine="0"} 1\ndepth{engine="1"} 2\n'
    event = {"at_s": 0.1, "name": "move", "request": {"path": "/v1/adapters/a", "tenant": "default", "json": {"a": 1}}}
    pages = [
        {"name": "engine", "url": f"{threaded_server.url}/metrics", "series": ["depth"]},
        {"name": "away", "url": "http://127.0.0.1:1", "series": ["depth"]},
    ]
    phases = [{"name": "steady", "duration_s": 1, "events": [event]}]
    result = invoke(threaded_server, tmp_path, phases=phases, scrape=pages, shards=2)
    assert result.exit_code == 0, result.output
    run = read_run(tmp_path / "out" / "records.jsonl")
    assert len(run.records) == 40
    assert [(mark.name, mark.error) for mark in run.events] == [("move", "")]
    assert run.samples[0].values == {"engine:depth": 3.0}
    assert run.environment["processes"] == 2
    assert run.environment["client_cpu_s"] > 0
    assert "Connect" in run.environment["scraping"]["away"]


def test_a_series_that_cannot_be_named_is_wrong_usage(threaded_server: FakeServer, tmp_path: Path) -> None:
    pages = [{"name": "engine", "url": "http://127.0.0.1:1", "series": ["depth{engine=0}"]}]
    result = invoke(threaded_server, tmp_path, scrape=pages)
    assert result.exit_code == 2
    assert "scrape[0].series[0]" in result.output
