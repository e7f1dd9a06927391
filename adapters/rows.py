"""Finding adapters and versions in the database, and turning their rows into records."""

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters.alias import Alias
from adapters.errors import AdapterNotFoundError, VersionNotFoundError
from adapters.models import AdapterRow, ShareRow, VersionRow
from adapters.records import AdapterRecord, VersionStatus


def alias_of(adapter: AdapterRow) -> Alias:
    return Alias(adapter.production, tuple(adapter.former))


def store_alias(adapter: AdapterRow, alias: Alias) -> None:
    adapter.production, adapter.former = alias.production, list(alias.former)


def adapter_record(row: AdapterRow, shared_with: Iterable[str]) -> AdapterRecord:
    alias = alias_of(row)
    return AdapterRecord(row.tenant, row.name, row.created_at, alias.production, alias.previous, frozenset(shared_with))


def shares_of(session: Session, adapter: AdapterRow) -> Iterable[str]:
    return session.scalars(
        sa.select(ShareRow.shared_with).where(ShareRow.tenant == adapter.tenant, ShareRow.adapter == adapter.name)
    )


def adapter_records(session: Session, tenant: str | None = None) -> list[AdapterRecord]:
    query = sa.select(AdapterRow).where(AdapterRow.deleted_at.is_(None)).order_by(AdapterRow.tenant, AdapterRow.name)
    if tenant is not None:
        query = query.where(AdapterRow.tenant == tenant)
    shared: dict[tuple[str, str], list[str]] = {}
    for share in session.scalars(sa.select(ShareRow)):
        shared.setdefault((share.tenant, share.adapter), []).append(share.shared_with)
    return [adapter_record(row, shared.get((row.tenant, row.name), ())) for row in session.scalars(query)]


def all_versions(tenant: str, name: str) -> sa.Select[VersionRow]:
    return sa.select(VersionRow).where(VersionRow.tenant == tenant, VersionRow.adapter == name)


def live_versions(tenant: str, name: str) -> sa.Select[VersionRow]:
    return all_versions(tenant, name).where(VersionRow.status != VersionStatus.RETIRED.value)


def require_adapter(session: Session, tenant: str, name: str) -> AdapterRow:
    row = session.get(AdapterRow, (tenant, name))
    if row is None or row.deleted_at is not None:
        raise AdapterNotFoundError(name)
    return row


def require_version(session: Session, tenant: str, name: str, version: int) -> tuple[AdapterRow, VersionRow]:
    adapter = require_adapter(session, tenant, name)
    row = session.get(VersionRow, (tenant, name, version))
    if row is None or row.status == VersionStatus.RETIRED:
        raise VersionNotFoundError(name, version)
    return adapter, row
