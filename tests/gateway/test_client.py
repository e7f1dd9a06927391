"""What a command makes of the gateway's answers."""

import json
from pathlib import Path

import httpx
import pytest

from gateway.client import CommandError, GatewayClient, RefusedError, gateway_url, operator_client, refusal
from gateway.settings import Settings


def client(answer: httpx.Response, seen: list[httpx.Request] | None = None) -> GatewayClient:
    def handle(request: httpx.Request) -> httpx.Response:
        request.read()
        if seen is not None:
            seen.append(request)
        return answer

    return GatewayClient("http://gateway", "lk-key", tenant="acme", transport=httpx.MockTransport(handle))


def test_a_request_carries_the_key_and_the_tenant_it_acts_for() -> None:
    seen: list[httpx.Request] = []
    assert client(httpx.Response(200, json={"ok": True}), seen).get("/v1/adapters") == {"ok": True}
    assert seen[0].headers["authorization"] == "Bearer lk-key"
    assert seen[0].headers["openai-project"] == "acme"


def test_an_error_object_becomes_a_message_a_code_and_every_fault() -> None:
    fault = {"code": "nan", "message": "NaN in q_proj", "where": "q_proj.lora_A", "fix": "Train again."}
    body = {"error": {"message": "The adapter cannot be served.", "code": "invalid_adapter", "faults": [fault]}}
    with pytest.raises(RefusedError, match="cannot be served") as caught:
        client(httpx.Response(422, json=body)).get("/")
    assert (caught.value.status, caught.value.code) == (422, "invalid_adapter")
    assert caught.value.faults[0].as_dict() == fault


@pytest.mark.parametrize("body", ["<html>bad gateway</html>", "[]", '{"error": "text"}', '{"error": {}}', "null"])
def test_an_error_from_something_between_is_shown_as_it_is(body: str) -> None:
    assert "502" in str(refusal(httpx.Response(502, text=body)))


def test_something_else_on_the_port_is_told_apart() -> None:
    with pytest.raises(CommandError, match="not a Lorikeet gateway"):
        client(httpx.Response(200, text="hello")).get("/v1/adapters")


def test_no_gateway_means_a_hint_to_start_one() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(CommandError, match="lorikeet up"):
        GatewayClient("http://gateway", "k", transport=httpx.MockTransport(refuse)).get("/")


def test_an_upload_is_streamed_with_its_name(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"PK" * 1000)
    seen: list[httpx.Request] = []
    with archive.open("rb") as file:
        client(httpx.Response(201, json={"version": 1}), seen).upload("support", file, wait=False)
    assert seen[0].url.params["wait"] == "false"
    assert b'name="name"\r\n\r\nsupport' in seen[0].content
    assert b"PK" * 1000 in seen[0].content


def test_the_address_is_the_settings_unless_the_environment_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORIKEET_URL", raising=False)
    assert gateway_url(Settings(host="0.0.0.0", port=9)) == "http://127.0.0.1:9"  # noqa: S104 - never bound
    assert gateway_url(Settings(host="::1", port=9)) == "http://[::1]:9"
    monkeypatch.setenv("LORIKEET_URL", "https://models.example/")
    assert gateway_url(Settings(port=9)) == "https://models.example"
    assert gateway_url(Settings(host="127.0.0.1", port=9), ignore_environment=True) == "http://127.0.0.1:9"


def test_without_any_key_the_message_says_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_HOME", str(tmp_path))
    monkeypatch.delenv("LORIKEET_API_KEY", raising=False)
    with pytest.raises(CommandError, match="LORIKEET_API_KEY"), operator_client(Settings(), None):
        pass


def test_json_bodies_are_sent_as_json() -> None:
    seen: list[httpx.Request] = []
    client(httpx.Response(200, json={}), seen).post("/v1/adapters/a/promote", {"version": 2})
    assert json.loads(seen[0].content) == {"version": 2}


def test_an_empty_variable_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("LORIKEET_HOME", "LORIKEET_PORT", "LORIKEET_DATABASE_URL")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    expected = Settings()
    for name in names:
        monkeypatch.setenv(name, "")
    assert Settings() == expected
