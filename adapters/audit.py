"""The audit log: who did what, written in the transaction of the act, so that neither exists without the other."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.models import AuditRow
from adapters.records import AuditEntry, AuditFilter


def append(
    session: Session, now: float, actor: str, action: str, *, tenant: str | None, subject: str, **details: Any
) -> None:
    """details: JSON values, never a key or a prompt."""
    session.add(AuditRow(time=now, actor=actor, action=action, tenant=tenant, subject=subject, details=details))


def latest(session: Session, limit: int, where: AuditFilter) -> list[AuditEntry]:
    """The newest entries first; of those newer than one, the ones next to it."""
    forwards = where.newer_than is not None
    query = select(AuditRow).order_by(AuditRow.id if forwards else AuditRow.id.desc()).limit(limit)
    for column, wanted in (
        (AuditRow.tenant, where.tenants),
        (AuditRow.actor, where.actors),
        (AuditRow.action, where.actions),
        (AuditRow.subject, where.subjects),
    ):
        if wanted:
            query = query.where(column.in_(wanted))
    if where.since is not None:
        query = query.where(AuditRow.time >= where.since)
    if where.until is not None:
        query = query.where(AuditRow.time < where.until)
    if where.older_than is not None:
        query = query.where(AuditRow.id < where.older_than)
    if where.newer_than is not None:
        query = query.where(AuditRow.id > where.newer_than)
    found = [
        AuditEntry(row.id, row.time, row.actor, row.action, row.tenant, row.subject, row.details)
        for row in session.scalars(query)
    ]
    return found[::-1] if forwards else found
