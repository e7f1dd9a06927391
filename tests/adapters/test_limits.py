"""Limits, rotation and archiving, on SQLite and on Postgres."""

import itertools
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.database import open_database
from adapters.errors import (
    AdapterNotFoundError,
    ConflictError,
    InvalidLimitError,
    KeyNotFoundError,
    RoomError,
    TenantNotFoundError,
)
from adapters.registry import AdapterVersion, LimitKind, Limits, LimitSubject, Registry, Scope
from tests.adapters.conftest import Clock

TENANT = LimitSubject(LimitKind.TENANT, "acme")
_digests = (f"{number:064x}" for number in itertools.count())


def add(registry: Registry, name: str, *, size_bytes: int = 10, digest: str | None = None) -> AdapterVersion:
    version, _ = registry.add_version(
        "acme", name, digest=digest or next(_digests), size_bytes=size_bytes, rank=8, alpha=16.0, files={}
    )
    return version


def test_limits_are_set_one_by_one_and_taken_away(registry: Registry) -> None:
    registry.set_limits(TENANT, {"requests_per_minute": 60, "monthly_budget": 9.5})
    assert registry.set_limits(TENANT, {"max_in_flight": 3}) == Limits(
        requests_per_minute=60, monthly_budget=9.5, max_in_flight=3
    )
    assert registry.snapshot().limits[TENANT].requests_per_minute == 60
    assert registry.limits("globex") == {}
    registry.set_limits(TENANT, {"requests_per_minute": None, "monthly_budget": None, "max_in_flight": None})
    assert registry.limits() == registry.snapshot().limits == {}
    assert [entry.details for entry in registry.audit(3) if entry.action == "limits.set"][1] == {"max_in_flight": 3}


def test_a_limit_must_belong_to_its_subject_and_be_a_positive_number(registry: Registry) -> None:
    key, _ = registry.create_key("acme", [Scope.INFERENCE])
    own = LimitSubject(LimitKind.KEY, "acme", key.id)
    for subject, name, value in (
        (own, "max_adapters", 5),
        (TENANT, "nonsense", 5),
        (TENANT, "requests_per_minute", 0),
        (TENANT, "requests_per_minute", 1.5),
        (TENANT, "tokens_per_minute", True),
        (TENANT, "monthly_budget", float("nan")),
        (TENANT, "max_stored_bytes", 2**60),
    ):
        with pytest.raises(InvalidLimitError, match=name):
            registry.set_limits(subject, {name: value})
    for subject, error in (
        (LimitSubject(LimitKind.TENANT, "nobody"), TenantNotFoundError),
        (LimitSubject(LimitKind.KEY, "globex", key.id), KeyNotFoundError),
        (LimitSubject(LimitKind.ADAPTER, "acme", "nothing"), AdapterNotFoundError),
    ):
        with pytest.raises(error):
            registry.set_limits(subject, {"max_in_flight": 5})
    assert registry.limits() == {}


def test_limits_of_a_key_or_adapter_go_with_it(registry: Registry) -> None:
    key, _ = registry.create_key("acme", [Scope.INFERENCE])
    add(registry, "support")
    for kind, name in ((LimitKind.KEY, key.id), (LimitKind.ADAPTER, "support")):
        registry.set_limits(LimitSubject(kind, "acme", name), {"max_in_flight": 2})
    assert len(registry.limits("acme")) == 2
    registry.revoke_key(key.id)
    registry.delete_adapter("acme", "support")
    assert registry.limits() == {}


def test_a_tenant_keeps_no_more_adapters_and_bytes_than_its_limits(registry: Registry) -> None:
    registry.set_limits(TENANT, {"max_adapters": 2, "max_stored_bytes": 100})
    first = add(registry, "one", size_bytes=60)
    add(registry, "two", size_bytes=40)
    with pytest.raises(RoomError, match="may have 2 adapters"):
        add(registry, "three", size_bytes=1)
    with pytest.raises(RoomError, match="may store 100 bytes, holds 100, and this has 1"):
        add(registry, "two", size_bytes=1)
    assert add(registry, "one", size_bytes=60, digest=first.digest) == first
    registry.delete_adapter("acme", "one")
    add(registry, "three", size_bytes=60)
    assert len(registry.adapters("acme")) == 2


def test_the_installations_defaults_hold_where_the_tenant_has_no_limit(database: sa.Engine) -> None:
    registry = Registry(database, secret=b"s", default_limits=Limits(max_adapters=1))
    registry.create_tenant("acme")
    add(registry, "one")
    with pytest.raises(RoomError):
        add(registry, "two")
    registry.set_limits(TENANT, {"max_adapters": 2})
    add(registry, "two")


