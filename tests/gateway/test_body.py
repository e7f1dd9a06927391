from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.manifest import Override, ServingDefaults
from gateway.body import CHAT, COMPLETIONS, RESPONSES, TEMPLATE_FIELDS, TOKENIZE, Endpoint, Prepared, parse, prepare
from gateway.errors import InvalidRequestError, PermissionDeniedError
from gateway.settings import RequestSettings

MESSAGES = [{"role": "user", "content": "Hi"}]


def prepared(
    fields: dict[str, Any],
    endpoint: Endpoint = CHAT,
    defaults: ServingDefaults | None = None,
    *,
    templates: bool = False,
) -> tuple[Prepared, dict[str, Any]]:
    result = prepare(
        endpoint,
        {"model": "support", **fields},
        engine_name="acme/support@1-00000000",
        cache_salt="salt",
        defaults=defaults,
        limits=RequestSettings(),
        templates=templates,
    )
    return result, orjson.loads(result.body)


def chat(**fields: Any) -> dict[str, Any]:
    return prepared({"messages": MESSAGES, **fields})[1]


def refusal(
    fields: dict[str, Any], endpoint: Endpoint = CHAT, defaults: ServingDefaults | None = None
) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        prepared(fields, endpoint, defaults)
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


def test_unknown_fields_are_refused_by_name_in_openais_words() -> None:
    error = refusal({"messages": MESSAGES, "temprature": 0.5})
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    assert str(error) == "Unrecognized request argument supplied: temprature"
    assert str(refusal({"messages": MESSAGES, "a": 1, "b": 2})) == "Unrecognized request arguments supplied: a, b"
    assert str(refusal({"input": "Hi", "temprature": 0.5}, RESPONSES)) == "Unknown parameter: 'temprature'."
    error = refusal({"messages": MESSAGES, "stream": True, "stream_options": {"usage": True}})
    assert error.param == "stream_options.usage"


@pytest.mark.parametrize("name", ["cache_salt", "priority", "stream_interval", "kv_transfer_params", "request_id"])
def test_what_only_the_gateway_may_set_is_refused(name: str) -> None:
    assert refusal({"messages": MESSAGES, name: "x"}).code == "reserved_parameter"


def test_bookkeeping_is_accepted_and_kept_back() -> None:
    assert "metadata" not in chat(metadata={"a": "b"}, user="u", store=True, service_tier="auto")


def test_a_null_is_as_good_as_absent() -> None:
    assert "temperature" not in chat(temperature=None, functions=None)


def test_what_nothing_here_can_do_is_refused_unless_it_asks_for_nothing() -> None:
    assert refusal({"messages": MESSAGES, "functions": [{}]}).code == "unsupported_parameter"
    assert "'tools'" in str(refusal({"messages": MESSAGES, "functions": [{}]}))
    assert refusal({"messages": MESSAGES, "verbosity": "low"}).code == "unsupported_parameter"
    assert refusal({"prompt": "Hi", "best_of": 3}, COMPLETIONS).param == "best_of"
    assert "best_of" not in prepared({"prompt": "Hi", "n": 2, "best_of": 2}, COMPLETIONS)[1]
    assert refusal({"input": "Hi", "tools": [{"type": "web_search"}]}, RESPONSES).param == "tools[0].type"
    assert refusal({"messages": MESSAGES, "prompt_logprobs": 1}).code == "unsupported_parameter"
    assert refusal({"prompt": "Hi", "echo": True}, COMPLETIONS).code == "unsupported_parameter"
    assert "modalities" not in chat(modalities=["text"])


def test_streams_are_always_metered_and_say_who_asked() -> None:
    result, body = prepared({"messages": MESSAGES, "stream": True})
    assert body["stream_options"] == {"include_usage": True}
    assert not result.wants_usage
    result, _ = prepared({"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}})
    assert result.wants_usage


def test_stream_options_without_a_stream_are_refused() -> None:
    assert refusal({"messages": MESSAGES, "stream_options": {"include_usage": True}}).param == "stream_options"
    assert refusal({"messages": MESSAGES, "stream": True, "stream_options": 1}).param == "stream_options"


@pytest.mark.parametrize("name", sorted(TEMPLATE_FIELDS))
def test_only_keys_trusted_with_templates_bring_them(name: str) -> None:
    with pytest.raises(PermissionDeniedError) as refused:
        prepared({"messages": MESSAGES, name: {}})
    assert refused.value.param == name
    assert prepared({"messages": MESSAGES, name: {"a": 1}}, templates=True)[1][name] == {"a": 1}


def test_an_answer_has_as_many_choices_as_prompts_times_n() -> None:
    assert prepared({"prompt": ["a", "b"], "n": 2}, COMPLETIONS)[0].choices == 4
    assert prepared({"prompt": [1, 2, 3]}, COMPLETIONS)[0].choices == 1
    assert prepared({"prompt": [[1], [2]]}, COMPLETIONS)[0].choices == 2


def test_too_many_choices_are_refused() -> None:
    assert refusal({"messages": MESSAGES, "n": 1000}).param == "n"
    assert refusal({"prompt": ["a"] * 1000}, COMPLETIONS).param == "prompt"
    assert refusal({"prompt": ["a"] * 5, "n": 7}, COMPLETIONS).param == "prompt"


def test_templates_and_schemas_are_not_counted_as_prompt() -> None:
    plain, _ = prepared({"messages": MESSAGES})
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"description": "x" * 4000}}}
    dressed, _ = prepared(
        {"messages": MESSAGES, "response_format": schema}, defaults=ServingDefaults(chat_template="x" * 4000)
    )
    assert dressed.prompt_bytes - plain.prompt_bytes < 100
    longer, _ = prepared({"messages": [{"role": "user", "content": "x" * 4000}]})
    assert longer.prompt_bytes - plain.prompt_bytes == 4000 - len("Hi")


