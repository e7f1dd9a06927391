"""/v1/adapters over HTTP: what comes in, what is refused, and who sees what."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest

from adapters.base import read_base
from adapters.manifest import DataLineage, Manifest, Teacher, write_manifest
from adapters.registry import Scope
from adapters.tensors import save_tensors
from tests.factories import adapter_tensors, make_adapter, tar_folder, zip_folder
from tests.gateway.conftest import Gateway, listening, running_gateway

WAIT = {"wait": "true"}

FORCED = {"force": True, "reason": "nothing was measured"}  # the gate has tests of its own


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", tiny_base, seed=1)


@pytest.fixture
async def acme(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with await gateway.client("acme") as client:
        yield client


async def push(
    client: httpx.AsyncClient, data: bytes | Path, name: str = "support", *, wait: bool = True
) -> httpx.Response:
    raw = data if isinstance(data, bytes) else zip_folder(data)
    return await client.post("/v1/adapters", params=WAIT if wait else {}, data={"name": name}, files={"file": raw})


def faults(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid_adapter"
    assert all(fault.keys() == {"code", "message", "where", "fix"} and fault["fix"] for fault in error["faults"])
    return [fault["code"] for fault in error["faults"]]


async def test_an_upload_becomes_ready_and_goes_into_production(acme: httpx.AsyncClient, folder: Path) -> None:
    answer = await push(acme, folder)
    assert answer.status_code == 201, answer.text
    version = answer.json()
    assert version["object"] == "adapter.version"
    assert (version["id"], version["adapter"], version["version"]) == ("support@1", "support", 1)
    assert (version["status"], version["production"], version["rank"], version["alpha"]) == ("ready", True, 4, 8)
    assert version["probe"]["effect"] > 0
    assert any("manifest" in warning for warning in version["warnings"])
    assert version["licence"] == "Apache-2.0"
    answer = await acme.post("/v1/completions", json={"model": "support", "prompt": "hello"})
    assert answer.headers["x-lorikeet-adapter"] == "support@1"


@pytest.mark.parametrize("pack", [zip_folder, tar_folder, lambda folder: tar_folder(folder, gz=True, top="support")])
async def test_every_kind_of_archive_is_accepted(
    acme: httpx.AsyncClient, folder: Path, pack: Callable[[Path], bytes]
) -> None:
    assert (await push(acme, pack(folder))).status_code == 201


async def test_the_two_files_are_accepted_without_an_archive(acme: httpx.AsyncClient, folder: Path) -> None:
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    plain = await acme.post("/v1/adapters", params=WAIT, data={"name": "support"}, files=files)
    assert plain.status_code == 201, plain.text
    assert (await push(acme, folder)).json()["digest"] == plain.json()["digest"]


async def test_without_waiting_the_answer_comes_before_the_probe(acme: httpx.AsyncClient, folder: Path) -> None:
    answer = await push(acme, folder, wait=False)
    assert (answer.status_code, answer.json()["status"]) == (201, "validated")
    assert (await push(acme, folder)).json()["status"] == "ready"


async def test_an_upload_that_is_being_checked_is_a_quarantined_version_to_whoever_looks(
    gateway: Gateway, acme: httpx.AsyncClient, folder: Path
) -> None:
    async with gateway.checks_held_up():
        upload = asyncio.create_task(push(acme, folder))
        await until(lambda: gateway.services.registry.adapters("acme") != [])
        listed = (await acme.get("/v1/adapters")).json()["data"]
        assert [(one["name"], one["status"], one["production"]) for one in listed] == [("support", "quarantined", None)]
        version = (await acme.get("/v1/adapters/support/versions/1")).json()
        assert (version["id"], version["status"], version["production"]) == ("support@1", "quarantined", False)
        assert [version[unknown] for unknown in ("digest", "rank", "alpha", "size_bytes", "probe")] == [None] * 5
        assert (await acme.get("/v1/adapters/support/versions")).json()["data"] == [version]
        promoted = await acme.post("/v1/adapters/support/promote", json={"version": 1})
        assert (promoted.status_code, promoted.headers["x-should-retry"]) == (409, "false")
        for model in ("support", "support@1"):
            refused = await acme.post("/v1/completions", json={"model": model, "prompt": "hello"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert [model["owned_by"] for model in (await acme.get("/v1/models")).json()["data"]] == ["lorikeet"]
    ready = (await upload).json()
    assert (ready["id"], ready["status"], ready["created_at"]) == ("support@1", "ready", version["created_at"])


async def test_deleting_an_upload_that_is_being_checked_ends_it(
    gateway: Gateway, acme: httpx.AsyncClient, folder: Path
) -> None:
    async with gateway.checks_held_up():
        upload = asyncio.create_task(push(acme, folder))
        await until(lambda: gateway.services.registry.adapters("acme") != [])
        assert (await acme.delete("/v1/adapters/support")).json()["deleted"]
    answer = await upload
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    assert "Upload it again" in answer.json()["error"]["message"]
    assert (await acme.get("/v1/adapters")).json()["data"] == []


async def test_the_same_content_is_the_same_version(acme: httpx.AsyncClient, folder: Path) -> None:
    first, second = await push(acme, folder), await push(acme, tar_folder(folder))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()


async def test_uploads_of_one_name_at_once_get_a_version_each(
    acme: httpx.AsyncClient, tmp_path: Path, tiny_base: Path
) -> None:
    folders = [make_adapter(tmp_path / f"a{seed}", tiny_base, seed=seed) for seed in range(4)]
    answers = await asyncio.gather(*(push(acme, folder) for folder in [*folders, folders[0]]))
    assert sorted(answer.status_code for answer in answers) == [200, 201, 201, 201, 201]
    numbers = {answer.json()["version"] for answer in answers if answer.status_code == 201}
    assert len(numbers) == 4
    assert numbers < {1, 2, 3, 4, 5}  # the twin that came second had one of them while it was checked
    listed = (await acme.get("/v1/adapters/support/versions")).json()
    assert [version["production"] for version in listed["data"]].count(True) == 1


async def test_promote_and_roll_back_move_the_name(acme: httpx.AsyncClient, tmp_path: Path, tiny_base: Path) -> None:
    for seed in (1, 2):
        await push(acme, make_adapter(tmp_path / str(seed), tiny_base, seed=seed))
    assert (await acme.get("/v1/adapters/support")).json()["production"] == 1
    promoted = await acme.post("/v1/adapters/support/promote", json={"version": 2, **FORCED})
    assert (promoted.json()["production"], promoted.json()["previous"]) == (2, 1)
    rolled_back = await acme.post("/v1/adapters/support/rollback")
    assert rolled_back.json()["production"] == 1
    nothing = await acme.post("/v1/adapters/support/promote", json={"version": 9})
    assert nothing.status_code == 404


async def test_a_promoted_version_is_loaded_before_its_first_request(
    gateway: Gateway, acme: httpx.AsyncClient, tmp_path: Path, tiny_base: Path
) -> None:
    for seed in (1, 2):
        await push(acme, make_adapter(tmp_path / str(seed), tiny_base, seed=seed))
    gateway.engine.voices.clear()
    for replica in gateway.services.fleet.replicas:
        await replica.residency.reconcile()
    await acme.post("/v1/adapters/support/promote", json={"version": 2, **FORCED})
    assert any("support@2" in name for name in gateway.engine.voices)


async def test_lists_look_like_openais(acme: httpx.AsyncClient, folder: Path) -> None:
    assert (await acme.get("/v1/adapters")).json() == {"object": "list", "data": [], "has_more": False}
    await push(acme, folder)
    listed = (await acme.get("/v1/adapters")).json()
    assert [(item["object"], item["id"], item["production"]) for item in listed["data"]] == [("adapter", "support", 1)]
    versions = (await acme.get("/v1/adapters/support/versions")).json()["data"]
    assert versions == [(await acme.get("/v1/adapters/support/versions/1")).json()]


async def test_another_tenants_adapter_does_not_exist(gateway: Gateway, acme: httpx.AsyncClient, folder: Path) -> None:
    await push(acme, folder)
    async with await gateway.client("globex") as globex:
        for method, path in [
            ("GET", "/v1/adapters/{}"),
            ("GET", "/v1/adapters/{}/versions"),
            ("GET", "/v1/adapters/{}/versions/1"),
            ("POST", "/v1/adapters/{}/rollback"),
            ("DELETE", "/v1/adapters/{}"),
            ("DELETE", "/v1/adapters/{}/versions/1"),
        ]:
            foreign = await globex.request(method, path.format("support"))
            absent = await globex.request(method, path.format("nothing"))
            assert foreign.status_code == absent.status_code == 404
            assert foreign.text.replace("support", "nothing") == absent.text
        assert (await globex.get("/v1/adapters")).json()["data"] == []
        assert (await push(globex, folder)).json()["version"] == 1  # the same name and content, its own


async def test_keys_without_the_scope_may_not(gateway: Gateway, folder: Path) -> None:
    async with await gateway.client("acme", frozenset({Scope.INFERENCE})) as client:
        assert (await push(client, folder)).status_code == 403
        assert (await client.get("/v1/adapters")).status_code == 403
    async with await gateway.client("acme", frozenset({Scope.ADAPTERS_READ})) as client:
        assert (await client.get("/v1/adapters")).status_code == 200
        assert (await client.delete("/v1/adapters/support")).status_code == 403
    async with gateway.anonymous() as client:
        assert (await push(client, folder)).status_code == 401


async def test_an_operator_uploads_for_a_tenant_it_names(gateway: Gateway, folder: Path) -> None:
    await gateway.key("acme")
    async with gateway.operator("acme") as operator:
        assert (await push(operator, folder)).status_code == 201


async def test_a_deleted_adapter_leaves_the_engine_and_the_disk(
    gateway: Gateway, acme: httpx.AsyncClient, folder: Path
) -> None:
    gateway.services.onboarding.departures.grace_s = 0.0
    await push(acme, folder)
    versions = gateway.settings.home.versions
    assert list(versions.glob("acme/support@1-*/adapter_model.safetensors"))
    answer = await acme.delete("/v1/adapters/support")
    assert answer.json() == {"id": "support", "object": "adapter", "deleted": True}
    await gateway.services.onboarding.departures.done()
    assert gateway.engine.voices == {}
    assert list(versions.glob("acme/*")) == []
    assert [path for path in gateway.settings.home.blobs.rglob("*") if path.is_file()] == []
    assert (await acme.get("/v1/adapters/support")).status_code == 404
    assert (await push(acme, folder)).json()["version"] == 2  # a number is never used twice


async def test_files_that_another_version_names_stay(gateway: Gateway, acme: httpx.AsyncClient, folder: Path) -> None:
    gateway.services.onboarding.departures.grace_s = 0.0
    await push(acme, folder, "one")
    await push(acme, folder, "two")
    await acme.delete("/v1/adapters/one")
    await gateway.services.onboarding.departures.done()
    answer = await acme.post("/v1/completions", json={"model": "two", "prompt": "hello"})
    assert answer.status_code == 200
    assert [path for path in gateway.settings.home.blobs.rglob("*") if path.is_file()] != []


async def test_the_production_version_is_deleted_only_with_nothing_to_take_its_place(
    acme: httpx.AsyncClient, tmp_path: Path, tiny_base: Path
) -> None:
    for seed in (1, 2):
        await push(acme, make_adapter(tmp_path / str(seed), tiny_base, seed=seed))
    refused = await acme.delete("/v1/adapters/support/versions/1")
    assert refused.status_code == 409
    assert refused.headers["x-should-retry"] == "false"
    assert (await acme.delete("/v1/adapters/support/versions/2")).json()["deleted"]
    assert (await acme.delete("/v1/adapters/support/versions/1")).status_code == 200
    assert (await acme.get("/v1/adapters")).json()["data"] == []


# What must never reach an engine; the long list is in tests/adapters


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, base: Path, value: float) -> None:
    tensors = adapter_tensors(read_base(base), rank=4)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = np.full_like(tensors[name], value)
    save_tensors(folder / "adapter_model.safetensors", tensors)


def cut(path: Path, size_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:size_bytes])


ATTACKS: dict[str, Callable[[Path, Path], object]] = {
    "pickle": lambda folder, base: (folder / "adapter_model.bin").write_bytes(b"\x80\x04."),
    "pickle named safetensors": lambda folder, base: (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04."),
    "truncated": lambda folder, base: cut(folder / "adapter_model.safetensors", 500),
    "empty": lambda folder, base: cut(folder / "adapter_model.safetensors", 0),
    "config that is no JSON": lambda folder, base: cut(folder / "adapter_config.json", 20),
    "rank above the cap": lambda folder, base: make_adapter(folder, base, rank=64),
    "rank other than the tensors'": lambda folder, base: edit_config(folder, r=2),
    "dora": lambda folder, base: edit_config(folder, use_dora=True),
    "bias": lambda folder, base: edit_config(folder, bias="all"),
    "modules to save": lambda folder, base: edit_config(folder, modules_to_save=["lm_head"]),
    "unknown target": lambda folder, base: edit_config(folder, target_modules=["no_proj"]),
    "nan": lambda folder, base: edit_tensors(folder, base, float("nan")),
    "infinite": lambda folder, base: edit_tensors(folder, base, float("inf")),
    "absurdly large": lambda folder, base: edit_tensors(folder, base, 1e30),
    "broken manifest": lambda folder, base: (folder / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_no_attack_reaches_the_engine(
    gateway: Gateway, acme: httpx.AsyncClient, folder: Path, tiny_base: Path, attack: str
) -> None:
    ATTACKS[attack](folder, tiny_base)
    assert faults(await push(acme, folder))
    assert gateway.engine.loads == 0
    assert (await acme.get("/v1/adapters")).json()["data"] == []
    assert list(gateway.settings.home.quarantine.iterdir()) == []


@pytest.mark.parametrize("raw", [b"", b"no archive at all", b"PK\x03\x04broken", b"\x1f\x8b\x08broken"])
async def test_what_is_no_archive_is_refused(gateway: Gateway, acme: httpx.AsyncClient, raw: bytes) -> None:
    assert len(faults(await push(acme, raw))) == 1
    assert list(gateway.settings.home.quarantine.iterdir()) == []


async def test_one_report_names_every_fault(acme: httpx.AsyncClient, folder: Path) -> None:
    edit_config(folder, use_dora=True, bias="all", r=2)
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert len(set(faults(await push(acme, folder)))) >= 3


async def test_a_forged_manifest_of_another_base_is_refused(acme: httpx.AsyncClient, folder: Path) -> None:
    manifest = {
        "name": "support",
        "base": {"model": "other", "weights_digest": "0" * 64, "template_digest": "0" * 64},
        "rank": 4,
        "alpha": 8,
        "target_modules": ["q_proj"],
        "created_at": 1,
        "base_licence": "Apache-2.0",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert any("base" in code for code in faults(await push(acme, folder)))


async def test_licences_are_judged_from_the_manifest_and_the_served_base(
    acme: httpx.AsyncClient, folder: Path, tiny_base: Path
) -> None:
    base = read_base(tiny_base)
    data = DataLineage(
        name="tickets", digest="0" * 64, rows=3, licence="CC-BY-NC-4.0", teacher=Teacher(name="big", licence="gemma")
    )
    manifest = Manifest(
        name="support",
        base=base.fingerprint,
        rank=4,
        alpha=8,
        target_modules=["q_proj"],
        created_at=1,
        base_licence="CC0-1.0",
        data=[data],
    )
    assert (await push(acme, folder)).status_code == 201
    write_manifest(manifest, folder)
    assert (await push(acme, folder)).status_code == 201
    newest, first = (await acme.get("/v1/adapters/support/versions")).json()["data"]
    assert first["licences"] is None
    licences = newest["licences"]
    assert licences["level"] == "block"
    assert [(source["kind"], source["licence"]) for source in licences["sources"]] == [
        ("base", base.licence),
        ("data", "CC-BY-NC-4.0"),
        ("teacher", "gemma"),
    ]
    assert [finding["term"] for finding in licences["findings"]] == ["non-commercial"]
    assert {"attribution", "notice", "use-policy"} <= {term["term"] for term in licences["terms"]}
    assert (await acme.get("/v1/adapters/support/versions/2")).json()["licences"] == licences


# The form itself


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, {"file": b"x"}, "name"),
        ({"name": "support"}, {"other": b""}, "file"),
        ({"name": "support", "version": "3"}, {"file": b"x"}, "version"),
        ({"name": "support"}, {"file": b"x", "adapter_model": b"x"}, "file"),
        ({"name": "support"}, {"description": b"x" * 20_000}, "description"),
    ],
)
async def test_a_form_that_cannot_be_used_is_told_what_is_wrong(
    acme: httpx.AsyncClient, data: dict[str, str], files: dict[str, bytes], param: str
) -> None:
    answer = await acme.post("/v1/adapters", data=data, files=files)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in (param, "other")


@pytest.mark.parametrize("name", ["", "Support", "../support", "a/b", "a@1", "x" * 64])
async def test_names_outside_the_grammar_are_refused(acme: httpx.AsyncClient, folder: Path, name: str) -> None:
    answer = await push(acme, folder, name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_name")


async def test_a_body_that_is_no_form_is_refused(acme: httpx.AsyncClient) -> None:
    for headers, raw in [
        ({"content-type": "text/plain"}, b"hello"),
        ({"content-type": "multipart/form-data"}, b"hello"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"--b\r\nnot a header\r\n\r\n"),
        (
            {"content-type": "multipart/form-data; boundary=b"},
            b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nx",
        ),
        ({"content-type": "application/json"}, b"{"),
        ({"content-type": "application/json"}, b'{"name": "support"}'),
    ]:
        answer = await acme.post("/v1/adapters", content=raw, headers=headers)
        assert answer.status_code == 400, (raw, answer.text)
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"), [({}, "version"), ({"version": "x"}, "version"), ({"version": 1, "x": 1}, "x"), ([], None)]
)
async def test_a_promotion_that_cannot_be_read_names_the_field(
    acme: httpx.AsyncClient, folder: Path, body: object, param: str | None
) -> None:
    await push(acme, folder)
    answer = await acme.post("/v1/adapters/support/promote", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_stranger_is_refused_before_its_body_is_read(gateway: Gateway) -> None:
    sent: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        for piece in range(1000):
            sent.append(piece)
            yield b" " * 10_000

    async with gateway.anonymous({"content-type": "application/json"}) as client:
        for path in ("/v1/adapters", "/v1/uploads", "/v1/adapters/support/promote"):
            answer = await client.post(path, content=endless())
            assert answer.status_code == 401
    async with await gateway.client() as client:
        answer = await client.post("/v1/uploads", content=endless())
        assert answer.status_code == 413
    assert len(sent) < 50


class TestLimits:
    """Over a socket, where lengths can lie and clients can leave."""

    @pytest.fixture
    async def gateway(self, tmp_path: Path, tiny_base: Path) -> AsyncIterator[Gateway]:
        async with running_gateway(tmp_path / "home", tiny_base, uploads={"max_bytes": 300_000}) as running:
            yield running

    async def test_more_than_the_limit_is_413_with_and_without_a_length(self, gateway: Gateway) -> None:
        key = await gateway.key()

        async def endless() -> AsyncIterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
            for _ in range(100):
                yield b"x" * 10_000

        headers = {"authorization": f"Bearer {key}", "content-type": "multipart/form-data; boundary=b"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway.app), base_url="http://l") as client:
            answer = await client.post("/v1/adapters", headers=headers, content=endless())
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
            announced = await client.post(
                "/v1/adapters", headers=headers | {"content-length": "9999999"}, content=endless()
            )
            assert announced.status_code == 413
            lying = await client.post("/v1/adapters", headers=headers | {"content-length": "10"}, content=endless())
            assert lying.status_code in (400, 413)
        assert list(gateway.settings.home.quarantine.iterdir()) == []

    async def test_a_client_that_leaves_half_way_leaves_nothing(self, gateway: Gateway) -> None:
        key = await gateway.key()
        async with listening(gateway.app) as url:
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                f"POST /v1/adapters HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nContent-Length: 200000\r\n"
                "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                '--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'.encode()
            )
            writer.write(b"x" * 100_000)
            await writer.drain()
            await until(lambda: any(gateway.settings.home.quarantine.iterdir()))
            writer.close()
            await until(lambda: not any(gateway.settings.home.quarantine.iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_large_upload_arrives_in_parts(acme: httpx.AsyncClient, folder: Path) -> None:
    raw = zip_folder(folder)
    new = {"filename": "support.zip", "bytes": len(raw), "mime_type": "application/zip", "purpose": "adapter"}
    upload = (await acme.post("/v1/uploads", json=new)).json()
    assert (upload["object"], upload["status"], upload["bytes"]) == ("upload", "pending", len(raw))
    half = len(raw) // 2
    parts: list[str] = []
    for piece in (raw[half:], raw[:half]):
        part = await acme.post(f"/v1/uploads/{upload['id']}/parts", files={"data": piece})
        assert part.json()["object"] == "upload.part"
        parts.insert(0, part.json()["id"])
    early = await acme.post("/v1/adapters", json={"name": "support", "upload_id": upload["id"]})
    assert early.status_code == 400
    done = (await acme.post(f"/v1/uploads/{upload['id']}/complete", json={"part_ids": parts})).json()
    assert (done["status"], done["file"]["object"]) == ("completed", "file")
    answer = await acme.post("/v1/adapters", params=WAIT, json={"name": "support", "upload_id": upload["id"]})
    assert (answer.status_code, answer.json()["status"]) == (201, "ready")


async def test_an_upload_is_its_tenants_own(gateway: Gateway, acme: httpx.AsyncClient) -> None:
    upload = (await acme.post("/v1/uploads", json={"filename": "a", "bytes": 3})).json()
    async with await gateway.client("globex") as globex:
        for path in ("parts", "complete", "cancel"):
            sent: dict[str, Any] = {"files": {"data": b"abc"}} if path == "parts" else {"json": {"part_ids": ["x"]}}
            answer = await globex.post(f"/v1/uploads/{upload['id']}/{path}", **sent)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "upload_not_found")
        answer = await globex.post("/v1/adapters", json={"name": "support", "upload_id": upload["id"]})
        assert answer.status_code == 404
    assert (await acme.post(f"/v1/uploads/{upload['id']}/cancel")).json()["status"] == "cancelled"


async def test_the_official_client_uploads_in_parts(gateway: Gateway, folder: Path) -> None:
    raw = zip_folder(folder)
    transport = httpx.ASGITransport(gateway.app)
    async with httpx.AsyncClient(transport=transport) as http:
        client = openai.AsyncOpenAI(base_url="http://l/v1", api_key=await gateway.key(), http_client=cast("Any", http))
        upload = await client.uploads.upload_file_chunked(
            file=raw,
            filename="support.zip",
            bytes=len(raw),
            mime_type="application/zip",
            purpose=cast("Any", "adapter"),
            part_size=4000,
        )
        assert upload.status == "completed"
        answer = await client.post(
            "/adapters",
            cast_to=httpx.Response,
            body={"name": "support", "upload_id": upload.id},
            options={"params": WAIT},
        )
        assert answer.json()["status"] == "ready"
