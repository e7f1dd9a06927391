"""The queue of fine-tuning jobs, on SQLite and on Postgres."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.errors import ConflictError, NotFoundError, TenantNotFoundError
from adapters.jobs import Job, Jobs, JobStatus
from adapters.registry import Registry


@pytest.fixture
def jobs(registry: Registry, database: sa.Engine, clock: Any) -> Jobs:
    return Jobs(database, clock=clock, lease_s=60, max_attempts=2)


def claimed(jobs: Jobs, worker: str = "one") -> Job:
    job = jobs.claim(worker)
    assert job is not None
    return job


def test_a_job_is_claimed_worked_on_and_finished(jobs: Jobs, registry: Registry, clock: Any) -> None:
    created = jobs.create("acme", {"data": "file-1"}, actor="alice")
    assert created.status is JobStatus.QUEUED
    clock.now += 5
    job = claimed(jobs)
    assert (job.id, job.spec, job.worker, job.attempts) == (created.id, {"data": "file-1"}, "one", 1)
    assert (job.started_at, job.lease_until) == (clock.now, clock.now + 60)
    clock.now += 50
    beat = jobs.heartbeat(job.id, "one", progress={"step": 40, "loss": 1.5})
    assert beat.lease_until == clock.now + 60
    done = jobs.finish(job.id, "one", JobStatus.SUCCEEDED, result={"adapter": "support@1"})
    assert (done.status, done.finished_at, done.lease_until) == (JobStatus.SUCCEEDED, clock.now, None)
    assert jobs.job(job.id) == done
    assert done.progress == {"step": 40, "loss": 1.5}
    assert jobs.claim("two") is None
    assert [entry.action for entry in registry.audit(2)] == ["job.succeeded", "job.create"]


def test_jobs_are_claimed_in_the_order_they_came(jobs: Jobs, clock: Any) -> None:
    ids = []
    for _ in range(3):
        ids.append(jobs.create("acme", {}).id)
        clock.now += 1
    assert [claimed(jobs).id for _ in ids] == ids
    assert [job.id for job in jobs.jobs()] == ids[::-1]
    assert jobs.jobs("globex") == []


def test_a_job_whose_worker_fell_silent_goes_to_the_next_and_the_first_is_told(jobs: Jobs, clock: Any) -> None:
    jobs.create("acme", {})
    job = claimed(jobs, "one")
    clock.now += 59
    assert jobs.claim("two") is None
    clock.now += 1
    again = claimed(jobs, "two")
    assert (again.id, again.attempts, again.started_at) == (job.id, 2, job.started_at)
    with pytest.raises(ConflictError, match="no longer held by 'one'"):
        jobs.heartbeat(job.id, "one")
    with pytest.raises(ConflictError, match="no longer held by 'one'"):
        jobs.finish(job.id, "one", JobStatus.SUCCEEDED)


def test_a_job_that_outlives_its_workers_fails(jobs: Jobs, clock: Any) -> None:
    job = jobs.create("acme", {})
    for _ in range(2):
        claimed(jobs)
        clock.now += 60
    assert jobs.claim("three") is None
    failed = jobs.job(job.id)
    assert (failed.status, failed.error) == (JobStatus.FAILED, "2 workers stopped while they ran this job.")


def test_a_late_worker_may_still_finish_what_nobody_took(jobs: Jobs, clock: Any) -> None:
    jobs.create("acme", {})
    job = claimed(jobs)
    clock.now += 1000
    assert jobs.finish(job.id, "one", JobStatus.FAILED, error="The data has no rows.").error == "The data has no rows."


def test_a_waiting_job_is_cancelled_at_once(jobs: Jobs) -> None:
    job = jobs.cancel(jobs.create("acme", {}).id, tenant="acme", actor="alice")
    assert job.status is JobStatus.CANCELLED
    assert jobs.claim("one") is None
    with pytest.raises(ConflictError, match="has cancelled already"):
        jobs.cancel(job.id)


def test_a_running_job_is_cancelled_when_its_worker_notices_or_is_gone(jobs: Jobs, clock: Any) -> None:
    noticed, gone = jobs.create("acme", {}), jobs.create("acme", {})
    for _ in range(2):
        claimed(jobs)
    for job in (noticed, gone):
        assert jobs.cancel(job.id).status is JobStatus.RUNNING
    assert jobs.heartbeat(noticed.id, "one").cancel_requested
    jobs.finish(noticed.id, "one", JobStatus.CANCELLED)
    clock.now += 61
    assert jobs.claim("two") is None
    assert {job.status for job in jobs.jobs()} == {JobStatus.CANCELLED}


def test_another_tenants_job_does_not_exist(jobs: Jobs) -> None:
    job = jobs.create("acme", {})
    for look in (jobs.job, jobs.cancel):
        with pytest.raises(NotFoundError, match=f"There is no job '{job.id}'"):
            look(job.id, tenant="globex")
    with pytest.raises(TenantNotFoundError):
        jobs.create("nobody", {})


def test_a_job_does_not_finish_as_running(jobs: Jobs) -> None:
    jobs.create("acme", {})
    job = claimed(jobs)
    with pytest.raises(ConflictError, match="cannot finish as 'running'"):
        jobs.finish(job.id, "one", JobStatus.RUNNING)


def test_jobs_make_no_reader_renew_its_snapshot(jobs: Jobs, registry: Registry) -> None:
    before = registry.change_counter()
    jobs.create("acme", {})
    jobs.heartbeat(claimed(jobs).id, "one")
    assert registry.change_counter() == before


def test_workers_that_claim_at_once_never_get_the_same_job(jobs: Jobs) -> None:
    for _ in range(12):
        jobs.create("acme", {})
    with ThreadPoolExecutor(8) as pool:
        got = [job.id for job in pool.map(jobs.claim, map(str, range(20))) if job is not None]
    assert len(got) == len(set(got)) == 12
