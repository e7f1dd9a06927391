"""The registry on SQLite and on Postgres."""

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.database import open_database, writing
from adapters.errors import (
    AdapterNotFoundError,
    ConflictError,
    Fault,
    InvalidNameError,
    InvalidScopesError,
    KeyNotFoundError,
    NotFoundError,
    TenantNotFoundError,
    VersionNotFoundError,
)
from adapters.manifest import BaseFingerprint, Golden, Manifest, ServingDefaults
from adapters.models import VersionRow
from adapters.registry import AdapterVersion, Registry, Scope, VersionStatus

FILES: Mapping[str, str] = {"adapter_config.json": "c" * 64, "adapter_model.safetensors": "d" * 64}
_digests = (f"{number:064x}" for number in itertools.count())


def make_manifest(**changes: Any) -> Manifest:
    golden = Golden(
        messages=[{"role": "user", "content": "Which topic? Wheat prices rose."}],
        completion="grain",
        prompt_token_ids=list(range(200)),
        completion_token_ids=[5, 6],
        logprobs=[-0.1, -0.2],
        base_logprobs=[-3.0, -4.0],
    )
    return Manifest(
        name="support",
        base=BaseFingerprint(model="tiny", weights_digest="a" * 64, template_digest="b" * 64),
        rank=8,
        alpha=16,
        target_modules=["q_proj"],
        created_at=1_700_000_000,
        base_licence="Apache-2.0",
        goldens=[golden] * 8,
        **changes,
    )


def add(registry: Registry, tenant: str = "acme", name: str = "support", **changes: Any) -> AdapterVersion:
    fields: dict[str, Any] = {"digest": next(_digests), "size_bytes": 10, "rank": 8, "alpha": 16.0, "files": FILES}
    return registry.add_version(tenant, name, **(fields | changes))[0]


def add_ready(registry: Registry, tenant: str = "acme", name: str = "support", **changes: Any) -> AdapterVersion:
    version = add(registry, tenant, name, **changes)
    return registry.set_status(tenant, name, version.version, VersionStatus.READY)


def actions(registry: Registry, tenant: str | None = None) -> list[str]:
    return [entry.action for entry in registry.audit(1000, tenant)]


# Tenants and keys


def test_every_tenant_has_a_cache_salt_of_its_own_that_is_never_printed(registry: Registry) -> None:
    acme, globex = registry.tenants()
    assert (acme.name, globex.name) == ("acme", "globex")
    assert acme.cache_salt != globex.cache_salt
    assert acme.cache_salt not in repr(acme)


def test_a_taken_or_unwritable_tenant_name_is_refused(registry: Registry) -> None:
    with pytest.raises(ConflictError, match="There is a tenant 'acme' already"):
        registry.create_tenant("acme")
    with pytest.raises(InvalidNameError, match="not a valid tenant name"):
        registry.create_tenant("Acme Inc.")


def test_only_the_hash_of_a_key_is_stored(registry: Registry, database: sa.Engine) -> None:
    key, plaintext = registry.create_key("acme", [Scope.INFERENCE, Scope.ADAPTERS_WRITE], name="laptop")
    assert re.fullmatch(r"lk-[A-Za-z0-9_-]{32,}", plaintext)
    assert key.hint == plaintext[-4:]
    assert key.scopes == {Scope.INFERENCE, Scope.ADAPTERS_WRITE}
    assert registry.keys("acme") == [key]
    assert registry.snapshot().keys[registry.hash_key(plaintext)] == key
    with database.connect() as connection:
        stored = str(connection.execute(sa.text("SELECT * FROM api_keys")).all())
        audited = str(connection.execute(sa.text("SELECT * FROM audit")).all())
    assert plaintext not in stored + audited
    assert registry.hash_key(plaintext) in stored


@pytest.mark.parametrize(("tenant", "scopes"), [(None, [Scope.INFERENCE]), (None, []), ("acme", [Scope.ADMIN])])
def test_a_key_has_either_a_tenant_or_the_scope_of_operators(
    registry: Registry, tenant: str | None, scopes: list[Scope]
) -> None:
    with pytest.raises(InvalidScopesError, match="needs a tenant or the scope 'admin'"):
        registry.create_key(tenant, scopes)
    assert registry.keys() == []


