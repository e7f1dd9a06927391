"""Rows of the registry: finding them, and turning them into records."""

import uuid
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters.alias import Alias
from adapters.errors import (
    AdapterNotFoundError,
    ConflictError,
    Fault,
    KeyNotFoundError,
    RoomError,
    TenantNotFoundError,
    VersionNotFoundError,
)
from adapters.manifest import Manifest, ServingDefaults
from adapters.models import AdapterRow, FileRow, KeyRow, LimitRow, ModelNameRow, TenantRow, VersionRow
from adapters.records import (
    NO_LIMITS,
    NO_SERVING_DEFAULTS,
    AdapterRecord,
    AdapterVersion,
    ApiKey,
    LimitKind,
    Limits,
    LimitSubject,
    ModelName,
    Scope,
    Tenant,
    VersionStatus,
)

ManifestLoader = Callable[[str, str, int], Manifest | None]

PLACEHOLDER = "quarantine:"  # begins the digest of a version whose content was never known; no hex digest does


def alias_of(adapter: AdapterRow) -> Alias:
    return Alias(adapter.production, tuple(adapter.former))


def store_alias(adapter: AdapterRow, alias: Alias) -> None:
    adapter.production, adapter.former = alias.production, list(alias.former)


def adapter_record(row: AdapterRow) -> AdapterRecord:
    alias = alias_of(row)
    shared_with = frozenset(row.shared_with)
    return AdapterRecord(row.tenant, row.name, row.created_at, alias.production, alias.previous, shared_with)


def version_record(row: Any, load_manifest: ManifestLoader) -> AdapterVersion:
    """row: a VersionRow, or a result row with its columns."""
    return AdapterVersion(
        tenant=row.tenant,
        adapter=row.adapter,
        version=row.version,
        digest=row.digest,
        status=VersionStatus(row.status),
        created_at=row.created_at,
        rank=row.rank,
        alpha=row.alpha,
        size_bytes=row.size_bytes,
        base=row.base,
        files=row.files,
        serving=ServingDefaults(**row.serving) if row.serving else NO_SERVING_DEFAULTS,
        warnings=tuple(row.warnings),
        faults=tuple(Fault(**fault) for fault in row.faults),
        probe=row.probe,
        manifest_source=partial(load_manifest, row.tenant, row.adapter, row.version),
    )


def tenant_record(row: TenantRow) -> Tenant:
    return Tenant(row.name, row.created_at, row.cache_salt, row.weight, row.archived_at)


def key_record(row: KeyRow) -> ApiKey:
    scopes = frozenset(Scope(scope) for scope in row.scopes)
    return ApiKey(
        row.id, row.tenant, row.name, scopes, row.hint, row.created_at, row.expires_at, row.revoked_at, row.account
    )


def limit_subject(row: LimitRow) -> LimitSubject:
    return LimitSubject(LimitKind(row.kind), row.tenant, row.subject)


def limits_record(row: LimitRow | None) -> Limits:
    return Limits(**{one.name: getattr(row, one.name) for one in fields(Limits)}) if row is not None else NO_LIMITS


def model_name(row: ModelNameRow) -> ModelName:
    return ModelName(row.name, row.tenant, row.adapter, row.version, row.step)


def tenant_limits(session: Session, tenant: str, defaults: Limits) -> Limits:
    return limits_record(session.get(LimitRow, (LimitKind.TENANT.value, tenant, ""))).or_else(defaults)


def placeholder_digest() -> str:
    return f"{PLACEHOLDER}{uuid.uuid4().hex}"


def forget_limits(session: Session, subject: LimitSubject) -> None:
    row = session.get(LimitRow, (subject.kind.value, subject.tenant, subject.name))
    if row is not None:
        session.delete(row)


def all_versions(tenant: str, name: str) -> sa.Select[VersionRow]:
    """Every version there ever was. One that ended in quarantine was none: its row waits for the next to take its number."""
    retired = VersionRow.status == VersionStatus.RETIRED.value
    return sa.select(VersionRow).where(
        VersionRow.tenant == tenant,
        VersionRow.adapter == name,
        ~(retired & VersionRow.digest.startswith(PLACEHOLDER)),
    )


def live_versions(tenant: str, name: str) -> sa.Select[VersionRow]:
    return all_versions(tenant, name).where(VersionRow.status != VersionStatus.RETIRED.value)


def require_tenant(session: Session, name: str) -> TenantRow:
    """Raises TenantNotFoundError, ConflictError for an archived one, of which nothing may change any more."""
    row = session.get(TenantRow, name)
    if row is None:
        raise TenantNotFoundError(name)
    if row.archived_at is not None:
        raise ConflictError(f"The tenant '{name}' is archived.")
    return row


def require_key(session: Session, key_id: str) -> KeyRow:
    row = session.get(KeyRow, key_id)
    if row is None:
        raise KeyNotFoundError(key_id)
    return row


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


def find_reserved(session: Session, reserved: AdapterVersion) -> VersionRow | None:
    """The row of a quarantined version as long as it is quarantined: another upload may have its number by now."""
    query = live_versions(reserved.tenant, reserved.adapter)
    return session.scalar(query.where(VersionRow.digest == reserved.digest))


def require_adapter_room(session: Session, tenant: str, most: int | None) -> None:
    """Raises RoomError when the tenant has `most` adapters already."""
    if most is None:
        return
    live = sa.select(sa.func.count()).where(AdapterRow.tenant == tenant, AdapterRow.deleted_at.is_(None))
    if session.scalars(live).one() >= most:
        raise RoomError(f"The tenant '{tenant}' may have {most} adapters. Delete one first.")


def require_byte_room(session: Session, tenant: str, size_bytes: int, most: int | None) -> None:
    """Raises RoomError when the tenant's versions and files, and `size_bytes` more, are above `most`."""
    if most is None:
        return
    versions = sa.select(sa.func.coalesce(sa.func.sum(VersionRow.size_bytes), 0)).where(
        VersionRow.tenant == tenant, VersionRow.status != VersionStatus.RETIRED.value
    )
    files = sa.select(sa.func.coalesce(sa.func.sum(FileRow.size_bytes), 0)).where(FileRow.tenant == tenant)
    stored = int(session.scalars(versions).one()) + int(session.scalars(files).one())
    if stored + size_bytes > most:
        raise RoomError(
            f"The tenant '{tenant}' may store {most:,} bytes, holds {stored:,}, and this has {size_bytes:,}. "
            "Delete versions or files first."
        )
