import pytest

from adapters.errors import AdapterNotFoundError
from adapters.registry import AdapterRecord, AdapterVersion, Snapshot, VersionStatus
from gateway.resolve import production_versions, resolve

BASE = "org/base-model"


def version(tenant: str, name: str, number: int, status: VersionStatus = VersionStatus.READY) -> AdapterVersion:
    base = "c" * 64 if name == "other-base" else "b" * 64
    return AdapterVersion(tenant, name, number, f"{number:064x}", status, float(number), 8, 16, 100, {}, base)


def snapshot() -> Snapshot:
    records = [
        AdapterRecord("acme", "support", 0.0, production=2, previous=1, shared_with=frozenset({"globex"})),
        AdapterRecord("acme", "secret", 0.0, production=1, previous=None, shared_with=frozenset()),
        AdapterRecord("globex", "support", 0.0, production=1, previous=None, shared_with=frozenset()),
        AdapterRecord("globex", "other-base", 0.0, production=1, previous=None, shared_with=frozenset()),
        AdapterRecord("globex", "unready", 0.0, production=None, previous=None, shared_with=frozenset()),
    ]
    versions = [
        version("acme", "support", 1),
        version("acme", "support", 2),
        version("acme", "support", 3, VersionStatus.PROBING),
        version("acme", "secret", 1),
        version("globex", "support", 1),
        version("globex", "other-base", 1),
        version("globex", "unready", 1, VersionStatus.REFUSED),
    ]
    return Snapshot(
        1,
        {},
        {},
        {(record.tenant, record.name): record for record in records},
        {(one.tenant, one.adapter, one.version): one for one in versions},
    )


def resolved(model: str, tenant: str = "acme") -> tuple[str, str | None]:
    target = resolve(model, tenant=tenant, snapshot=snapshot(), base="b" * 64, base_names=[BASE, "base-model"])
    return target.label, target.engine_name


def test_a_name_is_its_production_version() -> None:
    assert resolved("support") == ("support@2", "acme/support@2-00000000")


def test_a_pinned_version_is_itself() -> None:
    assert resolved("support@1")[0] == "support@1"


def test_two_tenants_may_use_one_name_for_their_own() -> None:
    assert resolved("support", "globex")[1] == "globex/support@1-00000000"


def test_a_shared_adapter_is_named_with_its_owner() -> None:
    assert resolved("acme/support", "globex") == ("acme/support@2", "acme/support@2-00000000")


def test_the_base_answers_to_its_names() -> None:
    assert resolved(BASE) == (BASE, None)
    assert resolved("base-model")[1] is None


@pytest.mark.parametrize(
    "model",
    [
        "acme/secret",  # another tenant's, not shared
        "acme/absent",
        "unready",  # nothing of it is ready
        "unready@1",
        "other-base",  # made for a base that is not served here
        "acme/support@3",  # still probing
        "support@9",
        "nowhere/support",
        "../support",
        "acme/support@1-00000000",  # an engine's name is nobody's to say
        "/etc/passwd",
        "support@01",
        "",
        "SUPPORT",
        "a" * 300,
    ],
)
def test_anything_else_is_the_same_error_and_never_the_base(model: str) -> None:
    with pytest.raises(AdapterNotFoundError) as missing:
        resolved(model, "globex")
    assert str(missing.value) == f"The model '{model}' does not exist or you do not have access to it."


def test_engines_should_hold_what_aliases_point_at_newest_first() -> None:
    assert [one.engine_name for one in production_versions(snapshot(), "b" * 64)] == [
        "acme/support@2-00000000",
        "acme/secret@1-00000000",
        "globex/support@1-00000000",
    ]