def test_another_secret_makes_every_stored_key_useless(registry: Registry, database: sa.Engine) -> None:
    _, plaintext = registry.create_key("acme", [Scope.INFERENCE])
    other = Registry(database, secret=b"another secret")
    assert other.hash_key(plaintext) not in other.snapshot().keys


def test_a_revoked_key_leaves_the_snapshot_and_stays_in_the_list(registry: Registry, clock: Any) -> None:
    key, plaintext = registry.create_key("acme", [Scope.INFERENCE])
    clock.now += 60
    revoked = registry.revoke_key(key.id, actor="alice")
    assert revoked.revoked_at == clock.now
    assert registry.hash_key(plaintext) not in registry.snapshot().keys
    assert registry.keys("acme") == [revoked]
    clock.now += 60
    assert registry.revoke_key(key.id) == revoked
    assert actions(registry).count("key.revoke") == 1
    with pytest.raises(KeyNotFoundError):
        registry.revoke_key("key_none")


def test_a_key_is_valid_until_it_expires_or_is_revoked(registry: Registry, clock: Any) -> None:
    key, _ = registry.create_key(None, [Scope.ADMIN], expires_at=clock.now + 10)
    assert key.tenant is None
    assert key.valid_at(clock.now + 9.9)
    assert not key.valid_at(clock.now + 10)
    assert not registry.revoke_key(key.id).valid_at(clock.now)


def test_keys_and_adapters_need_a_tenant_that_exists(registry: Registry) -> None:
    with pytest.raises(TenantNotFoundError, match="lorikeet tenants create nobody"):
        registry.create_key("nobody", [Scope.INFERENCE])
    with pytest.raises(TenantNotFoundError):
        add(registry, "nobody")


# Versions


def test_a_new_version_is_validated_and_answers_to_nothing_yet(registry: Registry, clock: Any) -> None:
    version = add(registry, warnings=("No manifest.",))
    assert (version.version, version.status) == (1, VersionStatus.VALIDATED)
    assert version.files == FILES
    assert version.warnings == ("No manifest.",)
    assert version.created_at == clock.now
    assert version.engine_name == f"acme/support@1-{version.digest[:8]}"
    assert registry.version("acme", "support", 1) == version
    assert registry.adapter("acme", "support").production is None


def test_the_same_content_under_the_same_name_is_the_same_version(registry: Registry) -> None:
    digest = next(_digests)
    fields: dict[str, Any] = {"digest": digest, "size_bytes": 1, "rank": 8, "alpha": 16, "files": FILES}
    first, created = registry.add_version("acme", "support", **fields)
    again, created_again = registry.add_version("acme", "support", **fields)
    assert (created, created_again) == (True, False)
    assert again == first
    assert add(registry, name="other", digest=digest).version == 1
    assert add(registry, "globex", digest=digest).version == 1
    assert (
        add(registry, digest=digest, base="another").version == 2
    )  # of what was validated for one base, no other knows


def test_a_manifest_comes_back_whole_and_its_serving_defaults_without_reading_it(registry: Registry) -> None:
    manifest = make_manifest(serving=ServingDefaults(system_prompt="Be brief.", max_tokens=64))
    add(registry, manifest=manifest)
    for version in (
        registry.version("acme", "support", 1),
        registry.versions("acme", "support")[0],
        registry.snapshot().versions["acme", "support", 1],
    ):
        assert version.serving == manifest.serving
        assert "manifest" not in vars(version)
        assert version.manifest == manifest
    assert add(registry, name="plain").manifest is None


def test_the_first_ready_version_goes_into_production_and_later_ones_wait(registry: Registry) -> None:
    first, second = add(registry), add(registry)
    registry.set_status("acme", "support", second.version, VersionStatus.READY, probe={"effect": 0.5})
    registry.set_status("acme", "support", first.version, VersionStatus.READY)
    record = registry.adapter("acme", "support")
    assert (record.production, record.previous) == (2, None)
    assert registry.version("acme", "support", 2).probe == {"effect": 0.5}


