"""Administration with the official client: a tenant is a project."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from adapters.registry import Scope
from tests.factories import make_base
from tests.gateway.conftest import Gateway, listening, running_gateway

pytestmark = pytest.mark.slow  # the official client against a whole gateway


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path / "home", make_base(tmp_path / "tiny")) as running:
        yield running


@pytest.fixture
async def url(gateway: Gateway) -> AsyncIterator[str]:
    async with listening(gateway.app) as address:
        yield f"{address}/v1"


@pytest.fixture
async def admin(gateway: Gateway, url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    key = gateway.settings.home.operator_key.read_text().strip()
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", admin_api_key=key, max_retries=0) as made:
        yield made


async def models(url: str, key: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        return [model.id async for model in client.models.list()]


async def test_projects_are_created_listed_page_by_page_changed_and_archived(admin: openai.AsyncOpenAI) -> None:
    projects = admin.admin.organization.projects
    for name in ("acme", "globex", "initech"):
        made = await projects.create(name=name)
        assert (made.id, made.name, made.status, made.object) == (name, name, "active", "organization.project")
    assert [project.id async for project in projects.list(limit=2)] == ["acme", "globex", "initech"]
    first = await projects.list(limit=2)
    assert (first.has_more, [project.id for project in first.data]) == (True, ["acme", "globex"])
    changed = await projects.update("acme", extra_body={"weight": 2.5})
    assert changed.model_extra is not None
    assert changed.model_extra["weight"] == 2.5
    archived = await projects.archive("globex")
    assert archived.status == "archived"
    assert archived.archived_at == pytest.approx(time.time(), abs=60)
    assert [project.id async for project in projects.list()] == ["acme", "initech"]
    assert [project.id async for project in projects.list(include_archived=True)] == ["acme", "globex", "initech"]
    assert (await projects.retrieve("globex")).archived_at == archived.archived_at


async def test_what_cannot_be_done_with_a_project_is_a_clear_error(admin: openai.AsyncOpenAI) -> None:
    projects = admin.admin.organization.projects
    await projects.create(name="acme")
    with pytest.raises(openai.ConflictError):
        await projects.create(name="acme")
    with pytest.raises(openai.BadRequestError) as wrong:
        await projects.create(name="No Such Name")
    assert wrong.value.code == "invalid_name"
    with pytest.raises(openai.BadRequestError) as renamed:
        await projects.update("acme", name="other")
    assert renamed.value.param == "name"
    with pytest.raises(openai.NotFoundError) as absent:
        await projects.retrieve("nobody")
    assert absent.value.code == "project_not_found"
    with pytest.raises(openai.BadRequestError) as lost:
        await projects.list(after="nobody")
    assert lost.value.param == "after"
    await projects.archive("acme")
    with pytest.raises(openai.ConflictError):
        await projects.service_accounts.create("acme", name="ci")


async def test_a_service_accounts_key_is_shown_once_and_works_until_the_account_goes(
    admin: openai.AsyncOpenAI, url: str
) -> None:
    projects = admin.admin.organization.projects
    await projects.create(name="acme")
    made = await projects.service_accounts.create("acme", name="ci", expires_in_seconds=3600)
    assert made.api_key is not None
    assert made.api_key.value.startswith("lk-")
    assert made.api_key.expires_at == pytest.approx(time.time() + 3600, abs=60)
    assert await models(url, made.api_key.value)
    listed = [account async for account in projects.service_accounts.list("acme")]
    assert [(account.id, account.name, account.role) for account in listed] == [(made.id, "ci", "member")]
    assert (await projects.service_accounts.retrieve(made.id, project_id="acme")).name == "ci"
    raw = await projects.service_accounts.with_raw_response.list("acme")
    assert made.api_key.value not in raw.text
    assert (await projects.service_accounts.delete(made.id, project_id="acme")).deleted
    assert [account async for account in projects.service_accounts.list("acme")] == []
    with pytest.raises(openai.AuthenticationError):
        await models(url, made.api_key.value)


async def test_api_keys_are_listed_without_the_key_and_deleted(
    admin: openai.AsyncOpenAI, gateway: Gateway, url: str
) -> None:
    keys = admin.admin.organization.projects.api_keys
    plaintext = await gateway.key("acme")
    await gateway.key("globex")
    (key,) = [key async for key in keys.list("acme")]
    assert key.redacted_value == f"lk-…{plaintext[-4:]}"
    assert key.owner.service_account is not None
    assert key.owner_project_access == "active"
    assert (await keys.retrieve(key.id, project_id="acme")).id == key.id
    for project in ("globex", "nobody"):
        with pytest.raises(openai.NotFoundError):
            await keys.delete(key.id, project_id=project)
    assert await models(url, plaintext)
    assert (await keys.delete(key.id, project_id="acme")).deleted
    with pytest.raises(openai.AuthenticationError):
        await models(url, plaintext)
    assert [key async for key in keys.list("acme")] == []


async def test_a_key_is_rotated_within_its_account(admin: openai.AsyncOpenAI, gateway: Gateway, url: str) -> None:
    projects = admin.admin.organization.projects
    await projects.create(name="acme")
    account = await projects.service_accounts.create("acme", name="ci")
    assert account.api_key is not None
    path = f"/v1/organization/projects/acme/api_keys/{account.api_key.id}/rotate"
    async with gateway.operator() as operator:
        new = (await operator.post(path, json={"overlap_seconds": 60})).json()
        again = await operator.post(path, json={})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert await models(url, new["value"])
    assert await models(url, account.api_key.value)
    keys = [key async for key in projects.api_keys.list("acme")]
    assert {key.owner.service_account.id for key in keys if key.owner.service_account} == {account.id}
    assert keys[0].expires_at == pytest.approx(time.time() + 60, abs=30)
    assert keys[1].expires_at is None


async def test_rate_limits_are_set_and_listed(admin: openai.AsyncOpenAI, gateway: Gateway, url: str) -> None:
    limits = admin.admin.organization.projects.rate_limits
    key = await gateway.key("acme")
    (project, own) = [limit async for limit in limits.list_rate_limits("acme")]
    assert (project.id, project.model) == ("rl-project", "*")
    assert project.to_dict()["max_requests_per_1_minute"] is None
    changed = await limits.update_rate_limit(
        "rl-project", project_id="acme", max_requests_per_1_minute=2, max_tokens_per_1_minute=10_000
    )
    assert (changed.max_requests_per_1_minute, changed.max_tokens_per_1_minute) == (2, 10_000)
    await limits.update_rate_limit(own.id, project_id="acme", extra_body={"max_in_flight": 3, "monthly_budget": 9.5})
    found = {limit.id: limit async for limit in limits.list_rate_limits("acme")}
    assert found["rl-project"].max_requests_per_1_minute == 2
    assert (found[own.id].model_extra or {})["monthly_budget"] == 9.5
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as caller:
        for _ in range(2):
            await caller.completions.create(model=gateway.services.base.name, prompt="Hi", max_tokens=4)
        with pytest.raises(openai.RateLimitError):
            await caller.completions.create(model=gateway.services.base.name, prompt="Hi", max_tokens=4)
        await limits.update_rate_limit("rl-project", project_id="acme", extra_body={"max_requests_per_1_minute": None})
        await caller.completions.create(model=gateway.services.base.name, prompt="Hi", max_tokens=4)
    for limit, body in (
        ("rl-nothing", {}),
        ("rl-project", {"max_requests_per_1_minute": 0}),
        ("rl-project", {"max_images_per_1_minute": 5}),
        (own.id, {"max_adapters": 5}),
    ):
        with pytest.raises(openai.BadRequestError):
            await limits.update_rate_limit(limit, project_id="acme", extra_body=body)
    for limit in ("rl-adapter-nothing", "rl-key-nothing"):
        with pytest.raises(openai.NotFoundError):
            await limits.update_rate_limit(limit, project_id="acme", max_requests_per_1_minute=5)


async def test_admin_keys_come_and_go(admin: openai.AsyncOpenAI, url: str) -> None:
    keys = admin.admin.organization.admin_api_keys
    made = await keys.create(name="terraform", expires_in_seconds=3600)
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", admin_api_key=made.value, max_retries=0) as other:
        await other.admin.organization.projects.create(name="acme")
        assert [key.name async for key in keys.list(order="desc")] == ["terraform", "operator on this machine"]
        assert (await keys.retrieve(made.id)).redacted_value == f"lk-…{made.value[-4:]}"
        assert (await keys.delete(made.id)).deleted
        with pytest.raises(openai.AuthenticationError):
            await other.admin.organization.projects.create(name="globex")
    with pytest.raises(openai.NotFoundError):
        await keys.retrieve(made.id)


async def test_every_act_is_in_the_audit_log(admin: openai.AsyncOpenAI) -> None:
    organization = admin.admin.organization
    await organization.projects.create(name="acme")
    await organization.projects.create(name="globex")
    account = await organization.projects.service_accounts.create("acme", name="ci")
    assert account.api_key is not None
    await organization.projects.rate_limits.update_rate_limit(
        "rl-project", project_id="acme", max_requests_per_1_minute=5
    )
    await organization.projects.service_accounts.delete(account.id, project_id="acme")
    await organization.projects.archive("acme")
    acme = [entry async for entry in organization.audit_logs.list(project_ids=["acme"], limit=2)]
    assert [entry.type for entry in acme] == [
        "project.archived",
        "api_key.deleted",
        "rate_limit.updated",
        "api_key.created",
        "project.created",
    ]
    assert acme[2].rate_limit_updated is not None
    assert acme[2].rate_limit_updated.changes_requested is not None
    assert acme[2].actor is not None
    assert acme[2].actor.type == "api_key"
    assert acme[3].api_key_created is not None
    assert acme[3].api_key_created.id == account.api_key.id
    created = await organization.audit_logs.list(event_types=["project.created"])
    assert [entry.project_created.id for entry in created.data if entry.project_created] == ["globex", "acme"]
    newer = await organization.audit_logs.list(before=acme[2].id, limit=1, project_ids=["acme"])
    assert ([entry.id for entry in newer.data], newer.has_more) == ([acme[1].id], True)
    assert (await organization.audit_logs.list(effective_at={"gt": int(time.time()) + 60})).data == []
    by_key = await organization.audit_logs.list(resource_ids=[account.api_key.id], effective_at={"gte": 1})
    assert [entry.type for entry in by_key.data] == ["api_key.deleted", "api_key.created"]
    with pytest.raises(openai.BadRequestError):
        await organization.audit_logs.list(after="nothing")


async def test_only_operators_may_look(gateway: Gateway, url: str) -> None:
    key = await gateway.key("acme", frozenset(Scope) - {Scope.ADMIN})
    async with openai.AsyncOpenAI(base_url=url, api_key=key, admin_api_key=key, max_retries=0) as tenant:
        organization = tenant.admin.organization
        for ask in (
            organization.projects.list,
            organization.audit_logs.list,
            organization.admin_api_keys.list,
        ):
            with pytest.raises(openai.PermissionDeniedError):
                await ask()
        with pytest.raises(openai.PermissionDeniedError):
            await organization.projects.archive("acme")
    async with openai.AsyncOpenAI(base_url=url, api_key="x", admin_api_key="lk-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.admin.organization.projects.create(name="mine")
