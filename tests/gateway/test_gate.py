"""The gate where it bites: promotion over HTTP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from adapters.base import read_base
from adapters.manifest import EvaluationScore, Manifest, write_manifest
from adapters.registry import Scope
from tests.factories import make_adapter, zip_folder
from tests.gateway.conftest import Gateway


def scored(folder: Path, base: Path, seed: int, values: Mapping[str, float]) -> bytes:
    make_adapter(folder, base, seed=seed)
    manifest = Manifest(
        name="support",
        base=read_base(base).fingerprint,
        rank=4,
        alpha=8,
        target_modules=["q_proj"],
        created_at=1,
        base_licence="Apache-2.0",
        scores=[
            EvaluationScore.model_validate(
                {"task": "topics", "metric": "accuracy", "subject": subject, "value": value, "rows": 200}
            )
            for subject, value in values.items()
        ],
    )
    write_manifest(manifest, folder)
    return zip_folder(folder)


async def push(client: httpx.AsyncClient, archive: bytes) -> int:
    answer = await client.post("/v1/adapters?wait=true", data={"name": "support"}, files={"file": archive})
    assert answer.status_code == 201, answer.text
    return int(answer.json()["version"])


async def test_only_an_adapter_that_beats_prompting_and_its_predecessor_is_promoted(
    gateway: Gateway, tmp_path: Path, tiny_base: Path
) -> None:
    async with await gateway.client() as client:
        await push(client, scored(tmp_path / "1", tiny_base, 1, {"adapter": 0.8, "base": 0.1, "few-shot": 0.4}))
        worse = await push(client, scored(tmp_path / "2", tiny_base, 2, {"adapter": 0.6, "base": 0.1, "few-shot": 0.4}))
        refused = await client.post("/v1/adapters/support/promote", json={"version": worse})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gate_refused")
        assert any("predecessor" in reason for reason in refused.json()["error"]["reasons"])
        assert (await client.get("/v1/adapters/support")).json()["production"] == 1

        better = await push(
            client, scored(tmp_path / "3", tiny_base, 3, {"adapter": 0.9, "base": 0.1, "few-shot": 0.4})
        )
        assert (await client.post("/v1/adapters/support/promote", json={"version": better})).status_code == 200
        assert (await client.get("/v1/adapters/support")).json()["production"] == better

    acts = {
        (entry.action, entry.subject): entry.details for entry in gateway.services.registry.audit(20, tenant="acme")
    }
    assert acts["version.promote.refused", f"support@{worse}"]["reasons"]
    assert acts["version.promote", f"support@{better}"]["passed"]


async def test_what_is_measured_of_a_served_version_is_attached_and_counts(
    gateway: Gateway, tmp_path: Path, tiny_base: Path
) -> None:
    async with await gateway.client() as client:
        await push(client, scored(tmp_path / "1", tiny_base, 1, {}))
        number = await push(client, scored(tmp_path / "2", tiny_base, 2, {}))
        version = f"/v1/adapters/support/versions/{number}"
        assert (await client.post("/v1/adapters/support/promote", json={"version": number})).status_code == 409
        assert (await client.get(f"{version}/gate")).json()["allowed"] is False

        digest = (await client.get(version)).json()["digest"]
        evaluation = {"model": f"support@{number}", "digest": digest, "scores": scores(0.8, 0.1, 0.4)}
        attached = await client.post(f"{version}/evaluations", json=evaluation)
        assert attached.status_code == 201
        wrong = await client.post(f"{version}/evaluations", json=evaluation | {"digest": "f" * 64})
        assert wrong.json()["error"]["code"] == "conflict"
        assert [one["id"] for one in (await client.get(f"{version}/evaluations")).json()["data"]] == [
            attached.json()["id"]
        ]
        shown = (await client.get("/v1/adapters/support/versions")).json()["data"]
        assert [[one["tasks"] for one in each["evaluations"]] for each in shown] == [[["topics"]], []]
        assert (await client.get(f"{version}/gate")).json()["allowed"] is True
        assert (await client.post("/v1/adapters/support/promote", json={"version": number})).status_code == 200
    reader = frozenset({Scope.ADAPTERS_READ})
    async with await gateway.client(scopes=reader) as client:
        refused = await client.post(f"{version}/evaluations", json=evaluation)
        assert refused.status_code == 403
    async with await gateway.client("globex") as stranger:
        assert (await stranger.get(f"{version}/evaluations")).status_code == 404
        assert (await stranger.get(f"{version}/gate")).status_code == 404


async def test_a_gate_that_says_no_is_passed_with_a_reason_that_is_kept(
    gateway: Gateway, tmp_path: Path, tiny_base: Path
) -> None:
    async with await gateway.client() as client:
        await push(client, scored(tmp_path / "1", tiny_base, 1, {}))
        number = await push(client, scored(tmp_path / "2", tiny_base, 2, {}))
        for body in ({"force": True}, {"reason": "because"}, {"force": True, "reason": ""}):
            refused = await client.post("/v1/adapters/support/promote", json={"version": number} | body)
            assert refused.status_code == 400, body
        forced = await client.post(
            "/v1/adapters/support/promote", json={"version": number, "force": True, "reason": "the old one leaks names"}
        )
        assert forced.json()["production"] == number
    kept = next(entry for entry in gateway.services.registry.audit(5) if entry.subject == f"support@{number}")
    assert kept.details["forced"] == "the old one leaks names"
    assert "No score" in kept.details["against"][0]


def scores(adapter: float, base: float, few_shot: float) -> list[dict[str, Any]]:
    values = {"adapter": adapter, "base": base, "few-shot": few_shot}
    return [
        {"task": "topics", "metric": "accuracy", "subject": subject, "value": value, "rows": 200}
        for subject, value in values.items()
    ]