def test_a_refused_version_keeps_its_faults_and_can_be_probed_again(registry: Registry) -> None:
    add(registry)
    fault = Fault("no_effect", "The adapter changes nothing.", "goldens[0]", "Train longer.")
    registry.set_status("acme", "support", 1, VersionStatus.PROBING)
    refused = registry.set_status("acme", "support", 1, VersionStatus.REFUSED, faults=[fault])
    assert registry.version("acme", "support", 1).faults == refused.faults == (fault,)
    assert registry.adapter("acme", "support").production is None
    registry.set_status("acme", "support", 1, VersionStatus.PROBING)
    assert registry.set_status("acme", "support", 1, VersionStatus.READY).faults == ()


@pytest.mark.parametrize("status", [VersionStatus.VALIDATED, VersionStatus.PROBING, VersionStatus.REFUSED])
def test_a_ready_version_never_falls_back(registry: Registry, status: VersionStatus) -> None:
    add_ready(registry)
    with pytest.raises(ConflictError, match=f"is ready and cannot become {status}"):
        registry.set_status("acme", "support", 1, status)


def test_retiring_is_deleting_and_no_status_to_set(registry: Registry) -> None:
    add(registry)
    with pytest.raises(ConflictError):
        registry.set_status("acme", "support", 1, VersionStatus.RETIRED)


# Quarantine


def test_a_reserved_version_is_quarantined_and_seen_by_whoever_looks(registry: Registry, clock: Any) -> None:
    reserved = registry.reserve_version("acme", "support")
    assert (reserved.version, reserved.status, reserved.created_at) == (1, VersionStatus.QUARANTINED, clock.now)
    assert (reserved.files, reserved.manifest) == ({}, None)
    assert registry.version("acme", "support", 1) == reserved
    assert registry.versions("acme", "support") == [reserved]
    snapshot = registry.snapshot()
    assert snapshot.versions["acme", "support", 1] == reserved
    assert snapshot.adapters["acme", "support"].production is None
    with pytest.raises(TenantNotFoundError):
        registry.reserve_version("nobody", "support")
    with pytest.raises(InvalidNameError):
        registry.reserve_version("acme", "Support")


def test_a_quarantined_version_becomes_the_validated_one_when_its_content_comes(registry: Registry) -> None:
    reserved = registry.reserve_version("acme", "support")
    registry.snapshot()
    assert add(registry).version == 2
    version = add(registry, reserved=reserved, manifest=make_manifest(), warnings=("Odd.",))
    assert (version.version, version.status, version.rank) == (1, VersionStatus.VALIDATED, 8)
    assert (version.files, version.warnings) == (FILES, ("Odd.",))
    assert registry.version("acme", "support", 1) == registry.snapshot().versions["acme", "support", 1] == version
    assert registry.version("acme", "support", 1).manifest == make_manifest()
    assert actions(registry, "acme")[:2] == ["version.add"] * 2


def test_files_are_named_until_the_last_version_goes_an_archived_tenants_included(registry: Registry) -> None:
    own, shared, unknown = "1" * 64, "2" * 64, "3" * 64
    add(registry, "acme", files={"a": own, "b": shared})
    add(registry, "globex", files={"b": shared})
    registry.archive_tenant("globex")
    assert registry.unnamed_files([own, shared, unknown]) == {unknown}
    registry.delete_adapter("acme", "support")
    assert registry.unnamed_files([own, shared]) == {own}
    assert registry.unnamed_files([]) == set()


def test_a_released_version_leaves_neither_name_nor_audit_nor_a_used_number(registry: Registry) -> None:
    before = (registry.snapshot().versions, registry.snapshot().adapters, actions(registry))
    for _ in range(2):
        registry.release_version(registry.reserve_version("acme", "support"))
        assert (registry.snapshot().versions, registry.snapshot().adapters, actions(registry)) == before
        assert registry.versions("acme", "support", include_retired=True) == []
        with pytest.raises(AdapterNotFoundError):
            registry.version("acme", "support", 1)
        with pytest.raises(VersionNotFoundError):
            registry.version("acme", "support", 1, include_retired=True)
    assert add(registry).version == 1


def test_a_released_version_leaves_a_name_that_has_others(registry: Registry) -> None:
    ready = add_ready(registry)
    registry.share("acme", "support", "globex")
    before = registry.adapter("acme", "support")
    registry.release_version(registry.reserve_version("acme", "support"))
    assert registry.adapter("acme", "support") == before
    assert registry.versions("acme", "support") == [ready]
    assert add(registry).version == 2


