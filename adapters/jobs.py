"""Fine-tuning jobs: a queue in the registry's database, from which workers claim with a lease.

A worker that dies stops renewing its lease; after it has run out the next worker claims the job and goes on from the
last checkpoint. Jobs do not raise the registry's change counter: a heartbeat is nobody's reason to read a snapshot.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters import audit
from adapters.database import reading, writing
from adapters.errors import ConflictError, NotFoundError
from adapters.models import JobRow
from adapters.rows import require_tenant


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


@dataclass(frozen=True)
class Job:
    """One piece of work. Times are Unix seconds."""

    id: str
    tenant: str
    kind: str
    spec: Mapping[str, Any]  # what to do, as the worker reads it
    status: JobStatus
    created_at: float
    started_at: float | None
    finished_at: float | None
    worker: str | None  # who has it, or had it last
    lease_until: float | None
    attempts: int
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: str | None
    cancel_requested: bool  # the worker ends the job when it sees this


class Jobs:
    """Synchronous and safe to use from several threads, processes and machines."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        clock: Callable[[], float] = time.time,
        lease_s: float = 60.0,
        max_attempts: int = 3,
    ) -> None:
        """lease_s: how long a silent worker keeps a job. max_attempts: how many workers a job may outlive."""
        self._engine = engine
        self._clock = clock
        self._lease_s = lease_s
        self._max_attempts = max_attempts

    def create(
        self, tenant: str, spec: Mapping[str, Any], *, kind: str = "fine_tuning", actor: str = "operator"
    ) -> Job:
        """Raises TenantNotFoundError."""
        with writing(self._engine) as session:
            require_tenant(session, tenant)
            row = JobRow(
                id=f"ftjob-{secrets.token_hex(12)}",
                tenant=tenant,
                kind=kind,
                spec=dict(spec),
                status=JobStatus.QUEUED.value,
                created_at=self._clock(),
                attempts=0,
                progress={},
                cancel_requested=False,
            )
            session.add(row)
            audit.append(session, row.created_at, actor, "job.create", tenant=tenant, subject=row.id, kind=kind)
            return _job(row)

    def job(self, job_id: str, *, tenant: str | None = None) -> Job:
        """tenant: whose job it has to be. Raises NotFoundError."""
        with reading(self._engine) as session:
            return _job(_require(session, job_id, tenant))

    def jobs(self, tenant: str | None = None, *, limit: int = 100) -> list[Job]:
        """The newest first."""
        query = sa.select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)
        if tenant is not None:
            query = query.where(JobRow.tenant == tenant)
        with reading(self._engine) as session:
            return [_job(row) for row in session.scalars(query)]

    def claim(self, worker: str) -> Job | None:
        """The oldest job that waits or whose worker fell silent, now this worker's; None when there is none.

        A job that has outlived `max_attempts` workers fails instead: what kills every worker would kill the next one.
        """
        with writing(self._engine) as session:
            while (row := session.scalar(_claimable(self._clock()))) is not None:
                if row.cancel_requested:
                    self._end(row, JobStatus.CANCELLED)
                elif row.attempts >= self._max_attempts:
                    self._end(row, JobStatus.FAILED, error=f"{row.attempts} workers stopped while they ran this job.")
                else:
                    now = self._clock()
                    row.status, row.worker, row.attempts = JobStatus.RUNNING.value, worker, row.attempts + 1
                    row.started_at, row.lease_until = row.started_at or now, now + self._lease_s
                    return _job(row)
                session.flush()
        return None

    def heartbeat(self, job_id: str, worker: str, *, progress: Mapping[str, Any] | None = None) -> Job:
        """Renew the lease. Raises ConflictError when the job is no longer this worker's: it has to stop then."""
        with writing(self._engine) as session:
            row = _held(session, job_id, worker)
            row.lease_until = self._clock() + self._lease_s
            if progress is not None:
                row.progress = dict(progress)
            return _job(row)

    def finish(
        self,
        job_id: str,
        worker: str,
        status: JobStatus,
        *,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> Job:
        """status: one of ENDED. Raises ConflictError when the job is no longer this worker's."""
        if status not in ENDED:
            raise ConflictError(f"A job cannot finish as '{status}'. Use one of: {', '.join(sorted(ENDED))}.")
        with writing(self._engine) as session:
            row = _held(session, job_id, worker)
            self._end(row, status, result=result, error=error)
            audit.append(session, self._clock(), worker, f"job.{status}", tenant=row.tenant, subject=job_id)
            return _job(row)

    def cancel(self, job_id: str, *, tenant: str | None = None, actor: str = "operator") -> Job:
        """Ends a waiting job at once, and a running one as soon as its worker notices. Raises NotFoundError, ConflictError."""
        with writing(self._engine) as session:
            row = _require(session, job_id, tenant, lock=True)
            if row.status in ENDED:
                raise ConflictError(f"Job '{job_id}' has {row.status} already.")
            row.cancel_requested = True
            if row.status == JobStatus.QUEUED:
                self._end(row, JobStatus.CANCELLED)
            audit.append(session, self._clock(), actor, "job.cancel", tenant=row.tenant, subject=job_id)
            return _job(row)

    def _end(
        self, row: JobRow, status: JobStatus, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> None:
        row.status, row.finished_at, row.lease_until = status.value, self._clock(), None
        row.result, row.error = dict(result) if result is not None else None, error


def _claimable(now: float) -> sa.Select[JobRow]:
    """skip_locked: on Postgres several workers claim different jobs at once; SQLite has one writer anyway."""
    silent = (JobRow.status == JobStatus.RUNNING.value) & (JobRow.lease_until <= now)
    return (
        sa.select(JobRow)
        .where((JobRow.status == JobStatus.QUEUED.value) | silent)
        .order_by(JobRow.created_at, JobRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def _require(session: Session, job_id: str, tenant: str | None, *, lock: bool = False) -> JobRow:
    row = session.get(JobRow, job_id, with_for_update=lock)
    if row is None or tenant not in (None, row.tenant):
        raise NotFoundError(f"There is no job '{job_id}'.")
    return row


def _held(session: Session, job_id: str, worker: str) -> JobRow:
    row = _require(session, job_id, None, lock=True)
    if row.status != JobStatus.RUNNING or row.worker != worker:
        raise ConflictError(f"Job '{job_id}' is no longer held by '{worker}': it is {row.status}.")
    return row


def _job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        tenant=row.tenant,
        kind=row.kind,
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
        error=row.error,
        cancel_requested=row.cancel_requested,
    )
