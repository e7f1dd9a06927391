"""`lorikeet deploy`, `undeploy`, `deployments` and `choose`, against a whole gateway on stand-in engines."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapters.ladder import Divergence, Rung, add_rung
from adapters.registry import AdapterVersion
from gateway.errors import EngineStartError
from lorikeet import app
from tests.factories import make_base
from tests.gateway.conftest import Gateway, listening
from tests.gateway.test_cli import Run, document
from tests.gateway.test_deployments import ADAPTER, ask
from tests.gateway.test_generation import publisher


@pytest.fixture
async def run(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Run]:
    """`lorikeet …` as the operator of this gateway would type it, on its machine."""
    monkeypatch.setenv("LORIKEET_HOME", str(gateway.settings.home.root))
    monkeypatch.setenv("LORIKEET_BASE", str(gateway.base))
    monkeypatch.delenv("LORIKEET_API_KEY", raising=False)

    async def invoke(*arguments: object) -> Result:
        result = await asyncio.to_thread(lambda: CliRunner().invoke(app, [str(argument) for argument in arguments]))
        await gateway.services.directory.refresh()
        return result

    async with listening(gateway.app) as url:
        monkeypatch.setenv("LORIKEET_URL", url)
        yield invoke


@pytest.fixture
async def version(gateway: Gateway, tmp_path: Path) -> AdapterVersion:
    await publisher(gateway, tmp_path)("support", text=ADAPTER)
    return gateway.services.directory.snapshot.versions["acme", "support", 1]


def make_merged(folder: Path, version: AdapterVersion, gateway: Gateway, *, text: str = "I am merged.") -> Path:
    """What `lorikeet merge` leaves, with what the stand-in engine is to say."""
    make_base(folder, seed=5)
    base = gateway.services.base.fingerprint.weights_digest
    report = {"adapter_digest": version.digest, "base_weights_digest": base, "dtype": "bfloat16"}
    (folder / "merge-report.json").write_text(json.dumps(report))
    add_rung(folder, Rung(name="saved", dtype="bfloat16", by="x", goldens=Divergence(0.1, 0.01, 1.0)))
    (folder / "echo.txt").write_text(text)
    return folder


def stored(gateway: Gateway) -> list[str]:
    return sorted(path.name for path in gateway.settings.home.merged.glob("*/*"))


async def test_a_version_gets_an_engine_another_share_and_loses_it_by_commands_alone(
    run: Run, gateway: Gateway, version: AdapterVersion, tmp_path: Path
) -> None:
    source = make_merged(tmp_path / "merged", version, gateway)
    found = document(await run("deploy", "support@1", "--merged", "--from", source, "--json"))
    assert (found["id"], found["state"], found["share"], found["scheme"]) == ("support@1", "ready", 1.0, "bfloat16")
    async with await gateway.client() as client:
        assert await ask(client) == ("I am merged.", "merged")
    shown = await run("deploy", "acme/support", "--merged", "--share", "0.1")
    assert "10% of its requests" in shown.stdout
    (listed,) = document(await run("deployments", "--json"))["data"]
    assert (listed["share"], listed["requests"]["merged"]) == (0.1, 1)
    table = (await run("deployments")).stdout
    assert ("acme/suppo" in table, "10%" in table) == (True, True)
    assert "support@1" in (await run("engine")).stdout
    assert document(await run("undeploy", "support@1", "--json"))["files_deleted"] is False
    assert len(stored(gateway)) == 1
    document(await run("deploy", "support@1", "--merged", "--json"))  # from what is stored: nothing is merged
    document(await run("undeploy", "support@1", "--delete", "--json"))
    assert stored(gateway) == []
    assert gateway.services.registry.forms("acme", "support", 1) == []
    assert "No version has an engine" in (await run("deployments")).stdout


async def test_what_does_not_start_says_why_and_leaves_nothing_running(
    run: Run, gateway: Gateway, version: AdapterVersion, tmp_path: Path
) -> None:
    def refuse(*_: object) -> Any:
        raise EngineStartError("There is no room on the device.")

    gateway.services.deployments._open = refuse
    source = make_merged(tmp_path / "merged", version, gateway)
    failed = await run("deploy", "support@1", "--merged", "--from", source)
    assert (failed.exit_code, "no room on the device" in str(failed.exception)) == (1, True)
    assert gateway.services.directory.snapshot.deployments == {}
    async with await gateway.client() as client:
        assert await ask(client) == (ADAPTER, None)


async def test_what_cannot_be_done_is_told_in_a_line(
    run: Run, gateway: Gateway, version: AdapterVersion, tmp_path: Path
) -> None:
    source = str(make_merged(tmp_path / "merged", version, gateway))
    refused = [
        (("deploy", "support@2", "--merged"), "no version 2"),
        (("deploy", "nobody", "--merged"), "does not exist"),
        (("deploy", "a/b/c", "--merged"), "such as support@3"),
        (("deploy", "support@1", "--merged", "--from", source, "--profile", "nothing"), "no engine profile 'nothing'"),
        (("deploy", "support@1", "--merged", "--force"), "belong together"),
        (("undeploy", "support@1"), "no engine of its own"),
    ]
    for arguments, said in refused:
        failed = await run(*arguments)
        assert failed.exit_code in (1, 2)
        assert said in f"{failed.exception} {failed.output}"


async def test_a_folder_that_is_another_versions_is_refused(
    run: Run, gateway: Gateway, version: AdapterVersion, tmp_path: Path
) -> None:
    source = make_merged(tmp_path / "merged", version, gateway)
    report = json.loads((source / "merge-report.json").read_text()) | {"adapter_digest": "f" * 64}
    (source / "merge-report.json").write_text(json.dumps(report))
    failed = await run("deploy", "support@1", "--merged", "--from", source)
    assert "merged from adapter content" in str(failed.exception)
    assert stored(gateway) == []


@pytest.mark.slow
async def test_choosing_measures_both_forms_and_takes_down_what_it_put_up(
    run: Run, gateway: Gateway, version: AdapterVersion, tmp_path: Path
) -> None:
    source = make_merged(tmp_path / "merged", version, gateway)
    document(await run("deploy", "support@1", "--merged", "--from", source, "--json"))
    document(await run("undeploy", "support@1", "--json"))
    chosen = await run("choose", "support@1", "--seconds", "4", "--rounds", "2", "--concurrency", "2", "--json")
    found = document(chosen)
    assert set(found["forms"]) == {"adapter", "merged"}
    for form in found["forms"].values():
        assert form["requests"] > 0
        assert form["success_rate"] == 1.0
        assert 0 < form["p50_s"]["e2e"] <= form["p95_s"]["e2e"]
    assert found["advice"]["form"] in ("adapter", "merged")
    assert found["advice"]["reasons"]
    assert gateway.services.directory.snapshot.deployments == {}
    keys = [key for key in gateway.services.registry.keys("acme") if key.name == "lorikeet choose"]
    assert [key.revoked_at is not None for key in keys] == [True]