def test_numbers_of_released_versions_are_given_again_from_the_lowest(registry: Registry) -> None:
    add(registry)
    reserved = [registry.reserve_version("acme", "support") for _ in range(3)]
    assert [version.version for version in reserved] == [2, 3, 4]
    registry.release_version(reserved[1])
    assert registry.reserve_version("acme", "support").version == 5  # 4 may become a version yet
    for version in (reserved[2], registry.version("acme", "support", 5), reserved[0]):
        registry.release_version(version)
    assert [add(registry).version for _ in range(4)] == [2, 3, 4, 5]


def test_the_same_content_takes_the_quarantined_version_back_and_is_the_one_there_is(registry: Registry) -> None:
    digest = next(_digests)
    first = add_ready(registry, digest=digest)
    fields: dict[str, Any] = {"digest": digest, "size_bytes": 1, "rank": 8, "alpha": 16, "files": FILES}
    reserved = registry.reserve_version("acme", "support")
    assert registry.add_version("acme", "support", reserved=reserved, **fields) == (first, False)
    assert registry.versions("acme", "support") == [first]
    assert add(registry).version == 2


def test_content_for_a_version_that_is_no_longer_reserved_is_refused(registry: Registry) -> None:
    lost = registry.reserve_version("acme", "support")
    registry.release_version(lost)
    taken = registry.reserve_version("acme", "support")
    assert taken.version == lost.version
    with pytest.raises(ConflictError, match="'support@1' was deleted while it was being checked"):
        add(registry, reserved=lost)
    registry.release_version(lost)
    assert registry.versions("acme", "support") == [taken]
    version = add(registry, reserved=taken)
    registry.release_version(taken)
    assert registry.versions("acme", "support") == [version]


@pytest.mark.parametrize("status", [VersionStatus.VALIDATED, VersionStatus.PROBING, VersionStatus.READY])
def test_no_status_can_be_set_on_a_quarantined_version(registry: Registry, status: VersionStatus) -> None:
    registry.reserve_version("acme", "support")
    with pytest.raises(ConflictError, match=f"is quarantined and cannot become {status}"):
        registry.set_status("acme", "support", 1, status)
    with pytest.raises(ConflictError, match="is quarantined; only a ready version"):
        registry.promote("acme", "support", 1)


def test_deleting_a_quarantined_version_ends_its_upload(registry: Registry) -> None:
    add_ready(registry)
    registry.share("acme", "support", "globex")
    first, second = (registry.reserve_version("acme", "support") for _ in range(2))
    assert registry.delete_version("acme", "support", 2).status is VersionStatus.RETIRED
    assert registry.adapter("acme", "support").shared_with == {"globex"}
    assert {version.version for version in registry.delete_adapter("acme", "support")} == {1, 3}
    for lost in (first, second):
        with pytest.raises(ConflictError, match="was deleted"):
            add(registry, reserved=lost)
    assert registry.adapters() == []
    assert add(registry).version == 2


# Promotion, rollback, deletion


def test_promotion_moves_the_alias_and_rollback_moves_it_back(registry: Registry) -> None:
    for _ in range(3):
        add_ready(registry)
    promoted = registry.promote("acme", "support", 3, actor="alice")
    assert (promoted.production, promoted.previous) == (3, 1)
    registry.promote("acme", "support", 2)
    assert registry.rollback("acme", "support").production == 3
    assert registry.rollback("acme", "support") == registry.adapter("acme", "support")
    assert registry.adapter("acme", "support").production == 1
    with pytest.raises(ConflictError, match="no earlier production version"):
        registry.rollback("acme", "support")


def test_only_a_ready_version_can_be_promoted(registry: Registry) -> None:
    add_ready(registry)
    add(registry)
    with pytest.raises(ConflictError, match="'support@2' is validated; only a ready version"):
        registry.promote("acme", "support", 2)
    with pytest.raises(VersionNotFoundError, match="has no version 9"):
        registry.promote("acme", "support", 9)


def test_deleting_the_production_version_tells_to_promote_another_first(registry: Registry) -> None:
    add_ready(registry)
    add_ready(registry)
    with pytest.raises(ConflictError, match="Promote another version first, such as support@2"):
        registry.delete_version("acme", "support", 1)
    registry.promote("acme", "support", 2)
    registry.delete_version("acme", "support", 1)
    record = registry.adapter("acme", "support")
    assert (record.production, record.previous) == (2, None)


