from typing import Any

import orjson
import pytest

from adapters.manifest import ServingDefaults
from gateway.body import CHAT, COMPLETIONS, RESPONSES, TOKENIZE, Endpoint, Prepared, parse, prepare
from gateway.errors import InvalidRequestError
from gateway.settings import RequestSettings

MESSAGES = [{"role": "user", "content": "Hi"}]


def prepared(
    fields: dict[str, Any], endpoint: Endpoint = CHAT, defaults: ServingDefaults | None = None
) -> tuple[Prepared, dict[str, Any]]:
    result = prepare(
        endpoint,
        {"model": "support", **fields},
        engine_name="acme/support@1-00000000",
        cache_salt="salt",
        defaults=defaults,
        limits=RequestSettings(),
    )
    return result, orjson.loads(result.body)


def chat(**fields: Any) -> dict[str, Any]:
    return prepared({"messages": MESSAGES, **fields})[1]


def refusal(fields: dict[str, Any], endpoint: Endpoint = CHAT) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        prepared(fields, endpoint)
    return refused.value


def test_the_engine_gets_its_own_name_a_salt_and_a_cap() -> None:
    body = chat()
    assert body == {
        "model": "acme/support@1-00000000",
        "messages": MESSAGES,
        "cache_salt": "salt",
        "max_tokens": RequestSettings().default_max_tokens,
    }


def test_both_names_of_the_cap_are_understood_and_the_smaller_holds() -> None:
    assert chat(max_completion_tokens=7)["max_tokens"] == 7
    assert chat(max_completion_tokens=7, max_tokens=5)["max_tokens"] == 5
    assert prepared({"input": "Hi", "max_output_tokens": 9}, RESPONSES)[1]["max_output_tokens"] == 9


@pytest.mark.parametrize("value", [0, -1, "5", 1.5, True])
def test_a_cap_that_is_no_positive_integer_is_refused(value: object) -> None:
    assert refusal({"messages": MESSAGES, "max_tokens": value}).param == "max_tokens"


def test_an_unknown_field_is_refused_by_name() -> None:
    error = refusal({"messages": MESSAGES, "temprature": 0.5})
    assert (error.param, error.code) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize("name", ["cache_salt", "priority", "chat_template", "kv_transfer_params", "request_id"])
def test_what_only_the_gateway_may_set_is_refused(name: str) -> None:
    assert refusal({"messages": MESSAGES, name: "x"}).code == "reserved_parameter"


def test_bookkeeping_is_accepted_and_kept_back() -> None:
    assert "metadata" not in chat(metadata={"a": "b"}, user="u", store=True, service_tier="auto")


def test_a_null_is_as_good_as_absent() -> None:
    assert "temperature" not in chat(temperature=None, functions=None)


def test_what_nothing_here_can_do_is_refused_unless_it_asks_for_nothing() -> None:
    assert refusal({"messages": MESSAGES, "functions": [{}]}).code == "unsupported_parameter"
    assert refusal({"messages": MESSAGES, "prompt_logprobs": 1}).code == "unsupported_parameter"
    assert refusal({"prompt": "Hi", "echo": True}, COMPLETIONS).code == "unsupported_parameter"
    assert "modalities" not in chat(modalities=["text"])


def test_streams_are_always_metered_and_say_who_asked() -> None:
    result, body = prepared({"messages": MESSAGES, "stream": True})
    assert body["stream_options"] == {"include_usage": True}
    assert not result.wants_usage
    result, _ = prepared({"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}})
    assert result.wants_usage


def test_an_answer_has_as_many_choices_as_prompts_times_n() -> None:
    assert prepared({"prompt": ["a", "b"], "n": 2}, COMPLETIONS)[0].choices == 4
    assert prepared({"prompt": [1, 2, 3]}, COMPLETIONS)[0].choices == 1
    assert prepared({"prompt": [[1], [2]]}, COMPLETIONS)[0].choices == 2


def test_too_many_choices_are_refused() -> None:
    assert refusal({"messages": MESSAGES, "n": 1000}).param == "n"
    assert refusal({"prompt": ["a"] * 1000}, COMPLETIONS).param == "prompt"
    assert refusal({"prompt": ["a"] * 5, "n": 7}, COMPLETIONS).param == "prompt"


def test_a_missing_prompt_is_refused() -> None:
    assert refusal({}).param == "messages"
    assert refusal({}, COMPLETIONS).param == "prompt"


def test_responses_are_never_stored() -> None:
    assert prepared({"input": "Hi", "store": True}, RESPONSES)[1]["store"] is False


def test_tokenizing_takes_no_cap_and_no_salt() -> None:
    assert prepared({"prompt": "Hi"}, TOKENIZE)[1] == {"model": "acme/support@1-00000000", "prompt": "Hi"}


def test_behaviour_travels_with_the_adapter_and_the_caller_overrides_it() -> None:
    defaults = ServingDefaults(system_prompt="Be brief.", stop=["\n"], temperature=0.0, max_tokens=16)
    _, body = prepared({"messages": MESSAGES}, defaults=defaults)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["stop"], body["temperature"], body["max_tokens"]) == (["\n"], 0.0, 16)
    own = [{"role": "system", "content": "Be long."}, *MESSAGES]
    _, body = prepared({"messages": own, "temperature": 1.0, "max_tokens": 32}, defaults=defaults)
    assert (body["messages"], body["temperature"], body["max_tokens"]) == (own, 1.0, 32)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"null", b'"x"', b"\xff"])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse(raw)
