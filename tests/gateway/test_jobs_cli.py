"""`lorikeet jobs` against a whole gateway, and the worker that `lorikeet up` starts beside it."""

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapters.home import Home
from adapters.jobs import NewEvent
from adapters.registry import Scope
from gateway import daemon
from gateway.client import RefusedError
from tests.gateway.conftest import Gateway
from tests.gateway.test_cli import Run, adapter, document, run, url

__all__ = ["adapter", "run", "url"]  # fixtures


@pytest.fixture
async def job(gateway: Gateway) -> str:
    await gateway.key("acme", frozenset({Scope.JOBS}))
    spec = {
        "model": gateway.services.base.name,
        "training_file": "file-1",
        "method": "supervised",
        "hyperparameters": {"n_epochs": 3},
    }
    return gateway.services.jobs.create("acme", spec).id


async def test_a_job_is_listed_shown_paused_resumed_and_cancelled(run: Run, gateway: Gateway, job: str) -> None:
    assert [one["id"] for one in document(await run("jobs", "list", "--json"))["data"]] == [job]
    assert job in (await run("jobs", "list")).output
    assert document(await run("jobs", "pause", job, "--json"))["paused"] is True
    assert "paused" in (await run("jobs", "show", job)).output
    assert document(await run("jobs", "resume", job, "--json"))["status"] == "queued"
    gateway.services.jobs.claim("worker")
    gateway.services.jobs.report(job, "worker", events=[NewEvent("step:1", "Step 1/3: training loss=1.0")])
    gateway.services.jobs.add_checkpoint(job, "worker", 1, model="ft:x:acme::01234567:ckpt-step-1", metrics={"step": 1})
    shown = document(await run("jobs", "show", job, "--json"))
    assert [one["step_number"] for one in shown["checkpoints"]] == [1]
    told = (await run("jobs", "events", job)).output
    assert told.index("Created fine-tuning job") < told.index("Step 1/3")
    assert document(await run("jobs", "cancel", job, "--json"))["status"] == "running"  # until its worker notices
    assert isinstance((await run("jobs", "show", "ftjob-0")).exception, RefusedError)


def stand_in(home: Home, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """Something that waits to be told to end, where `lorikeet worker` would be."""
    script = folder / "worker"
    script.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    home.create()
    return daemon.start_worker(home, "http://127.0.0.1:1")


def test_the_worker_beside_the_gateway_is_started_once_and_ended_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    process = stand_in(home, monkeypatch, tmp_path)
    assert psutil.pid_exists(process.pid)
    assert daemon.start_worker(home, "http://127.0.0.1:1") is None
    daemon.stop(home, patience_s=1)
    assert process.wait(10) is not None
    assert not psutil.pid_exists(process.pid)
    assert not daemon.worker_file(home).exists()
    assert not daemon.stop_worker(home)


def test_a_process_that_only_has_the_workers_old_id_is_left_alone(tmp_path: Path) -> None:
    home = Home(tmp_path).create()
    me = psutil.Process()
    daemon.worker_file(home).write_text(json.dumps({"pid": me.pid, "created": me.create_time() - 100}))
    assert not daemon.stop_worker(home)