def test_deleting_the_only_version_deletes_the_adapter(registry: Registry) -> None:
    add_ready(registry)
    registry.delete_version("acme", "support", 1)
    with pytest.raises(AdapterNotFoundError):
        registry.adapter("acme", "support")
    assert registry.adapters() == []


def test_a_production_version_beside_unready_ones_may_be_deleted_and_the_next_ready_one_takes_over(
    registry: Registry,
) -> None:
    add_ready(registry)
    add(registry)
    registry.delete_version("acme", "support", 1)
    assert registry.adapter("acme", "support").production is None
    registry.set_status("acme", "support", 2, VersionStatus.READY)
    assert registry.adapter("acme", "support").production == 2


def test_a_deleted_version_is_out_of_sight_and_its_number_is_never_given_again(registry: Registry) -> None:
    digest = next(_digests)
    add_ready(registry)
    add_ready(registry, digest=digest)
    registry.delete_version("acme", "support", 2)
    with pytest.raises(VersionNotFoundError):
        registry.version("acme", "support", 2)
    with pytest.raises(VersionNotFoundError):
        registry.delete_version("acme", "support", 2)
    assert ("acme", "support", 2) not in registry.snapshot().versions
    assert [version.version for version in registry.versions("acme", "support")] == [1]
    assert registry.version("acme", "support", 2, include_retired=True).status is VersionStatus.RETIRED
    assert add(registry, digest=digest).version == 3
    kept = registry.versions("acme", "support", include_retired=True)
    assert [version.version for version in kept] == [1, 2, 3]


def test_a_name_that_is_used_again_after_deletion_goes_on_counting(registry: Registry) -> None:
    add_ready(registry)
    registry.share("acme", "support", "globex")
    registry.delete_adapter("acme", "support")
    with pytest.raises(AdapterNotFoundError):
        registry.versions("acme", "support")
    with pytest.raises(AdapterNotFoundError):
        registry.rollback("acme", "support")
    assert add_ready(registry).version == 2
    record = registry.adapter("acme", "support")
    assert (record.production, record.previous, record.shared_with) == (2, None, frozenset())


def test_sharing_lets_named_tenants_in_and_unsharing_puts_them_out(registry: Registry) -> None:
    add_ready(registry)
    assert registry.share("acme", "support", "globex").shared_with == {"globex"}
    assert registry.share("acme", "support", "globex").shared_with == {"globex"}
    assert registry.snapshot().adapters["acme", "support"].shared_with == {"globex"}
    assert registry.adapters("globex") == []
    assert registry.unshare("acme", "support", "globex").shared_with == frozenset()
    with pytest.raises(TenantNotFoundError):
        registry.share("acme", "support", "nobody")
    with pytest.raises(ConflictError, match="belongs to 'acme' already"):
        registry.share("acme", "support", "acme")
    assert actions(registry).count("adapter.share") == 1


# Audit, counter, snapshot


def test_every_change_is_audited_and_raises_the_counter(registry: Registry, clock: Any) -> None:
    steps: dict[str, Callable[[], Any]] = {
        "version.add": lambda: add(registry, actor="alice"),
        "version.promote": lambda: registry.set_status("acme", "support", 1, VersionStatus.READY, actor="alice"),
        "adapter.share": lambda: registry.share("acme", "support", "globex", actor="alice"),
        "adapter.unshare": lambda: registry.unshare("acme", "support", "globex", actor="alice"),
        "adapter.delete": lambda: registry.delete_adapter("acme", "support", actor="alice"),
        "key.create": lambda: registry.create_key("acme", [Scope.INFERENCE], actor="alice"),
    }
    for action, step in steps.items():
        before = registry.change_counter()
        step()
        assert registry.change_counter() > before
        entry = registry.audit(1)[0]
        assert (entry.action, entry.actor, entry.tenant, entry.time) == (action, "alice", "acme", clock.now)
    assert actions(registry, "globex") == ["tenant.create"]


def test_a_refused_change_leaves_neither_audit_nor_counter(registry: Registry) -> None:
    add_ready(registry)
    before = (registry.change_counter(), actions(registry))
    with pytest.raises(ConflictError):
        registry.rollback("acme", "support")
    with pytest.raises(ConflictError):
        registry.create_tenant("acme")
    assert (registry.change_counter(), actions(registry)) == before


