"""The queue of fine-tuning jobs, on SQLite and on Postgres."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.errors import ConflictError, JobQuotaError, NotFoundError, TenantNotFoundError
from adapters.jobs import Job, JobFailure, Jobs, JobStatus, NewEvent
from adapters.records import LimitKind, Limits, LimitSubject
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
    beat = jobs.report(job.id, "one", progress={"step": 40, "loss": 1.5})
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
        jobs.report(job.id, "one")
    with pytest.raises(ConflictError, match="no longer held by 'one'"):
        jobs.finish(job.id, "one", JobStatus.SUCCEEDED)


def test_a_job_that_outlives_its_workers_fails(jobs: Jobs, clock: Any) -> None:
    job = jobs.create("acme", {})
    for _ in range(2):
        claimed(jobs)
        clock.now += 60
    assert jobs.claim("three") is None
    failed = jobs.job(job.id)
    assert failed.failure is not None
    assert (failed.status, failed.failure.code) == (JobStatus.FAILED, "worker_stopped")


def test_a_job_that_gets_further_outlives_any_number_of_workers(jobs: Jobs, clock: Any) -> None:
    jobs.create("acme", {})
    for _ in range(8):
        jobs.report(claimed(jobs).id, "one", further=True)
        clock.now += 60
    assert claimed(jobs).attempts == 2


def test_a_late_worker_may_still_finish_what_nobody_took(jobs: Jobs, clock: Any) -> None:
    jobs.create("acme", {})
    job = claimed(jobs)
    clock.now += 1000
    why = JobFailure("invalid_training_file", "Line 3: not JSON", param="training_file", line=3)
    assert jobs.finish(job.id, "one", JobStatus.FAILED, failure=why).failure == why
    assert jobs.job(job.id).failure == why


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
    assert jobs.report(noticed.id, "one").cancel_requested
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
    jobs.report(claimed(jobs).id, "one")
    assert registry.change_counter() == before


def test_workers_that_claim_at_once_never_get_the_same_job(jobs: Jobs) -> None:
    for _ in range(12):
        jobs.create("acme", {})
    with ThreadPoolExecutor(8) as pool:
        got = [job.id for job in pool.map(jobs.claim, map(str, range(20))) if job is not None]
    assert len(got) == len(set(got)) == 12


def test_tenants_take_turns_however_many_jobs_one_of_them_has(jobs: Jobs, clock: Any) -> None:
    for tenant in ("acme", "acme", "acme", "globex", "globex"):
        jobs.create(tenant, {})
        clock.now += 1
    order = []
    for _ in range(5):
        job = claimed(jobs)
        order.append(job.tenant)
        clock.now += 1
        jobs.finish(job.id, "one", JobStatus.SUCCEEDED)
    assert order == ["acme", "globex", "acme", "globex", "acme"]


def test_a_tenant_has_no_more_jobs_running_or_waiting_than_it_may(
    jobs: Jobs, registry: Registry, clock: Any, database: sa.Engine
) -> None:
    registry.set_limits(LimitSubject(LimitKind.TENANT, "acme"), {"max_running_jobs": 1, "max_queued_jobs": 2})
    for _ in range(2):
        jobs.create("acme", {})
    with pytest.raises(JobQuotaError, match="may have 2 jobs waiting"):
        jobs.create("acme", {})
    claimed(jobs, "one")
    assert jobs.claim("two") is None
    jobs.create("acme", {})
    clock.now += 61  # the first worker fell silent: its place is free, and its job goes on before the others
    assert claimed(jobs, "two").started_at is not None
    assert Jobs(database, default_limits=Limits(max_running_jobs=1), clock=clock).claim("three") is None


def test_only_jobs_for_a_base_at_hand_are_claimed(jobs: Jobs) -> None:
    job = jobs.create("acme", {}, base="digest-b")
    assert jobs.claim("one", bases=["digest-a"]) is None
    found = jobs.claim("one", bases=["digest-a", "digest-b"])
    assert found is not None
    assert found.id == job.id


def test_what_is_told_twice_is_kept_once_and_listed_the_newest_first(jobs: Jobs) -> None:
    job = jobs.create("acme", {})
    claimed(jobs)
    for worker_step in (1, 2, 3), (2, 3, 4):
        jobs.report(job.id, "one", events=[NewEvent(f"step:{n}", f"Step {n}", data={"step": n}) for n in worker_step])
    events = jobs.events(job.id, tenant="acme")
    assert [event.key for event in events] == ["step:4", "step:3", "step:2", "step:1", "created"]
    assert (events[0].type, events[0].data, events[-1].type) == ("metrics", {"step": 4}, "message")
    assert [event.key for event in jobs.events(job.id, after=events[1].id, limit=2)] == ["step:2", "step:1"]
    assert jobs.events(job.id, after="nonsense") == []
    with pytest.raises(NotFoundError):
        jobs.events(job.id, tenant="globex")


def test_a_checkpoint_is_added_once_and_by_who_holds_the_job(jobs: Jobs) -> None:
    job = jobs.create("acme", {})
    claimed(jobs)
    first = jobs.add_checkpoint(job.id, "one", 10, model="ft:x:ckpt-step-10", metrics={"step": 10, "train_loss": 1.5})
    assert jobs.add_checkpoint(job.id, "one", 10, model="ft:other", metrics={}) == first
    second = jobs.add_checkpoint(job.id, "one", 20, model="ft:x:ckpt-step-20", metrics={"step": 20})
    assert jobs.checkpoints(job.id) == [second, first]
    assert jobs.checkpoints(job.id, after=second.id) == [first]
    with pytest.raises(ConflictError, match="no longer held"):
        jobs.add_checkpoint(job.id, "two", 30, model="m", metrics={})


def test_a_waiting_job_is_paused_at_once_and_resumed(jobs: Jobs) -> None:
    job = jobs.create("acme", {})
    assert jobs.pause(job.id, tenant="acme").status is JobStatus.PAUSED
    assert jobs.pause(job.id).status is JobStatus.PAUSED
    assert jobs.claim("one") is None
    assert jobs.resume(job.id).status is JobStatus.QUEUED
    assert claimed(jobs).id == job.id
    with pytest.raises(ConflictError, match="is not paused"):
        jobs.resume(job.id)
    assert [event.message for event in jobs.events(job.id)][:2] == ["Fine-tuning job resumed", "Fine-tuning job paused"]


def test_a_running_job_is_put_aside_when_its_worker_gives_it_back_or_is_gone(jobs: Jobs, clock: Any) -> None:
    kept, lost = jobs.create("acme", {}), jobs.create("acme", {})
    for _ in range(2):
        claimed(jobs)
    for job in (kept, lost):
        assert jobs.pause(job.id).status is JobStatus.RUNNING
    assert jobs.report(kept.id, "one").pause_requested
    assert jobs.release(kept.id, "one").status is JobStatus.PAUSED
    clock.now += 61
    assert jobs.claim("two") is None
    assert jobs.job(lost.id).status is JobStatus.PAUSED
    assert jobs.cancel(kept.id).status is JobStatus.CANCELLED


def test_a_job_given_back_in_good_order_was_no_attempt(jobs: Jobs) -> None:
    job = jobs.create("acme", {})
    for _ in range(5):
        claimed(jobs)
        jobs.release(job.id, "one")
    for _ in range(2):
        claimed(jobs)
        jobs.release(job.id, "one", attempted=True)
    assert jobs.claim("one") is None
    assert jobs.job(job.id).status is JobStatus.FAILED


def test_jobs_are_found_page_by_page_and_by_their_metadata(jobs: Jobs, clock: Any) -> None:
    ids = []
    for metadata in ({"team": "a"}, {"team": "b", "run": "1"}, None, {"team": "a", "run": "2"}):
        ids.append(jobs.create("acme", {"metadata": metadata}).id)
        clock.now += 1
    assert [job.id for job in jobs.jobs("acme", metadata={"team": "a"})] == [ids[3], ids[0]]
    assert [job.id for job in jobs.jobs("acme", metadata={"team": "a", "run": "2"})] == [ids[3]]
    assert [job.id for job in jobs.jobs("acme", without_metadata=True)] == [ids[2]]
    assert [job.id for job in jobs.jobs("acme", after=ids[2], limit=1)] == [ids[1]]
    with pytest.raises(NotFoundError):
        jobs.jobs("acme", after="ftjob-0")


def test_an_archived_tenants_jobs_are_left_alone(jobs: Jobs, registry: Registry) -> None:
    jobs.create("acme", {})
    theirs = jobs.create("globex", {})
    registry.archive_tenant("acme")
    assert claimed(jobs).id == theirs.id
    assert jobs.claim("one") is None
