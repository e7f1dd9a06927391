"""The commands, against a whole gateway that listens on loopback: registry, blobs and HTTP are real, the model is not."""

import asyncio
import json
import socket
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapters.errors import InvalidLimitError
from adapters.licences import PROMOTION, Source, judge_licences
from gateway.cli.adapters import print_licences, zip_adapter
from gateway.cli.running import curl_line, look
from gateway.client import CommandError, RefusedError
from lorikeet import app
from tests.factories import make_adapter
from tests.gateway.conftest import Gateway, listening

Run = Callable[..., Awaitable[Result]]


@pytest.fixture
async def url(gateway: Gateway) -> AsyncIterator[str]:
    async with listening(gateway.app) as address:
        yield address


@pytest.fixture
def run(url: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`lorikeet …` as the operator of this gateway would type it."""
    monkeypatch.setenv("LORIKEET_HOME", str(gateway.settings.home.root))
    monkeypatch.setenv("LORIKEET_URL", url)
    monkeypatch.delenv("LORIKEET_API_KEY", raising=False)

    async def invoke(*arguments: object) -> Result:
        result = await asyncio.to_thread(lambda: CliRunner().invoke(app, [str(argument) for argument in arguments]))
        await gateway.services.directory.refresh()  # else a moment later, by itself
        return result

    return invoke


@pytest.fixture
def adapter(gateway: Gateway, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", gateway.base)


def document(result: Result) -> Any:
    """The one JSON document on standard output."""
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


async def test_an_adapter_goes_from_folder_to_production_and_back_by_commands_alone(
    run: Run, gateway: Gateway, adapter: Path, tmp_path: Path
) -> None:
    assert document(await run("tenants", "create", "acme", "--json"))["name"] == "acme"
    first = document(await run("push", adapter, "--name", "support", "--json"))
    assert (first["adapter"], first["version"], first["status"]) == ("support", 1, "ready")
    other = make_adapter(tmp_path / "other", gateway.base, seed=7)
    second = document(await run("push", other, "--name", "support", "--json"))
    assert second["version"] == 2
    assert document(await run("adapters", "--json"))["data"][0]["production"] == 1
    forced = ("--force", "--reason", "nothing was measured")  # the gate has tests of its own
    assert document(await run("promote", "support@2", *forced, "--json"))["production"] == 2
    assert document(await run("rollback", "support", "--json"))["production"] == 1
    versions = document(await run("adapters", "support", "--json"))["data"]
    assert [version["version"] for version in versions] == [2, 1]


async def test_listings_are_tables_for_people(run: Run, adapter: Path) -> None:
    await run("tenants", "create", "acme")
    assert "support@1 is ready" in (await run("push", adapter, "--name", "support")).stdout
    for arguments, shown in (
        (("tenants", "list"), "acme"),
        (("adapters",), "support"),
        (("adapters", "support"), "support@1"),
        (("adapters", "support"), "the licences of its data are not known"),
        (("keys", "list"), "(operator)"),
        (("engine",), "echo"),
        (("status",), "is ready"),
    ):
        result = await run(*arguments)
        assert result.exit_code == 0
        assert shown in result.stdout


def test_the_licences_of_the_newest_version_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge_licences(
        [
            Source(name="llama", kind="base", licence="llama3.1"),
            Source(name="news", kind="data", licence="CC-BY-NC-4.0"),
        ],
        PROMOTION.model_copy(update={"excepted": {"news": "a contract"}}),
        name="support",
    )
    sources = [{"kind": "base", "name": "llama", "licence": "llama3.1"}]
    licences = verdict.model_dump(mode="json") | {"sources": sources}
    print_licences({"adapter": "support", "version": 2, "licences": licences})
    shown = capsys.readouterr().out
    assert "Licences of support@2: base llama: llama3.1" in shown
    assert "warn news (CC-BY-NC-4.0): no commercial use (excepted: a contract)" in shown
    assert "warn llama (llama3.1): begin the model's name" in shown
    assert (
        "carries on: show the notice the licence asks for where the model is made available: Built with Llama" in shown
    )


async def test_a_refused_upload_shows_every_fault_with_its_fix(run: Run, adapter: Path) -> None:
    await run("tenants", "create", "acme")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "bias": "all"}))
    result = await run("push", adapter, "--name", "support")
    assert isinstance(result.exception, RefusedError)
    assert result.exception.status == 422
    for fault in result.exception.faults:
        assert fault.code in result.stderr
    as_json = await run("push", adapter, "--name", "support", "--json")
    assert as_json.exit_code != 0
    assert {fault["code"] for fault in json.loads(as_json.stdout)["error"]["faults"]} == {
        fault.code for fault in result.exception.faults
    }


async def test_a_key_is_shown_once_and_ends_when_it_is_revoked(run: Run) -> None:
    await run("tenants", "create", "acme")
    created = document(
        await run("keys", "create", "--tenant", "acme", "--scope", "inference", "--scope", "adapters:write", "--json")
    )
    assert created["key"].startswith("lk-")
    assert created["scopes"] == ["adapters:write", "inference"]
    listed = await run("keys", "list", "--json")
    assert created["key"] not in listed.stdout
    assert created["id"] in {key["id"] for key in document(listed)["data"]}
    assert document(await run("keys", "revoke", created["id"], "--json"))["revoked_at"] is not None
    refused = await run("adapters", "--key", created["key"])
    assert isinstance(refused.exception, RefusedError)
    assert refused.exception.status == 401


async def test_a_rotated_key_lives_beside_the_old_one_for_a_while(run: Run) -> None:
    await run("tenants", "create", "acme")
    old = document(await run("keys", "create", "--tenant", "acme", "--json"))
    new = document(await run("keys", "rotate", old["id"], "--overlap-hours", "2", "--json"))
    assert (new["tenant"], new["scopes"], new["account"]) == ("acme", old["scopes"], old["account"])
    for key in (old, new):
        assert (await run("adapters", "--key", key["key"])).exit_code == 0
    listed = {key["id"]: key for key in document(await run("keys", "list", "--tenant", "acme", "--json"))["data"]}
    assert 7000 < listed[old["id"]]["expires_at"] - new["created_at"] <= 7200
    assert document(await run("keys", "rotate", new["id"], "--overlap-hours", "0", "--json"))
    assert isinstance((await run("adapters", "--key", new["key"])).exception, RefusedError)


async def test_limits_are_set_listed_and_taken_away(run: Run) -> None:
    created = document(await run("tenants", "create", "acme", "--max-in-flight", "3", "--json"))
    assert created["archived_at"] is None
    key = document(await run("keys", "create", "--tenant", "acme", "--json"))
    first = document(await run("limits", "set", "acme", "--requests-per-minute", "600", "--json"))
    assert (first["max_in_flight"], first["requests_per_minute"]) == (3, 600)
    await run("limits", "set", "acme", "--key", key["id"], "--monthly-budget", "12.5")
    listed = document(await run("limits", "list", "acme", "--json"))["data"]
    assert [(one["of"], one["name"], one["monthly_budget"]) for one in listed] == [
        ("tenant", None, None),
        ("key", key["id"], 12.5),
    ]
    assert "requests per minute 600" in (await run("limits", "list")).stdout
    for change in ("--requests-per-minute", "--max-in-flight"):
        await run("limits", "set", "acme", change, "none")
    assert len(document(await run("limits", "list", "--json"))["data"]) == 1
    assert (await run("limits", "set", "acme")).exit_code == 2
    assert (await run("limits", "set", "acme", "--requests-per-minute", "many")).exit_code == 2
    assert isinstance((await run("limits", "set", "acme", "--requests-per-minute", "0")).exception, InvalidLimitError)


async def test_the_audit_log_tells_who_did_what_and_an_archived_tenant_is_gone(run: Run) -> None:
    await run("tenants", "create", "acme")
    await run("limits", "set", "acme", "--max-adapters", "2")
    assert document(await run("tenants", "archive", "acme", "--json"))["archived_at"] is not None
    assert document(await run("tenants", "list", "--json"))["data"] == []
    entries = document(await run("audit", "--tenant", "acme", "--json"))["data"]
    assert [entry["action"] for entry in entries] == ["tenant.archive", "limits.set", "tenant.create"]
    assert entries[1]["details"] == {"max_adapters": 2}
    assert "limits.set" in (await run("audit", "--limit", "2")).stdout


async def test_a_tenants_own_key_needs_no_tenant_named(run: Run, gateway: Gateway, adapter: Path) -> None:
    key = await gateway.key("acme")
    await gateway.key("globex")
    document(await run("push", adapter, "--name", "support", "--key", key, "--json"))
    assert document(await run("adapters", "--key", key, "--json"))["data"][0]["tenant"] == "acme"


async def test_with_several_tenants_the_operator_must_say_which(run: Run, gateway: Gateway) -> None:
    await gateway.key("acme")
    await gateway.key("globex")
    result = await run("adapters")
    assert isinstance(result.exception, CommandError)
    assert "acme, globex" in str(result.exception)
    assert document(await run("adapters", "--tenant", "globex", "--json"))["data"] == []


async def test_an_operators_key_is_never_made_by_leaving_something_out(run: Run) -> None:
    assert (await run("keys", "create")).exit_code == 2
    assert (await run("keys", "create", "--scope", "inference")).exit_code == 2
    assert (await run("keys", "create", "--tenant", "acme", "--scope", "admin")).exit_code == 2


async def test_promote_wants_a_version(run: Run) -> None:
    assert (await run("promote", "support")).exit_code == 2


async def test_the_status_document_has_exactly_the_promised_fields(run: Run) -> None:
    found = document(await run("status", "--json"))
    assert list(found) == ["url", "ready", "base_model", "engines"]
    assert [list(engine) for engine in found["engines"]] == [["id", "state", "slots", "resident"]]


async def test_an_engine_that_is_not_ready_makes_status_exit_with_one(run: Run, gateway: Gateway, url: str) -> None:
    gateway.host.state = "restarting"
    assert (await run("status")).exit_code == 1
    assert "restarting" in await asyncio.to_thread(look, url)
    gateway.host.state = "ready"
    assert await asyncio.to_thread(look, url) == "Ready"


def test_the_first_key_is_shown_also_when_the_start_fails(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("LORIKEET_HOME", str(tmp_path))
        monkeypatch.setenv("LORIKEET_BASE", str(tiny_base))
        monkeypatch.setenv("LORIKEET_ENGINE", "test")
        monkeypatch.setenv("LORIKEET_PORT", str(taken.getsockname()[1]))
        result = CliRunner().invoke(app, ["up", "--json"])
    assert isinstance(result.exception, CommandError)
    assert "Cannot listen" in str(result.exception)
    assert result.stdout == ""
    assert "lk-" in result.stderr


def test_only_the_adapters_own_files_are_sent_unless_one_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "README.md"):
        (folder / name).write_bytes(b"x")
    assert zipfile.ZipFile(zip_adapter(folder, tmp_path / "a.zip")).namelist() == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    (folder / "adapter_model.safetensors").unlink()
    assert "optimizer.pt" in zipfile.ZipFile(zip_adapter(folder, tmp_path / "b.zip")).namelist()


def test_an_empty_folder_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no files"):
        zip_adapter(tmp_path, tmp_path.parent / "empty.zip")


def test_the_curl_line_holds_the_key_when_there_is_one_to_show() -> None:
    assert "'Authorization: Bearer lk-x'" in curl_line("http://h", "lk-x", "M")
    assert '"Authorization: Bearer $LORIKEET_API_KEY"' in curl_line("http://h", None, "M")
