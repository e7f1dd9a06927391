"""`lorikeet base`, `inspect` and `merge` as their users run them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.api_keys import load_secret
from adapters.blobs import BlobStore
from adapters.cli import base_app, inspect_app
from adapters.cli_merging import merge_app
from adapters.database import open_database
from adapters.errors import AdapterNotFoundError, ConflictError, MergeError
from adapters.home import Home
from adapters.peft_format import FILES, version_digest
from adapters.records import VersionStatus
from adapters.registry import Registry
from adapters.stored import only_tenant, stored_adapter
from tests.factories import make_adapter, make_base, zip_folder

runner = CliRunner()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The data folder the commands find in their environment."""
    monkeypatch.setenv("LORIKEET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORIKEET_DATABASE_URL", raising=False)
    monkeypatch.delenv("LORIKEET_BLOB_URL", raising=False)
    return Home(tmp_path / "home").create()


def store(place: Home, adapter: Path, tenant: str, name: str) -> None:
    engine = open_database(f"sqlite:///{place.database}")
    registry = Registry(engine, secret=load_secret(place.secret))
    if tenant not in {found.name for found in registry.tenants()}:
        registry.create_tenant(tenant)
    blobs = BlobStore.open(place.blobs)
    files = {file: blobs.put(adapter / file) for file in FILES if (adapter / file).is_file()}
    version, _ = registry.add_version(
        tenant, name, digest=version_digest(adapter), size_bytes=1, rank=4, alpha=8, files=files
    )
    registry.set_status(tenant, name, version.version, VersionStatus.READY)
    engine.dispose()


def test_base_prepare_and_show_print_one_document(place: Home, base: Path) -> None:
    prepared = runner.invoke(base_app, ["prepare", str(base), "--json"])
    shown = runner.invoke(base_app, ["show", str(base), "--json"])
    assert json.loads(prepared.stdout) == json.loads(shown.stdout)
    assert json.loads(shown.stdout)["fingerprint"]["model"] == "tests/Tiny-Llama"
    assert "q_proj x 2" in runner.invoke(base_app, ["show", str(base)], env={"COLUMNS": "200"}).stdout


def test_inspect_describes_a_sound_adapter_in_a_folder_or_an_archive(place: Home, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base)
    (tmp_path / "a.zip").write_bytes(zip_folder(adapter, top="a"))
    for path in (adapter, tmp_path / "a.zip"):
        answer = runner.invoke(inspect_app, [str(path), "--base", str(base), "--json"])
        assert answer.exit_code == 0
        document = json.loads(answer.stdout)
        assert document["valid"] is True
        assert document["digest"] == version_digest(adapter)
    assert "can be served" in runner.invoke(inspect_app, [str(adapter), "--base", str(base)]).stdout


def test_inspect_names_every_fault_and_exits_with_one(place: Home, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, rank=32, use_dora=True)
    answer = runner.invoke(inspect_app, [str(adapter), "--base", str(base), "--json"])
    assert answer.exit_code == 1
    assert {fault["code"] for fault in json.loads(answer.stdout)["faults"]} == {"rank_too_high", "dora"}
    table = runner.invoke(inspect_app, [str(adapter), "--base", str(base)], env={"COLUMNS": "200"})
    assert table.exit_code == 1
    assert "lorikeet merge" in table.stdout
    assert runner.invoke(inspect_app, [str(adapter), "--base", str(base), "--max-rank", "64"]).exit_code == 1


def test_inspect_refuses_a_dangerous_archive(place: Home, base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no archive")
    answer = runner.invoke(inspect_app, [str(tmp_path / "a.zip"), "--base", str(base), "--json"])
    assert answer.exit_code == 1
    assert json.loads(answer.stdout)["faults"][0]["code"] == "unknown_archive"


def test_a_stored_version_is_found_by_every_way_to_write_it(place: Home, base: Path, tmp_path: Path) -> None:
    first, second = (make_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2))
    store(place, first, "acme", "support")
    store(place, second, "acme", "support")
    for number, (reference, adapter) in enumerate(
        [("support", first), ("support@2", second), ("acme/support", first), ("acme/support@1", first)]
    ):
        assert version_digest(stored_adapter(reference, tmp_path / f"into-{number}")) == version_digest(adapter)
    store(place, second, "globex", "support")
    with pytest.raises(ConflictError, match="globex/support"):
        stored_adapter("support", tmp_path / "into")


def test_a_quarantined_version_has_no_files_to_read_yet(place: Home, tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{place.database}")
    registry = Registry(engine, secret=b"")
    registry.create_tenant("acme")
    registry.reserve_version("acme", "support")
    engine.dispose()
    with pytest.raises(ConflictError, match="'support@1' is quarantined"):
        stored_adapter("support@1", tmp_path / "into")


def test_an_unknown_reference_makes_no_database(place: Home, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        stored_adapter("support", tmp_path / "into")
    assert not place.database.exists()


def test_the_only_tenant_is_meant_when_none_is_named(place: Home, base: Path, tmp_path: Path) -> None:
    assert only_tenant() is None
    assert not place.database.exists()
    store(place, make_adapter(tmp_path / "a", base), "acme", "support")
    assert only_tenant() == "acme"
    store(place, make_adapter(tmp_path / "a", base), "globex", "support")
    assert only_tenant() is None


def test_merge_refuses_a_folder_without_an_adapter(place: Home, base: Path, tmp_path: Path) -> None:
    answer = runner.invoke(merge_app, [str(tmp_path), "--out", str(tmp_path / "out"), "--base", str(base)])
    assert isinstance(answer.exception, MergeError)


@pytest.mark.slow
def test_merge_takes_a_stored_version_and_shows_its_parity(place: Home, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base)
    store(place, adapter, "acme", "support")
    answer = runner.invoke(
        merge_app, ["support@1", "--out", str(tmp_path / "out"), "--base", str(base), "--json"], catch_exceptions=False
    )
    document = json.loads(answer.stdout)
    assert document["adapter_digest"] == version_digest(adapter)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    second = runner.invoke(merge_app, [str(adapter), "--out", str(tmp_path / "second"), "--base", str(base)])
    assert "Parity" in second.stdout
    assert "Merged" in second.stdout