def test_more_levels_than_can_be_written_are_the_callers_fault() -> None:
    tools: Any = []
    for _ in range(300):
        tools = [tools]
    assert refusal({"messages": MESSAGES, "tools": tools}).code == "invalid_json"


def test_a_missing_prompt_is_refused() -> None:
    assert refusal({}).param == "messages"
    assert refusal({}, COMPLETIONS).param == "prompt"


def test_responses_are_never_stored() -> None:
    assert prepared({"input": "Hi", "store": True}, RESPONSES)[1]["store"] is False


def test_tokenizing_takes_either_messages_or_a_prompt() -> None:
    assert refusal({}, TOKENIZE).param == "messages"
    assert refusal({"prompt": "Hi", "messages": MESSAGES}, TOKENIZE).param == "messages"


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


OWNER = ServingDefaults(
    chat_template="{{ messages }}",
    system_prompt="Be brief.",
    stop=["\n"],
    temperature=0.0,
    top_k=5,
    seed=7,
    max_tokens=16,
    overridable=[],
)


def test_every_way_to_ask_gets_the_behaviour_that_fits_it() -> None:
    _, chat_body = prepared({"messages": MESSAGES}, defaults=OWNER)
    assert chat_body["chat_template"] == OWNER.chat_template
    assert chat_body["messages"] == [{"role": "system", "content": "Be brief."}, *MESSAGES]
    _, response = prepared({"input": "Hi"}, RESPONSES, OWNER)
    assert response["chat_template_kwargs"] == {"chat_template": OWNER.chat_template}
    assert response["instructions"] == "Be brief."
    _, completion = prepared({"prompt": "Hi"}, COMPLETIONS, OWNER)
    assert completion["prompt"] == "Hi"
    assert "chat_template" not in completion
    for body, cap in ((chat_body, "max_tokens"), (response, "max_output_tokens"), (completion, "max_tokens")):
        assert (body["temperature"], body["top_k"], body["seed"], body["stop"]) == (0.0, 5, 7, ["\n"])
        assert body[cap] == 16
    _, counted = prepared({"messages": MESSAGES}, TOKENIZE, OWNER)
    assert {name: counted[name] for name in ("messages", "chat_template")} == {
        name: chat_body[name] for name in ("messages", "chat_template")
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("temperature", {"temperature": 1}),
        ("top_k", {"top_k": 1}),
        ("chat_template", {"chat_template": "x"}),
        ("messages", {"messages": [{"role": "system", "content": "Be long."}, *MESSAGES]}),
        ("messages", {"messages": [{"role": "developer", "content": "Be long."}, *MESSAGES]}),
    ],
)
def test_what_the_owner_fixed_is_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        prepared({"messages": MESSAGES, **fields}, defaults=OWNER, templates=True)
    assert (refused.value.param, refused.value.code) == (name, "fixed_parameter")


def test_a_fixed_value_may_be_repeated_and_stops_may_be_added() -> None:
    _, body = prepared({"messages": MESSAGES, "temperature": 0, "stop": "END"}, defaults=OWNER)
    assert body["temperature"] == 0
    assert body["stop"] == ["\n", "END"]
    assert refusal({"input": "Hi", "instructions": "Be long."}, RESPONSES, OWNER).param == "instructions"


@given(sent=st.none() | st.integers(1, 4096), own=st.none() | st.integers(1, 4096), open_to_callers=st.booleans())
def test_no_caller_gets_past_a_cap_that_the_owner_fixed(
    sent: int | None, own: int | None, open_to_callers: bool
) -> None:
    overridable: list[Override] = ["max_tokens"] if open_to_callers else []
    defaults = ServingDefaults(max_tokens=own, overridable=overridable)
    for endpoint, required in ((CHAT, {"messages": MESSAGES}), (RESPONSES, {"input": "Hi"})):
        _, body = prepared({**required, endpoint.cap: sent}, endpoint, defaults)
        assert body[endpoint.cap] <= max(sent or 0, own or RequestSettings().default_max_tokens)
        if sent is not None:
            assert body[endpoint.cap] <= sent
        if own is not None and not open_to_callers:
            assert body[endpoint.cap] <= own


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"null", b'"x"', b"\xff"])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse(raw)