@pytest.mark.parametrize("change", ["UPDATE audit SET actor = 'somebody else'", "DELETE FROM audit"])
def test_the_database_itself_keeps_the_audit_log_from_being_rewritten(
    registry: Registry, database: sa.Engine, change: str
) -> None:
    before = registry.audit()
    with pytest.raises(sa.exc.DBAPIError, match="append-only"):
        with database.begin() as connection:
            connection.execute(sa.text(change))
    assert registry.audit() == before


def test_a_snapshot_is_what_the_single_questions_answer(registry: Registry) -> None:
    for tenant in ("acme", "globex"):
        add_ready(registry, tenant)
        add(registry, tenant, "triage")
    snapshot = registry.snapshot()
    assert snapshot.counter == registry.change_counter()
    assert list(snapshot.tenants.values()) == registry.tenants()
    assert sorted(snapshot.adapters) == [(record.tenant, record.name) for record in registry.adapters()]
    for (tenant, name, number), version in snapshot.versions.items():
        assert version == registry.version(tenant, name, number)


def test_snapshots_in_a_row_are_what_a_fresh_registry_reads(registry: Registry, database: sa.Engine) -> None:
    steps: list[Callable[[], Any]] = [
        lambda: add(registry),
        lambda: registry.set_status("acme", "support", 1, VersionStatus.READY),
        lambda: add_ready(registry),
        lambda: registry.promote("acme", "support", 2),
        lambda: registry.share("acme", "support", "globex"),
        lambda: registry.delete_version("acme", "support", 1),
        lambda: registry.create_key("acme", [Scope.INFERENCE]),
        lambda: add_ready(registry, "globex", "triage"),
        lambda: registry.delete_adapter("acme", "support"),
        lambda: registry.create_tenant("initech"),
        lambda: add(registry),
    ]
    for step in steps:
        step()
        assert registry.snapshot() == Registry(database, secret=b"test secret").snapshot()


def test_a_snapshot_after_nothing_changed_is_the_same_one(registry: Registry) -> None:
    add_ready(registry)
    assert registry.snapshot() is registry.snapshot()


def test_a_snapshot_taken_after_a_backup_was_restored_forgets_the_future(
    registry: Registry, database: sa.Engine
) -> None:
    registry.create_tenant("late")
    registry.snapshot()
    with writing(database) as session:
        session.execute(sa.text("DELETE FROM tenants WHERE name = 'late'"))
        session.execute(sa.text("UPDATE change_counter SET value = 1"))
    assert set(registry.snapshot().tenants) == {"acme", "globex"}


def test_a_change_among_ten_thousand_versions_costs_a_snapshot_little(registry: Registry, database: sa.Engine) -> None:
    add_ready(registry)
    columns: dict[str, Any] = {"tenant": "acme", "adapter": "support", "status": "ready", "created_at": 1.0}
    columns |= {"rank": 8, "alpha": 16.0, "size_bytes": 1, "files": dict(FILES), "warnings": [], "faults": []}
    columns |= {"probe": {"effect": 0.4}, "serving": None, "changed": 1, "manifest": "never read here" * 1000}
    rows = [columns | {"version": number, "digest": f"many-{number}"} for number in range(2, 10_001)]
    with writing(database) as session:
        session.execute(sa.insert(VersionRow), rows)
    assert len(registry.snapshot().versions) == 10_000
    registry.promote("acme", "support", 10_000)
    started = time.process_time()
    assert registry.snapshot().adapters["acme", "support"].production == 10_000
    took_s = time.process_time() - started
    assert took_s < 0.1  # measured 4 ms; the margin is for busy machines


# Several at once


def test_versions_added_at_once_are_numbered_densely(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = [version.version for version in pool.map(lambda _: add(registry), range(40))]
    assert sorted(numbers) == list(range(1, 41))


def test_the_same_content_added_at_once_is_one_version(registry: Registry) -> None:
    digest = next(_digests)
    fields: dict[str, Any] = {"digest": digest, "size_bytes": 1, "rank": 8, "alpha": 16.0, "files": FILES}
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda _: registry.add_version("acme", "support", **fields), range(16)))
    assert {version.version for version, _ in added} == {1}
    assert [created for _, created in added].count(True) == 1


