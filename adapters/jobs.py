"""Fine-tuning jobs: a queue in the registry's database, from which workers claim with a lease.

A worker that dies stops renewing its lease; after it has run out the next worker claims the job and goes on from the last
checkpoint. To cancel and to pause are wishes, which the worker sees with its next report. Jobs do not raise the registry's
change counter: a report is nobody's reason to read a snapshot.
"""

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from adapters import audit
from adapters.database import reading, take_turns, writing
from adapters.errors import ConflictError, JobNotFoundError, JobQuotaError
from adapters.job_turns import TenantLoad, WaitingJob, choose_job
from adapters.models import JobCheckpointRow, JobEventRow, JobRow, TenantRow
from adapters.records import NO_LIMITS, Limits
from adapters.rows import require_tenant, tenant_limits

EVENT_ID, CHECKPOINT_ID = "ftevent-", "ftckpt_"


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed, for its owner."""

    code: str  # stable, for programs
    message: str
    param: str | None = None  # what of the request was wrong
    line: int | None = None  # of the file


@dataclass(frozen=True)
class Job:
    """One piece of work. Times are Unix seconds."""

    id: str
    tenant: str
    kind: str
    base: str  # weights digest of the base it is for; empty: any
    spec: Mapping[str, Any]  # what to do, as the worker reads it
    status: JobStatus
    created_at: float
    started_at: float | None
    finished_at: float | None
    worker: str | None  # who has it, or had it last
    lease_until: float | None
    attempts: int  # workers that had it since it last got further
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None
    failure: JobFailure | None
    cancel_requested: bool  # the worker ends the job when it sees this
    pause_requested: bool  # the worker puts it aside at the next checkpoint


@dataclass(frozen=True)
class NewEvent:
    """Something to be told of a job. key: the same for the same thing told again, which is then left out."""

    key: str
    message: str
    level: str = "info"
    data: Mapping[str, Any] | None = None
    created_at: float | None = None  # None: now

    @property
    def type(self) -> str:
        return "metrics" if self.data is not None else "message"


@dataclass(frozen=True)
class JobEvent:
    id: str
    created_at: float
    level: str
    type: str
    message: str
    data: Mapping[str, Any] | None
    key: str


@dataclass(frozen=True)
class Checkpoint:
    """A state of the training that may be called as a model."""

    id: str
    job: str
    step: int
    created_at: float
    model: str
    metrics: Mapping[str, Any]


class Jobs:
    """Synchronous and safe to use from several threads, processes and machines."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        default_limits: Limits = NO_LIMITS,
        clock: Callable[[], float] = time.time,
        lease_s: float = 60.0,
        max_attempts: int = 5,
    ) -> None:
        """default_limits: of tenants. lease_s: how long a silent worker keeps a job. max_attempts: how many workers a job may
        outlive without getting any further.
        """
        self._engine = engine
        self._default_limits = default_limits
        self._clock = clock
        self.lease_s = lease_s
        self._max_attempts = max_attempts

    def create(
        self,
        tenant: str,
        spec: Mapping[str, Any],
        *,
        kind: str = "fine_tuning",
        base: str = "",
        actor: str = "operator",
    ) -> Job:
        """Raises TenantNotFoundError, JobQuotaError when the tenant has as many waiting as it may."""
        with writing(self._engine) as session:
            require_tenant(session, tenant)
            take_turns(session)
            most = tenant_limits(session, tenant, self._default_limits).max_queued_jobs
            waiting = sa.select(sa.func.count()).where(
                JobRow.tenant == tenant, JobRow.status.in_([JobStatus.QUEUED.value, JobStatus.PAUSED.value])
            )
            if most is not None and session.scalars(waiting).one() >= most:
                raise JobQuotaError(tenant, most)
            row = JobRow(
                id=f"ftjob-{secrets.token_hex(12)}",
                tenant=tenant,
                kind=kind,
                base=base,
                spec=dict(spec),
                status=JobStatus.QUEUED.value,
                created_at=self._clock(),
                attempts=0,
                progress={},
                cancel_requested=False,
                pause_requested=False,
            )
            session.add(row)
            session.flush()
            self._tell(session, row.id, [NewEvent("created", f"Created fine-tuning job: {row.id}")])
            audit.append(session, row.created_at, actor, "job.create", tenant=tenant, subject=row.id, kind=kind)
            return _job(row)

    def job(self, job_id: str, *, tenant: str | None = None) -> Job:
        """tenant: whose job it has to be. Raises JobNotFoundError."""
        with reading(self._engine) as session:
            return _job(_require(session, job_id, tenant))

    def jobs(
        self,
        tenant: str | None = None,
        *,
        limit: int = 100,
        after: str | None = None,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> list[Job]:
        """The newest first. after: only those that follow this one. metadata: pairs that a job's has to hold.

        without_metadata: only jobs that have none. Raises JobNotFoundError for an unknown `after`.
        """
        query = sa.select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(JobRow.tenant == tenant)
        for key, value in (metadata or {}).items():
            query = query.where(JobRow.spec["metadata"][key].as_string() == value)
        if without_metadata:
            query = query.where(sa.func.coalesce(JobRow.spec["metadata"].as_string(), "null").in_(["null", "{}"]))
        with reading(self._engine) as session:
            if after is not None:
                last = _require(session, after, tenant)
                bound = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
                query = query.where(sa.tuple_(JobRow.created_at, JobRow.id) < bound)
            return [_job(row) for row in session.scalars(query)]

    # The worker's side

    def claim(self, worker: str, *, bases: Collection[str] | None = None) -> Job | None:
        """The next job in turn that waits or whose worker fell silent, now this worker's; None when there is none.

        bases: weights digests of the bases at hand; None: any. A job that has outlived `max_attempts` workers fails instead:
        what kills every worker would kill the next one.
        """
        with writing(self._engine) as session:
            take_turns(session)
            while (row := self._next(session, bases)) is not None:
                if row.cancel_requested:
                    self._end(session, row, JobStatus.CANCELLED)
                elif row.pause_requested:
                    self._put_aside(session, row)
                elif row.attempts >= self._max_attempts:
                    message = f"{row.attempts} workers stopped while they ran this job, and it got no further."
                    self._end(session, row, JobStatus.FAILED, failure=JobFailure("worker_stopped", message))
                else:
                    now = self._clock()
                    row.status, row.worker, row.attempts = JobStatus.RUNNING.value, worker, row.attempts + 1
                    row.started_at, row.lease_until = row.started_at or now, now + self.lease_s
                    return _job(row)
                session.flush()
        return None

    def report(
        self,
        job_id: str,
        worker: str,
        *,
        progress: Mapping[str, Any] | None = None,
        events: Sequence[NewEvent] = (),
        further: bool = False,
    ) -> Job:
        """Renew the lease and tell what happened, in one transaction. further: it got where no worker was before.

        Raises ConflictError when the job is no longer this worker's: it has to stop then.
        """
        with writing(self._engine) as session:
            row = _held(session, job_id, worker)
            row.lease_until = self._clock() + self.lease_s
            if progress is not None:
                row.progress = {**row.progress, **progress}
            if further:
                row.attempts = 1
            self._tell(session, job_id, events)
            return _job(row)

    def add_checkpoint(
        self, job_id: str, worker: str, step: int, *, model: str, metrics: Mapping[str, Any]
    ) -> Checkpoint:
        """A checkpoint that answers as `model` now. Adding it again changes nothing. Raises ConflictError as `report` does."""
        with writing(self._engine) as session:
            _held(session, job_id, worker)
            row = session.get(JobCheckpointRow, (job_id, step))
            if row is None:
                row = JobCheckpointRow(
                    job=job_id,
                    step=step,
                    id=f"{CHECKPOINT_ID}{secrets.token_hex(12)}",
                    created_at=self._clock(),
                    model=model,
                    metrics=dict(metrics),
                )
                session.add(row)
            return _checkpoint(row)

    def release(self, job_id: str, worker: str, *, attempted: bool = False) -> Job:
        """Give the job back: it waits again, or is put aside where that was wished. attempted: its training broke off.

        Raises ConflictError as `report` does.
        """
        with writing(self._engine) as session:
            row = _held(session, job_id, worker)
            row.attempts -= 0 if attempted else 1
            row.status, row.lease_until = JobStatus.QUEUED.value, None
            if row.cancel_requested:
                self._end(session, row, JobStatus.CANCELLED)
            elif row.pause_requested:
                self._put_aside(session, row)
            return _job(row)

    def finish(
        self,
        job_id: str,
        worker: str,
        status: JobStatus,
        *,
        result: Mapping[str, Any] | None = None,
        failure: JobFailure | None = None,
    ) -> Job:
        """status: one of ENDED. Raises ConflictError when the job is no longer this worker's."""
        if status not in ENDED:
            raise ConflictError(f"A job cannot finish as '{status}'. Use one of: {', '.join(sorted(ENDED))}.")
        with writing(self._engine) as session:
            row = _held(session, job_id, worker)
            self._end(session, row, status, result=result, failure=failure)
            audit.append(session, self._clock(), worker, f"job.{status}", tenant=row.tenant, subject=job_id)
            return _job(row)

    # The owner's side

    def cancel(self, job_id: str, *, tenant: str | None = None, actor: str = "operator") -> Job:
        """Ends a waiting job at once, a running one as soon as its worker notices. Raises JobNotFoundError, ConflictError."""
        with writing(self._engine) as session:
            row = self._open(session, job_id, tenant)
            row.cancel_requested = True
            if row.status != JobStatus.RUNNING:
                self._end(session, row, JobStatus.CANCELLED)
            audit.append(session, self._clock(), actor, "job.cancel", tenant=row.tenant, subject=job_id)
            return _job(row)

    def pause(self, job_id: str, *, tenant: str | None = None, actor: str = "operator") -> Job:
        """Puts a waiting job aside at once, a running one at its next checkpoint; doing so twice is doing so once.

        Raises JobNotFoundError, ConflictError for one that has ended.
        """
        with writing(self._engine) as session:
            row = self._open(session, job_id, tenant)
            if not row.pause_requested:
                row.pause_requested = True
                if row.status == JobStatus.QUEUED:
                    self._put_aside(session, row)
                audit.append(session, self._clock(), actor, "job.pause", tenant=row.tenant, subject=job_id)
            return _job(row)

    def resume(self, job_id: str, *, tenant: str | None = None, actor: str = "operator") -> Job:
        """Let a paused job wait for a worker again, from its last checkpoint. Raises JobNotFoundError, ConflictError."""
        with writing(self._engine) as session:
            row = self._open(session, job_id, tenant)
            if not row.pause_requested:
                raise ConflictError(f"Job '{job_id}' is not paused: it is {row.status}.")
            row.pause_requested = False
            if row.status == JobStatus.PAUSED:
                row.status = JobStatus.QUEUED.value
            self._tell(session, job_id, [NewEvent(f"resumed:{secrets.token_hex(4)}", "Fine-tuning job resumed")])
            audit.append(session, self._clock(), actor, "job.resume", tenant=row.tenant, subject=job_id)
            return _job(row)

    def events(
        self, job_id: str, *, tenant: str | None = None, limit: int = 20, after: str | None = None
    ) -> list[JobEvent]:
        """The newest first. after: only those that follow this one; an unknown one ends the list. Raises JobNotFoundError."""
        with reading(self._engine) as session:
            _require(session, job_id, tenant)
            query = sa.select(JobEventRow).where(JobEventRow.job == job_id)
            if after is not None:
                query = query.where(JobEventRow.id < _number(after))
            return [_event(row) for row in session.scalars(query.order_by(JobEventRow.id.desc()).limit(limit))]

    def checkpoints(
        self, job_id: str, *, tenant: str | None = None, limit: int = 10, after: str | None = None
    ) -> list[Checkpoint]:
        """The newest first. after: only those that follow this one. Raises JobNotFoundError."""
        with reading(self._engine) as session:
            _require(session, job_id, tenant)
            query = sa.select(JobCheckpointRow).where(JobCheckpointRow.job == job_id)
            if after is not None:
                last = sa.select(JobCheckpointRow.step).where(
                    JobCheckpointRow.job == job_id, JobCheckpointRow.id == after
                )
                query = query.where(JobCheckpointRow.step < last.scalar_subquery())
            return [
                _checkpoint(row) for row in session.scalars(query.order_by(JobCheckpointRow.step.desc()).limit(limit))
            ]

    # Parts of the methods above

    def _next(self, session: Session, bases: Collection[str] | None) -> JobRow | None:
        """Locked. What no worker may run any more comes first: it only has to be put away."""
        now, queued, running = self._clock(), JobStatus.QUEUED.value, JobStatus.RUNNING.value
        silent = sa.and_(JobRow.status == running, JobRow.lease_until <= now)
        claimable = sa.or_(JobRow.status == queued, silent)
        over = sa.or_(JobRow.cancel_requested, JobRow.pause_requested, JobRow.attempts >= self._max_attempts)
        ended = session.scalar(sa.select(JobRow).where(claimable, over).order_by(JobRow.created_at).limit(1))
        if ended is not None:
            return ended
        columns = (JobRow.id, JobRow.tenant, JobRow.created_at, JobRow.started_at)
        alive = sa.select(TenantRow.name).where(TenantRow.archived_at.is_(None))
        query = sa.select(*columns).where(claimable, JobRow.tenant.in_(alive))
        if bases is not None:
            query = query.where(JobRow.base.in_(["", *bases]))
        waiting = [
            WaitingJob(row.id, row.tenant, row.created_at, began=row.started_at is not None)
            for row in session.execute(query)
        ]
        loads = {tenant: self._load(session, tenant, now) for tenant in {job.tenant for job in waiting}}
        chosen = choose_job(waiting, loads)
        return session.get(JobRow, chosen.id, with_for_update=True) if chosen is not None else None

    def _load(self, session: Session, tenant: str, now: float) -> TenantLoad:
        held = sa.and_(JobRow.status == JobStatus.RUNNING.value, JobRow.lease_until > now)
        running, last_start = session.execute(
            sa.select(sa.func.count().filter(held), sa.func.max(JobRow.started_at)).where(JobRow.tenant == tenant)
        ).one()
        row = session.get_one(TenantRow, tenant)
        most = tenant_limits(session, tenant, self._default_limits).max_running_jobs
        return TenantLoad(running, last_start or 0.0, row.weight, most)

    def _open(self, session: Session, job_id: str, tenant: str | None) -> JobRow:
        row = _require(session, job_id, tenant, lock=True)
        if row.status in ENDED:
            raise ConflictError(f"Job '{job_id}' has {row.status} already.")
        return row

    def _put_aside(self, session: Session, row: JobRow) -> None:
        row.status, row.lease_until = JobStatus.PAUSED.value, None
        self._tell(session, row.id, [NewEvent(f"paused:{secrets.token_hex(4)}", "Fine-tuning job paused")])

    def _end(
        self,
        session: Session,
        row: JobRow,
        status: JobStatus,
        *,
        result: Mapping[str, Any] | None = None,
        failure: JobFailure | None = None,
    ) -> None:
        row.status, row.finished_at, row.lease_until = status.value, self._clock(), None
        row.result = dict(result) if result is not None else None
        row.failure = asdict(failure) if failure is not None else None
        said = {
            JobStatus.SUCCEEDED: "The job has successfully completed",
            JobStatus.FAILED: f"The job failed: {failure.message if failure else 'no reason was told'}",
            JobStatus.CANCELLED: "Fine-tuning job cancelled",
        }[status]
        self._tell(session, row.id, [NewEvent("ended", said, "error" if status is JobStatus.FAILED else "info")])

    def _tell(self, session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
        """Append what was not told yet."""
        if not events:
            return
        now = self._clock()
        insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
        session.execute(
            insert(JobEventRow).on_conflict_do_nothing(index_elements=["job", "key"]),
            [
                {
                    "job": job_id,
                    "key": event.key,
                    "created_at": event.created_at if event.created_at is not None else now,
                    "level": event.level,
                    "type": event.type,
                    "message": event.message,
                    "data": dict(event.data) if event.data is not None else None,
                }
                for event in events
            ],
        )


def _require(session: Session, job_id: str, tenant: str | None, *, lock: bool = False) -> JobRow:
    row = session.get(JobRow, job_id, with_for_update=lock)
    if row is None or tenant not in (None, row.tenant):
        raise JobNotFoundError(job_id)
    return row


def _held(session: Session, job_id: str, worker: str) -> JobRow:
    row = _require(session, job_id, None, lock=True)
    if row.status != JobStatus.RUNNING or row.worker != worker:
        raise ConflictError(f"Job '{job_id}' is no longer held by '{worker}': it is {row.status}.")
    return row


def _number(event_id: str) -> int:
    """0, before which nothing is, for what is no event's id."""
    number = event_id.removeprefix(EVENT_ID)
    return int(number) if number.isascii() and number.isdigit() and len(number) <= 18 else 0


def _event(row: JobEventRow) -> JobEvent:
    return JobEvent(f"{EVENT_ID}{row.id}", row.created_at, row.level, row.type, row.message, row.data, row.key)


def _checkpoint(row: JobCheckpointRow) -> Checkpoint:
    return Checkpoint(row.id, row.job, row.step, row.created_at, row.model, row.metrics)


def _job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        tenant=row.tenant,
        kind=row.kind,
        base=row.base,
        spec=row.spec,
        status=JobStatus(row.status),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        worker=row.worker,
        lease_until=row.lease_until,
        attempts=row.attempts,
        progress=row.progress,
        result=row.result,
        failure=JobFailure(**row.failure) if row.failure is not None else None,
        cancel_requested=row.cancel_requested,
        pause_requested=row.pause_requested,
    )
