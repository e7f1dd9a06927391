"""Tenants and their API keys, and the write transaction every change of the registry is made in."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters import api_keys, audit
from adapters.database import reading, writing
from adapters.errors import ConflictError, KeyNotFoundError
from adapters.models import ChangeRow, KeyRow, TenantRow
from adapters.names import check_name
from adapters.records import ApiKey, Scope, Tenant
from adapters.rows import key_record, require_tenant, tenant_record


class Tenancy:
    """The registry's part that knows people; `adapters.registry.Registry` adds what they own."""

    def __init__(self, engine: sa.Engine, *, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        """secret: keys the hash of API keys; see `load_secret`. clock: Unix seconds."""
        self._engine = engine
        self._secret = secret
        self._clock = clock

    def create_tenant(
        self, name: str, *, max_in_flight: int | None = None, weight: float = 1.0, actor: str = "operator"
    ) -> Tenant:
        """Raises InvalidNameError, ConflictError when the name is taken."""
        check_name(name, what="tenant")
        with self._writing() as session:
            if session.get(TenantRow, name) is not None:
                raise ConflictError(f"There is a tenant '{name}' already.")
            row = TenantRow(
                name=name,
                created_at=self._clock(),
                cache_salt=secrets.token_urlsafe(24),
                max_in_flight=max_in_flight,
                weight=weight,
            )
            session.add(row)
            self._audit(session, actor, "tenant.create", name, name, max_in_flight=max_in_flight, weight=weight)
            return tenant_record(row)

    def tenants(self) -> list[Tenant]:
        with reading(self._engine) as session:
            return [tenant_record(row) for row in session.scalars(sa.select(TenantRow).order_by(TenantRow.name))]

    def create_key(
        self,
        tenant: str | None,
        scopes: Iterable[Scope],
        *,
        name: str = "",
        expires_at: float | None = None,
        actor: str = "operator",
    ) -> tuple[ApiKey, str]:
        """The key and its plaintext, which nobody can show again. tenant None makes an operator's key."""
        plaintext = api_keys.new_plaintext()
        with self._writing() as session:
            if tenant is not None:
                require_tenant(session, tenant)
            row = KeyRow(
                id=f"key_{secrets.token_hex(8)}",
                tenant=tenant,
                name=name,
                scopes=sorted(scopes),
                hash=self.hash_key(plaintext),
                hint=plaintext[-api_keys.HINT_CHARACTERS :],
                created_at=self._clock(),
                expires_at=expires_at,
                revoked_at=None,
            )
            session.add(row)
            self._audit(session, actor, "key.create", tenant, row.id, scopes=row.scopes, expires_at=expires_at)
            return key_record(row), plaintext

    def keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Keys of one tenant, or all of them; revoked ones too."""
        query = sa.select(KeyRow).order_by(KeyRow.created_at, KeyRow.id)
        if tenant is not None:
            query = query.where(KeyRow.tenant == tenant)
        with reading(self._engine) as session:
            return [key_record(row) for row in session.scalars(query)]

    def revoke_key(self, key_id: str, *, actor: str = "operator") -> ApiKey:
        """Revoking twice is revoking once. Raises KeyNotFoundError."""
        with self._writing() as session:
            row = session.get(KeyRow, key_id)
            if row is None:
                raise KeyNotFoundError(key_id)
            if row.revoked_at is None:
                row.revoked_at = self._clock()
                self._audit(session, actor, "key.revoke", row.tenant, key_id)
            return key_record(row)

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
