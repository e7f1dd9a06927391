"""The worker against a whole gateway, with a stand-in for the training: claims, tells, publishes, gives back."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapters.blobs import BlobStore
from adapters.database import writing
from adapters.jobs import Job, JobStatus
from adapters.models import JobRow
from adapters.records import Limits
from adapters.registry import Scope
from gateway.files import NewFile
from tests.factories import make_base
from tests.gateway.conftest import Gateway, listening, running_gateway
from trainer.publishing import Publisher
from trainer.running_job import Services, WorkerSettings, jobs_folder
from trainer.worker import Worker

pytestmark = pytest.mark.slow  # each starts processes

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 3
COMMAND = (sys.executable, "-m", "tests.trainer.stand_in_job")
SCOPES = frozenset({Scope.INFERENCE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE, Scope.JOBS})


@dataclass
class Bench:
    """A gateway that listens, and a worker for it."""

    gateway: Gateway
    url: str
    services: Services
    worker: Worker

    async def job(self, content: bytes = ROWS, **changes: Any) -> str:
        """A job that waits."""
        await self.gateway.key("acme", SCOPES)
        path = self.gateway.settings.home.root / "sent.jsonl"
        path.write_bytes(content)
        file = await self.gateway.services.intake.keep("acme", path, NewFile("r.jsonl", "fine-tune"), actor="test")
        async with self.gateway.operator("acme") as client:
            body = {"model": self.gateway.services.base.name, "training_file": file.id, "seed": 1, **changes}
            answer = await client.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def folder(self, job: str) -> Path:
        return jobs_folder(self.services.home) / job

    def hold_at(self, job: str, step: int) -> Path:
        """The training waits there until the file is removed."""
        self.folder(job).mkdir(parents=True, exist_ok=True)
        hold = self.folder(job) / "wait-at"
        hold.write_text(str(step))
        return hold

    def look(self, job: str) -> Job:
        return self.services.jobs.job(job)

    def keys(self, job: str) -> list[str]:
        return [event.key for event in self.events(job)]

    def events(self, job: str) -> list[Any]:
        return self.services.jobs.events(job, limit=1000)[::-1]

    async def work(self) -> int:
        return await asyncio.to_thread(self.worker.run, once=True)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    base = make_base(tmp_path / "base" / "tiny")
    async with running_gateway(tmp_path / "home", base) as gateway, listening(gateway.app) as url:
        home, inside = gateway.settings.home, gateway.services
        services = Services(
            home=home,
            registry=inside.registry,
            jobs=inside.jobs,
            files=inside.intake.files,
            blobs=BlobStore.open(home.blobs),
            publisher=Publisher(url, lambda: home.operator_key.read_text().strip()),
        )
        settings = WorkerSettings(base=str(base), poll_s=0.05, report_s=0.05, command=COMMAND)
        yield Bench(gateway, url, services, Worker(services, settings, base, id="worker:one"))


async def until(found: Callable[[], bool], *, within_s: float = 30) -> None:
    ends_s = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < ends_s, "it did not come about"
        await asyncio.sleep(0.02)


def told(bench: Bench, job: str, key: str) -> bool:
    return any(event.key == key for event in bench.events(job))


async def test_a_job_is_trained_told_published_and_cleaned_up(bench: Bench) -> None:
    job = await bench.job(suffix="topics")
    assert await bench.work() == 1
    done = bench.look(job)
    assert done.status is JobStatus.SUCCEEDED
    model = f"ft:tiny-llama:acme:topics:{job.removeprefix('ftjob-')[:8]}"
    assert done.result is not None
    assert (done.result["model"], done.result["trained_tokens"], done.result["eval_loss"]) == (model, 123, 5.0)
    keys = bench.keys(job)
    assert len(keys) == len(set(keys))
    assert [key for key in keys if key.startswith("step:")] == [f"step:{n}" for n in range(1, 13)]
    steps = [checkpoint.step for checkpoint in bench.services.jobs.checkpoints(job)]
    assert steps == [12, 8, 4]
    last = bench.services.jobs.checkpoints(job)[0]
    assert last.metrics == {
        "step": 12,
        "train_loss": 4.0,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 5.0,
        "full_valid_loss": 5.0,
    }
    async with await bench.gateway.client("acme", SCOPES) as client:
        for name in (model, f"{model}:ckpt-step-4", "topics"):
            body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        listed = [one["id"] for one in (await client.get("/v1/models")).json()["data"]]
        assert model in listed
        results = (await client.get(f"/v1/files/{done.result['files'][0]}/content")).text
    assert results.splitlines()[4] == "4,8.0,0.5,9.0,"
    assert sorted(path.name for path in bench.folder(job).iterdir()) == ["job.json", "journal.jsonl", "log.txt"]


async def test_a_second_result_of_a_name_stays_behind_the_gate(bench: Bench) -> None:
    for _ in range(2):
        job = await bench.job(suffix="topics")
        await bench.work()
    message = next(event for event in bench.events(job) if event.key == "production")
    assert message.level == "warn"
    assert "the gate keeps version" in message.message
    assert bench.services.registry.adapter("acme", "topics").production != bench.look(job).result["version"]  # type: ignore[index]


async def test_a_file_that_cannot_be_learned_from_fails_the_job_with_its_line(bench: Bench) -> None:
    job = await bench.job(ROWS + b'{"prompt": "unlearnable", "completion": "x"}\n')
    await bench.work()
    failed = bench.look(job)
    assert failed.status is JobStatus.FAILED
    assert failed.failure is not None
    assert (failed.failure.code, failed.failure.param, failed.failure.line) == (
        "invalid_training_file",
        "training_file",
        2,
    )


async def test_a_file_that_was_deleted_meanwhile_fails_the_job(bench: Bench) -> None:
    job = await bench.job()
    bench.services.files.delete(bench.look(job).spec["training_file"], tenant="acme")
    await bench.work()
    failure = bench.look(job).failure
    assert failure is not None
    assert (failure.code, failure.param) == ("invalid_training_file", "training_file")


async def test_a_checkpoint_answers_while_the_job_still_runs(bench: Bench) -> None:
    job = await bench.job()
    hold = bench.hold_at(job, 6)
    working = asyncio.create_task(bench.work())
    await until(lambda: bool(bench.services.jobs.checkpoints(job)))
    (checkpoint,) = bench.services.jobs.checkpoints(job)
    async with await bench.gateway.client("acme", SCOPES) as client:
        body = {"model": checkpoint.model, "messages": [{"role": "user", "content": "Hi"}]}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert bench.look(job).status is JobStatus.RUNNING
    assert bench.look(job).progress["step"] == 5
    hold.unlink()
    assert await working == 1


async def test_a_running_job_is_cancelled_and_leaves_no_process(bench: Bench) -> None:
    job = await bench.job()
    bench.hold_at(job, 2)
    working = asyncio.create_task(bench.work())
    await until(lambda: told(bench, job, "step:1"))
    bench.services.jobs.cancel(job)
    assert await working == 1
    assert bench.look(job).status is JobStatus.CANCELLED
    assert processes_in(bench.folder(job)) == []


async def test_a_paused_job_stops_at_its_next_checkpoint_and_goes_on_from_there(bench: Bench) -> None:
    job = await bench.job()
    hold = bench.hold_at(job, 3)
    working = asyncio.create_task(bench.work())
    await until(lambda: told(bench, job, "step:2"))
    bench.services.jobs.pause(job)
    await asyncio.sleep(0.3)  # the worker has seen the wish
    hold.unlink()
    assert await working == 0
    assert bench.look(job).status is JobStatus.PAUSED
    assert bench.keys(job)[-1].startswith("paused:")
    assert not told(bench, job, "step:5")
    bench.services.jobs.resume(job)
    assert await bench.work() == 1
    assert [key for key in bench.keys(job) if key.startswith("step:")] == [f"step:{n}" for n in range(1, 13)]


async def test_a_stopped_worker_gives_its_job_back_at_the_next_checkpoint(bench: Bench) -> None:
    job = await bench.job()
    hold = bench.hold_at(job, 3)
    working = asyncio.create_task(bench.work())
    await until(lambda: told(bench, job, "step:2"))
    bench.worker.stop()
    await asyncio.sleep(0.3)
    hold.unlink()
    assert await working == 0
    waiting = bench.look(job)
    assert (waiting.status, waiting.attempts) == (JobStatus.QUEUED, 0)
    other = Worker(bench.services, bench.worker._settings, bench.gateway.base, id="worker:two")
    assert await asyncio.to_thread(other.run, once=True) == 1
    assert bench.look(job).status is JobStatus.SUCCEEDED


async def test_a_worker_that_is_told_twice_stops_at_once(bench: Bench) -> None:
    job = await bench.job()
    bench.hold_at(job, 3)
    working = asyncio.create_task(bench.work())
    await until(lambda: told(bench, job, "step:2"))
    bench.worker.stop()
    bench.worker.stop()
    assert await working == 0
    assert bench.look(job).status is JobStatus.QUEUED
    assert processes_in(bench.folder(job)) == []


async def test_a_training_process_that_is_killed_is_started_again(bench: Bench) -> None:
    job = await bench.job()
    hold = bench.hold_at(job, 6)
    working = asyncio.create_task(bench.work())
    await until(lambda: told(bench, job, "step:5"))
    (child,) = processes_in(bench.folder(job))
    hold.unlink()
    os.kill(child, signal.SIGKILL)
    assert await working == 1
    assert bench.look(job).status is JobStatus.SUCCEEDED
    keys = bench.keys(job)
    assert len(keys) == len(set(keys))
    assert sum(key.startswith("broke-off:") for key in keys) == 1


async def test_a_job_that_another_worker_took_is_let_go(bench: Bench) -> None:
    job = await bench.job()
    bench.hold_at(job, 3)
    working = asyncio.create_task(bench.work())
    await until(lambda: told(bench, job, "step:2"))
    (child,) = processes_in(bench.folder(job))

    def take() -> None:
        """As if the worker had been frozen for longer than its lease."""
        with writing(bench.services.jobs._engine) as session:
            row = session.get_one(JobRow, job)
            row.worker, row.lease_until = "worker:two", time.time() + 60

    await asyncio.to_thread(take)
    assert await working == 0
    assert bench.look(job).worker == "worker:two"
    assert child not in processes_in(bench.folder(job))


async def test_results_wait_for_a_gateway_that_is_away(bench: Bench, tmp_path: Path) -> None:
    job = await bench.job()
    key = bench.gateway.settings.home.operator_key.read_text().strip()
    away = {"now": True}
    publisher = Publisher(bench.url, lambda: None if away["now"] else key)
    worker = Worker(replace(bench.services, publisher=publisher), bench.worker._settings, bench.gateway.base)
    working = asyncio.create_task(asyncio.to_thread(worker.run, once=True))
    await until(lambda: told(bench, job, "step:12"))
    away["now"] = False
    assert await asyncio.wait_for(working, 60) == 1
    assert bench.look(job).status is JobStatus.SUCCEEDED
    assert len(bench.services.jobs.checkpoints(job)) == 3


async def test_what_was_cancelled_without_a_worker_is_cleaned_up_by_the_next(bench: Bench) -> None:
    job = await bench.job()
    bench.folder(job).mkdir(parents=True)
    (bench.folder(job) / "training_file.jsonl").write_bytes(ROWS)
    bench.services.jobs.cancel(job)
    await bench.work()
    assert list(bench.folder(job).iterdir()) == []


async def test_only_one_job_of_a_tenant_runs_at_once(bench: Bench) -> None:
    assert bench.services.jobs._default_limits == Limits(max_running_jobs=1, max_queued_jobs=20)
    for _ in range(2):
        await bench.job()
    assert bench.services.jobs.claim("other") is not None
    assert await bench.work() == 0


def processes_in(folder: Path) -> list[int]:
    """Of the stand-in on this folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in process.cmdline():
                found.append(process.pid)
    return found
