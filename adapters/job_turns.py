"""Whose fine-tuning job is next. Pure.

Tenants take turns: the one with the fewest jobs running for its weight, then the one whose last job began longest ago; within a
tenant the oldest job. A job whose worker fell silent goes on before new ones of its tenant, for its place is taken already.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WaitingJob:
    id: str
    tenant: str
    created_at: float
    began: bool = False  # had a worker before


@dataclass(frozen=True)
class TenantLoad:
    """What a tenant has of the workers."""

    running: int = 0  # jobs that some worker is at
    last_start: float = 0.0  # Unix seconds; 0: never
    weight: float = 1.0
    most: int | None = None  # jobs that may run at once; None: any number


def choose_job(waiting: Collection[WaitingJob], loads: Mapping[str, TenantLoad]) -> WaitingJob | None:
    """The next job, None when every tenant that waits has as many running as it may."""
    free = [job for job in waiting if (load := loads[job.tenant]).most is None or load.running < load.most]
    return min(free, key=lambda job: _place(job, loads[job.tenant]), default=None)


def _place(job: WaitingJob, load: TenantLoad) -> tuple[float, float, bool, float, str]:
    return (load.running / load.weight, load.last_start, not job.began, job.created_at, job.id)