def test_the_same_content_in_several_quarantines_at_once_is_one_version(registry: Registry) -> None:
    fields: dict[str, Any] = {"digest": next(_digests), "size_bytes": 1, "rank": 8, "alpha": 16.0, "files": FILES}

    def upload(_: int) -> tuple[AdapterVersion, bool]:
        return registry.add_version("acme", "support", reserved=registry.reserve_version("acme", "support"), **fields)

    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(upload, range(16)))
    (version,) = registry.versions("acme", "support")
    assert [found for found, _ in added] == [version] * 16
    assert [created for _, created in added].count(True) == 1


def test_versions_that_become_ready_at_once_leave_one_first_production_version(registry: Registry) -> None:
    numbers = [add(registry).version for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: registry.set_status("acme", "support", number, VersionStatus.READY), numbers))
    record = registry.adapter("acme", "support")
    assert record.production in numbers
    assert record.previous is None
    assert actions(registry).count("version.promote") == 1


def test_promotions_and_deletions_at_once_leave_production_ready(registry: Registry) -> None:
    for _ in range(8):
        add_ready(registry)

    def fight(number: int) -> None:
        with suppress(ConflictError, NotFoundError):  # somebody else was first
            registry.promote("acme", "support", number)
        with suppress(ConflictError, NotFoundError):
            registry.delete_version("acme", "support", number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fight, [number % 7 + 1 for number in range(24)]))
    production = registry.adapter("acme", "support").production
    assert production is not None
    assert registry.version("acme", "support", production).status is VersionStatus.READY


@pytest.mark.slow
def test_two_processes_share_one_sqlite_file(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    code = f"""
import sys
from adapters.registry import Registry, open_database
registry = Registry(open_database({str(path)!r}), secret=b"x")
for number in range(40):
    registry.add_version("acme", "support", digest=sys.argv[1] + str(number), size_bytes=1, rank=8, alpha=16.0, files={{}})
"""
    registry = Registry(open_database(str(path)), secret=b"x")
    registry.create_tenant("acme")
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("one", "two")]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [version.version for version in registry.versions("acme", "support")] == list(range(1, 81))


# What holds after every history

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "ready", "refuse", "promote", "rollback", "delete", "reserve", "fill", "release"]),
        st.integers(1, 6),
    ),
    max_size=25,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_production_is_a_ready_version_after_any_history(
    registry: Registry, database: sa.Engine, steps: list[tuple[str, int]]
) -> None:
    name = f"any{registry.change_counter()}"
    given_out: list[int] = []
    reserved: list[AdapterVersion] = []
    for step, number in steps:
        before = {record.name: record for record in registry.adapters("acme")}.get(name)
        try:
            match step:
                case "add":
                    given_out.append(add(registry, name=name).version)
                case "ready":
                    registry.set_status("acme", name, number, VersionStatus.READY)
                case "refuse":
                    registry.set_status("acme", name, number, VersionStatus.REFUSED)
                case "promote":
                    registry.promote("acme", name, number)
                case "rollback":
                    assert before is None or registry.rollback("acme", name).production == before.previous
                case "delete":
                    registry.delete_version("acme", name, number)
                case "reserve":
                    reserved.append(registry.reserve_version("acme", name))
                case "fill" if reserved:
                    given_out.append(add(registry, name=name, reserved=reserved[number % len(reserved)]).version)
                case "release" if reserved:
                    registry.release_version(reserved[number % len(reserved)])
        except (ConflictError, NotFoundError):
            pass
        record = {record.name: record for record in registry.adapters("acme")}.get(name)
        if record is not None:
            for alias in (record.production, record.previous):
                assert alias is None or registry.version("acme", name, alias).status is VersionStatus.READY
            assert record.production != record.previous or record.production is None
            versions = registry.versions("acme", name)
            assert versions
            assert (record.production is None) == (VersionStatus.READY not in {version.status for version in versions})
            for version in versions:
                assert (version.status is VersionStatus.QUARANTINED) == (version in reserved)
                assert (version.version in given_out) == (version not in reserved)
        assert registry.snapshot() == Registry(database, secret=b"test secret").snapshot()
    assert len(set(given_out)) == len(given_out)
    if not reserved:
        assert given_out == list(range(1, len(given_out) + 1))
