"""Merged forms and deployments in the registry, on SQLite and on Postgres."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.errors import ConflictError, DeploymentNotFoundError, InvalidValueError, VersionNotFoundError
from adapters.registry import AdapterVersion, MergedForm, Registry
from tests.adapters.test_registry import actions, add, add_ready

REPORT = {"adapter_digest": "a", "rungs": []}


def add_form(registry: Registry, version: AdapterVersion, digest: str = "e" * 64, **changes: object) -> MergedForm:
    fields = {"digest": digest, "scheme": "bfloat16", "size_bytes": 7, "report": REPORT} | changes
    return registry.add_form(version.tenant, version.adapter, version.version, **fields)  # type: ignore[arg-type]


def test_a_form_is_kept_with_its_report_and_adding_it_twice_is_adding_it_once(registry: Registry) -> None:
    version = add_ready(registry)
    form = add_form(registry, version, forced="a trial", licences={"level": "block"})
    assert add_form(registry, version, scheme="other") == form
    assert registry.forms("acme", "support", 1) == [form]
    assert (form.report, form.licences, form.forced) == (REPORT, {"level": "block"}, "a trial")
    assert form.folder == "acme/support@1-eeeeeeee"
    assert actions(registry, "acme").count("form.add") == 1


def test_only_a_ready_version_has_a_merged_form(registry: Registry) -> None:
    version = add(registry)
    with pytest.raises(ConflictError, match="only a ready version"):
        add_form(registry, version)
    with pytest.raises(VersionNotFoundError):
        registry.forms("acme", "support", 2)


def test_a_deployment_reaches_the_snapshot_and_leaves_it(registry: Registry) -> None:
    version = add_ready(registry)
    form = add_form(registry, version)
    before = registry.snapshot()
    wanted = registry.deploy("acme", "support", 1, digest=form.digest, share=0.25, profile={"name": "mine"})
    after = registry.snapshot()
    assert (before.deployments, after.deployments) == ({}, {("acme", "support", 1): wanted})
    assert (wanted.share, wanted.scheme, wanted.profile) == (0.25, "bfloat16", {"name": "mine"})
    assert wanted.engine_id.startswith("merged-")
    registry.undeploy("acme", "support", 1)
    assert registry.snapshot().deployments == {}
    assert registry.forms("acme", "support", 1) == [form]
    with pytest.raises(DeploymentNotFoundError, match="lorikeet deploy support@1"):
        registry.undeploy("acme", "support", 1)
    assert [name for name in reversed(actions(registry)) if "deploy" in name] == ["version.deploy", "version.undeploy"]


def test_deploying_again_changes_the_share_and_nothing_else(registry: Registry) -> None:
    version = add_ready(registry)
    form, other = add_form(registry, version), add_form(registry, version, "f" * 64)
    registry.deploy("acme", "support", 1, digest=form.digest)
    assert registry.deploy("acme", "support", 1, digest=form.digest, share=0.5).share == 0.5
    assert registry.snapshot().deployments["acme", "support", 1].share == 0.5
    refused: list[dict[str, Any]] = [{"digest": other.digest}, {"digest": form.digest, "profile": {"name": "mine"}}]
    for changes in refused:
        with pytest.raises(ConflictError, match="lorikeet undeploy support@1"):
            registry.deploy("acme", "support", 1, **changes)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_nought_and_one(registry: Registry, share: float) -> None:
    form = add_form(registry, add_ready(registry))
    with pytest.raises(InvalidValueError, match="from 0 to 1"):
        registry.deploy("acme", "support", 1, digest=form.digest, share=share)


def test_what_has_no_such_form_cannot_be_deployed(registry: Registry) -> None:
    add_ready(registry)
    with pytest.raises(ConflictError, match="no merged form"):
        registry.deploy("acme", "support", 1, digest="f" * 64)


def test_a_version_with_an_engine_of_its_own_cannot_be_deleted_nor_its_form(registry: Registry) -> None:
    version = add_ready(registry)
    add_ready(registry)
    registry.promote("acme", "support", 2)
    form, other = add_form(registry, version), add_form(registry, version, "f" * 64)
    registry.deploy("acme", "support", 1, digest=form.digest)
    refused: list[Callable[[], object]] = [
        lambda: registry.delete_version("acme", "support", 1),
        lambda: registry.delete_adapter("acme", "support"),
        lambda: registry.remove_form(form),
    ]
    for refuse in refused:
        with pytest.raises(ConflictError, match="Take it down first: lorikeet undeploy support@1"):
            refuse()
    registry.remove_form(other)
    registry.undeploy("acme", "support", 1)
    registry.delete_version("acme", "support", 1)


def test_a_deleted_version_takes_its_forms_along(registry: Registry, database: sa.Engine) -> None:
    add_form(registry, add_ready(registry))
    registry.delete_adapter("acme", "support")
    with database.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM merged_forms")).scalar() == 0


def test_aliases_that_move_leave_deployments_alone(registry: Registry) -> None:
    form = add_form(registry, add_ready(registry))
    add_ready(registry)
    wanted = registry.deploy("acme", "support", 1, digest=form.digest)
    registry.promote("acme", "support", 2)
    registry.rollback("acme", "support")
    assert registry.snapshot().deployments == {wanted.key: wanted}


def test_an_archived_tenants_deployments_are_wanted_no_longer(registry: Registry) -> None:
    form = add_form(registry, add_ready(registry))
    registry.deploy("acme", "support", 1, digest=form.digest)
    registry.archive_tenant("acme")
    assert registry.snapshot().deployments == {}