def test_a_rotated_key_works_until_the_overlap_is_over(registry: Registry, clock: Clock) -> None:
    old, _ = registry.create_key("acme", [Scope.INFERENCE, Scope.JOBS], name="ci", expires_at=clock.now + 1000)
    registry.set_limits(LimitSubject(LimitKind.KEY, "acme", old.id), {"requests_per_minute": 7})
    clock.now += 400
    new, plaintext = registry.rotate_key(old.id, overlap_s=60)
    assert (new.tenant, new.scopes, new.name, new.account) == (old.tenant, old.scopes, old.name, old.account)
    assert new.expires_at == clock.now + 1000
    assert registry.snapshot().keys[registry.hash_key(plaintext)] == new
    assert registry.limits("acme")[LimitSubject(LimitKind.KEY, "acme", new.id)].requests_per_minute == 7
    assert registry.key(old.id).valid_at(clock.now + 59)
    assert not registry.key(old.id).valid_at(clock.now + 60)
    again, _ = registry.rotate_key(new.id, overlap_s=1e9)
    assert registry.key(new.id).expires_at == new.expires_at
    assert [entry.action for entry in registry.audit(2)] == ["key.rotate", "key.rotate"]
    assert again.account == old.account


def test_a_key_that_has_ended_is_not_rotated(registry: Registry, clock: Clock) -> None:
    revoked, expired = (registry.create_key("acme", [Scope.JOBS], expires_at=clock.now + 5)[0] for _ in range(2))
    registry.revoke_key(revoked.id)
    clock.now += 5
    for key in (revoked, expired):
        with pytest.raises(ConflictError, match="Create a new one"):
            registry.rotate_key(key.id)
    with pytest.raises(KeyNotFoundError):
        registry.rotate_key("key_nothing")


@pytest.mark.parametrize("tenant", ["acme", None])
def test_a_key_is_rotated_once_and_then_its_successor(registry: Registry, clock: Clock, tenant: str | None) -> None:
    scopes = [Scope.INFERENCE] if tenant else [Scope.ADMIN]
    old, _ = registry.create_key(tenant, scopes, expires_at=clock.now + 1e6)
    new, _ = registry.rotate_key(old.id, overlap_s=60)
    with pytest.raises(ConflictError, match=f"rotated already.*'{new.id}'"):
        registry.rotate_key(old.id)
    assert registry.rotate_key(new.id)[0].expires_at == clock.now + 1e6


def test_an_operators_key_is_rotated_too(registry: Registry) -> None:
    old, _ = registry.create_key(None, [Scope.ADMIN])
    new, _ = registry.rotate_key(old.id)
    assert (new.tenant, new.account, new.scopes) == (None, None, frozenset({Scope.ADMIN}))


def test_an_archived_tenant_is_gone_from_every_snapshot_and_keeps_its_name(registry: Registry) -> None:
    registry.snapshot()
    registry.create_key("acme", [Scope.INFERENCE])
    add(registry, "support")
    assert set(registry.snapshot().adapters) == {("acme", "support")}
    archived = registry.archive_tenant("acme")
    assert registry.archive_tenant("acme") == archived
    snapshot = registry.snapshot()
    assert (set(snapshot.tenants), snapshot.keys, snapshot.adapters, snapshot.versions) == ({"globex"}, {}, {}, {})
    assert registry.tenants(include_archived=True)[0] == registry.tenant("acme") == archived
    with pytest.raises(ConflictError):
        registry.create_tenant("acme")
    for act in (
        lambda: registry.create_key("acme", [Scope.INFERENCE]),
        lambda: registry.set_limits(TENANT, {"max_in_flight": 1}),
        lambda: registry.update_tenant("acme", weight=2.0),
        lambda: add(registry, "other"),
    ):
        with pytest.raises(ConflictError, match="archived"):
            act()
    with pytest.raises(TenantNotFoundError):
        registry.archive_tenant("nobody")


def test_limits_of_the_first_schema_are_kept_by_the_migration(tmp_path: Path) -> None:
    from alembic import command
    from alembic.config import Config

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    config = Config()
    config.set_main_option("script_location", "adapters:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for name, limit in (("acme", "7"), ("globex", "NULL")):
            connection.execute(sa.text(f"INSERT INTO tenants VALUES ('{name}', 1.0, 'salt', {limit}, 1.0)"))  # noqa: S608
        connection.execute(
            sa.text("INSERT INTO api_keys VALUES ('key_ab', 'acme', '', '[]', 'hash', 'hint', 1.0, NULL, NULL)")
        )
    engine.dispose()
    registry = Registry(open_database(str(tmp_path / "old.db")), secret=b"s")
    assert registry.limits() == {TENANT: Limits(max_in_flight=7)}
    assert [tenant.name for tenant in registry.tenants()] == ["acme", "globex"]
    assert registry.key("key_ab").account == "svc_acct_ab"
