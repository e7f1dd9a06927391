"""The gate where it bites: promotion over HTTP."""

from collections.abc import Mapping
from pathlib import Path

import httpx

from adapters.base import read_base
from adapters.manifest import EvaluationScore, Manifest, write_manifest
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
