"""Tenants, their API keys and their limits, and the write transaction every change of the registry is made in."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters import api_keys, audit
from adapters.database import reading, writing
from adapters.errors import (
    ConflictError,
    InvalidLimitError,
    InvalidScopesError,
    KeyNotFoundError,
    TenantNotFoundError,
)
from adapters.models import ChangeRow, KeyRow, LimitRow, TenantRow
from adapters.names import check_name
from adapters.records import (
    LIMITS_OF,
    NO_LIMITS,
    ApiKey,
    AuditFilter,
    LimitKind,
    Limits,
    LimitSubject,
    Scope,
    Tenant,
)
from adapters.rows import (
    forget_limits,
    key_record,
    limit_subject,
    limits_record,
    require_adapter,
    require_key,
    require_tenant,
    tenant_record,
)

MOST = 2**53  # what a JSON reader and a token bucket still count exactly
ROTATION_OVERLAP_S = 24 * 3600.0  # how long the old key still works, unless the operator says otherwise


class Tenancy:
    """The registry's part that knows people; `adapters.registry.Registry` adds what they own."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        secret: bytes,
        default_limits: Limits = NO_LIMITS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """secret: keys the hash of API keys; see `load_secret`. default_limits: of tenants. clock: Unix seconds."""
        self._engine = engine
        self._secret = secret
        self._default_limits = default_limits
        self._clock = clock

    def create_tenant(
        self,
        name: str,
        *,
        limits: Mapping[str, float | None] | None = None,
        weight: float = 1.0,
        actor: str = "operator",
    ) -> Tenant:
        """limits: as for `set_limits`. Raises InvalidNameError, InvalidLimitError, ConflictError when the name is taken."""
        check_name(name, what="tenant")
        with self._writing() as session:
            if session.get(TenantRow, name) is not None:
                raise ConflictError(f"There is a tenant '{name}' already.")
            row = TenantRow(
                name=name,
                created_at=self._clock(),
                cache_salt=secrets.token_urlsafe(24),
                weight=weight,
            )
            session.add(row)
            session.flush()
            self._audit(session, actor, "tenant.create", name, name, weight=weight)
            if limits:
                self._limit(session, LimitSubject(LimitKind.TENANT, name), limits, actor)
            return tenant_record(row)

    def tenants(self, *, include_archived: bool = False) -> list[Tenant]:
        query = sa.select(TenantRow).order_by(TenantRow.name)
        if not include_archived:
            query = query.where(TenantRow.archived_at.is_(None))
        with reading(self._engine) as session:
            return [tenant_record(row) for row in session.scalars(query)]

    def tenant(self, name: str) -> Tenant:
        """Archived ones too. Raises TenantNotFoundError."""
        with reading(self._engine) as session:
            row = session.get(TenantRow, name)
            if row is None:
                raise TenantNotFoundError(name)
            return tenant_record(row)

    def update_tenant(self, name: str, *, weight: float, actor: str = "operator") -> Tenant:
        """Raises TenantNotFoundError, ConflictError for an archived one."""
        with self._writing() as session:
            row = require_tenant(session, name)
            if row.weight != weight:
                row.weight = weight
                self._audit(session, actor, "tenant.update", name, name, weight=weight)
            return tenant_record(row)

    def archive_tenant(self, name: str, *, actor: str = "operator") -> Tenant:
        """Stop all its keys and adapters for good; what it stored and the record of what it did stay.

        Archiving twice is archiving once. Raises TenantNotFoundError.
        """
        with self._writing() as session:
            row = session.get(TenantRow, name)
            if row is None:
                raise TenantNotFoundError(name)
            if row.archived_at is None:
                row.archived_at = self._clock()
                self._audit(session, actor, "tenant.archive", name, name)
            return tenant_record(row)

    def create_key(
        self,
        tenant: str | None,
        scopes: Iterable[Scope],
        *,
        name: str = "",
        expires_at: float | None = None,
        actor: str = "operator",
    ) -> tuple[ApiKey, str]:
        """The key and its plaintext, which nobody can show again. tenant None makes an operator's key.

        Raises InvalidScopesError unless the scope admin is asked for where there is no tenant, and only there;
        TenantNotFoundError, ConflictError for an archived tenant.
        """
        wanted = sorted(scopes)
        if (tenant is None) != (Scope.ADMIN in wanted):
            raise InvalidScopesError(
                "A key needs a tenant or the scope 'admin', which is for operators' keys, and cannot have both."
            )
        with self._writing() as session:
            if tenant is not None:
                require_tenant(session, tenant)
            account = f"svc_acct_{secrets.token_hex(8)}" if tenant is not None else None
            row, plaintext = self._new_key(session, tenant, wanted, name, expires_at, account)
            self._audit(session, actor, "key.create", tenant, row.id, scopes=row.scopes, expires_at=expires_at)
            return key_record(row), plaintext

    def rotate_key(
        self, key_id: str, *, overlap_s: float = ROTATION_OVERLAP_S, actor: str = "operator"
    ) -> tuple[ApiKey, str]:
        """A new key in the old one's place, and its plaintext; the old one ends after overlap_s, if not before.

        The new one has the same tenant, account, scopes, name and limits, and as long a life as the old one was given.
        Raises KeyNotFoundError, ConflictError for a key that has ended or was rotated before: its end is no longer the
        one it was given.
        """
        with self._writing() as session:
            old, now = require_key(session, key_id), self._clock()
            if old.tenant is not None:
                require_tenant(session, old.tenant)
            if not key_record(old).valid_at(now):
                raise ConflictError(f"The key '{key_id}' was revoked or has expired. Create a new one instead.")
            tenants = [old.tenant] if old.tenant is not None else []
            before = audit.latest(session, 1, AuditFilter(tenants, actions=["key.rotate"], subjects=[key_id]))
            if before:
                successor = before[0].details["successor"]
                raise ConflictError(f"The key '{key_id}' was rotated already. Rotate its successor '{successor}'.")
            expires_at = now + (old.expires_at - old.created_at) if old.expires_at is not None else None
            row, plaintext = self._new_key(session, old.tenant, old.scopes, old.name, expires_at, old.account)
            old.expires_at = min(now + overlap_s, old.expires_at if old.expires_at is not None else float("inf"))
            if old.tenant is not None:
                limits = session.get(LimitRow, (LimitKind.KEY.value, old.tenant, old.id))
                if limits is not None:
                    values = {name: getattr(limits, name) for name in LIMITS_OF[LimitKind.KEY]}
                    session.add(LimitRow(kind=LimitKind.KEY.value, tenant=old.tenant, subject=row.id, **values))
            self._audit(
                session, actor, "key.rotate", old.tenant, key_id, successor=row.id, old_expires_at=old.expires_at
            )
            return key_record(row), plaintext

    def _new_key(
        self,
        session: Session,
        tenant: str | None,
        scopes: list[Any],
        name: str,
        expires_at: float | None,
        account: str | None,
    ) -> tuple[KeyRow, str]:
        plaintext = api_keys.new_plaintext()
        row = KeyRow(
            id=f"key_{secrets.token_hex(8)}",
            tenant=tenant,
            name=name,
            scopes=scopes,
            hash=self.hash_key(plaintext),
            hint=plaintext[-api_keys.HINT_CHARACTERS :],
            created_at=self._clock(),
            expires_at=expires_at,
            revoked_at=None,
            account=account,
        )
        session.add(row)
        return row, plaintext

    def keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Keys of one tenant, or all of them; revoked ones too."""
        query = sa.select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
        if tenant is not None:
            query = query.where(KeyRow.tenant == tenant)
        with reading(self._engine) as session:
            return [key_record(row) for row in session.scalars(query)]

    def key(self, key_id: str) -> ApiKey:
        """Revoked ones too. Raises KeyNotFoundError."""
        with reading(self._engine) as session:
            return key_record(require_key(session, key_id))

    def revoke_key(self, key_id: str, *, actor: str = "operator") -> ApiKey:
        """Revoking twice is revoking once. Raises KeyNotFoundError."""
        with self._writing() as session:
            row = require_key(session, key_id)
            self._revoke(session, row, actor)
            return key_record(row)

    def revoke_account(self, tenant: str, account: str, *, actor: str = "operator") -> list[ApiKey]:
        """Every key of one service account. Raises KeyNotFoundError when it has none."""
        query = sa.select(KeyRow).where(KeyRow.tenant == tenant, KeyRow.account == account)
        with self._writing() as session:
            rows = session.scalars(query).all()
            if not rows:
                raise KeyNotFoundError(account)
            for row in rows:
                self._revoke(session, row, actor)
            return [key_record(row) for row in rows]

    def _revoke(self, session: Session, row: KeyRow, actor: str) -> None:
        if row.revoked_at is None:
            row.revoked_at = self._clock()
            if row.tenant is not None:
                forget_limits(session, LimitSubject(LimitKind.KEY, row.tenant, row.id))
            self._audit(session, actor, "key.revoke", row.tenant, row.id)

    # Limits

    def set_limits(
        self, subject: LimitSubject, changes: Mapping[str, float | None], *, actor: str = "operator"
    ) -> Limits:
        """Change the limits named in `changes`, fields of `Limits`; None takes one away. Returns all of the subject's.

        Raises InvalidLimitError, TenantNotFoundError, KeyNotFoundError, AdapterNotFoundError, ConflictError for an archived
        tenant.
        """
        with self._writing() as session:
            require_tenant(session, subject.tenant)
            if subject.kind is LimitKind.KEY and require_key(session, subject.name).tenant != subject.tenant:
                raise KeyNotFoundError(subject.name)
            if subject.kind is LimitKind.ADAPTER:
                require_adapter(session, subject.tenant, subject.name)
            return self._limit(session, subject, changes, actor)

    def limits(self, tenant: str | None = None) -> dict[LimitSubject, Limits]:
        """What was set, for one tenant with its keys and adapters, or for everybody."""
        query = sa.select(LimitRow).order_by(LimitRow.tenant, LimitRow.kind.desc(), LimitRow.subject)
        if tenant is not None:
            query = query.where(LimitRow.tenant == tenant)
        with reading(self._engine) as session:
            return {limit_subject(row): limits_record(row) for row in session.scalars(query)}

    def _limit(
        self, session: Session, subject: LimitSubject, changes: Mapping[str, float | None], actor: str
    ) -> Limits:
        row = session.get(LimitRow, (subject.kind.value, subject.tenant, subject.name))
        limits = replace(limits_record(row), **checked_limits(subject, changes))
        if row is None:
            row = LimitRow(kind=subject.kind.value, tenant=subject.tenant, subject=subject.name)
        for name, value in vars(limits).items():
            setattr(row, name, value)
        if limits != NO_LIMITS:
            session.add(row)
        elif sa.inspect(row).persistent:
            session.delete(row)
        self._audit(session, actor, "limits.set", subject.tenant, str(subject), **dict(changes))
        return limits

    def hash_key(self, plaintext: str) -> str:
        return api_keys.hash_key(plaintext, self._secret)

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """A write transaction. It raises the counter first, so writers take turns; rows stamp themselves with it."""
        with writing(self._engine) as session:
            session.execute(sa.update(ChangeRow).values(value=ChangeRow.value + 1))
            yield session

    def _audit(
        self, session: Session, actor: str, action: str, tenant: str | None, subject: str, **details: Any
    ) -> None:
        audit.append(session, self._clock(), actor, action, tenant=tenant, subject=subject, **details)


def checked_limits(subject: LimitSubject, changes: Mapping[str, float | None]) -> dict[str, Any]:
    """The changes, as fields of `Limits`. Raises InvalidLimitError."""
    for name, value in changes.items():
        if name not in LIMITS_OF[subject.kind]:
            known = ", ".join(sorted(LIMITS_OF[subject.kind]))
            raise InvalidLimitError(f"'{name}' is no limit of {subject}. There are: {known}.")
        if value is None:
            continue
        whole = name != "monthly_budget"
        if isinstance(value, bool) or not 0 < value <= MOST or (whole and value != int(value)):
            raise InvalidLimitError(f"'{name}' must be a {'whole ' if whole else ''}number above zero.")
    return {
        name: int(value) if value is not None and name != "monthly_budget" else value for name, value in changes.items()
    }
