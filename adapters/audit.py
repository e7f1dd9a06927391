"""The audit log: who did what, written in the transaction of the act, so that neither exists without the other."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.models import AuditRow
from adapters.records import AuditEntry


def append(
    session: Session, now: float, actor: str, action: str, *, tenant: str | None, subject: str, **details: Any
) -> None:
    """details: JSON values, never a key or a prompt."""
    session.add(AuditRow(time=now, actor=actor, action=action, tenant=tenant, subject=subject, details=details))


def latest(session: Session, limit: int, *, tenant: str | None = None) -> list[AuditEntry]:
    """The newest entries first, of one tenant or of everybody."""
    query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    if tenant is not None:
        query = query.where(AuditRow.tenant == tenant)
    return [
        AuditEntry(row.id, row.time, row.actor, row.action, row.tenant, row.subject, row.details)
        for row in session.scalars(query)
    ]
