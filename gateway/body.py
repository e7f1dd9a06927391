"""What a caller may put into a generation request, and what of it reaches the engine. Pure.

Every field is one of: passed on; accepted without effect, where the answer would be the same; the gateway's alone; something
nothing here does; or unknown. The last three are refused by name, so nothing is dropped in silence. What an adapter's manifest
says about its serving holds where the caller says nothing, or may not say otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from adapters.manifest import ServingDefaults
from gateway.errors import InvalidRequestError, PermissionDeniedError
from gateway.settings import RequestSettings

_SAMPLING = frozenset(
    "frequency_penalty presence_penalty logit_bias seed stop stream stream_options temperature top_p n "
    # the engine's own extensions
    "top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens "
    "spaces_between_special_tokens bad_words allowed_token_ids structured_outputs response_format return_token_ids "
    "return_tokens_as_token_ids truncate_prompt_tokens truncation_side thinking_token_budget repetition_detection".split()
)
# OpenAI's bookkeeping, and hints that could make an answer quicker but never another.
_WITHOUT_EFFECT = frozenset(
    "metadata user safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options service_tier store "
    "prediction".split()
)
# Set by the gateway, able to reach past the caller's own tenant or request, or without effect in the engine.
RESERVED = frozenset(
    "cache_salt priority request_id session_id data_parallel_rank kv_transfer_params ec_transfer_params vllm_xargs "
    "watermarking prompt_embeds media_io_kwargs mm_processor_kwargs mm_payload return_mm_kwargs add_special_tokens "
    "use_beam_search length_penalty logprob_token_ids routed_experts_prompt_start return_token_offsets "
    "return_prompt_text previous_input_messages enable_response_messages "
    "stream_interval".split()  # one event would be many tokens, and a stream cut short is charged by its events
)
# A template is a program, run in the process every tenant's answers come from: for keys that are trusted with it.
TEMPLATE_FIELDS = frozenset(["chat_template", "chat_template_kwargs", "documents"])

# Scores of the prompt: a row of vocabulary size for each of its tokens, enough to exhaust an engine's memory for everybody.
_PROMPT_SCORES = frozenset(["prompt_logprobs", "echo"])


@dataclass(frozen=True)
class Endpoint:
    """One generation endpoint: its path in the engine and the names its fields go by."""

    path: str
    fields: frozenset[str]  # passed on
    cap: str  # the output cap the engine reads
    cap_aliases: tuple[str, ...] = ()
    required: str = "messages"
    unsupported: frozenset[str] = frozenset()  # OpenAI's, but nothing here does what they ask
    templates: frozenset[str] = frozenset()  # passed on for keys with the scope

    @cached_property
    def known(self) -> frozenset[str]:
        """Every field that is not refused as unknown."""
        caps = {self.cap, *self.cap_aliases} - {""}
        return self.fields | caps | self.unsupported | self.templates | _WITHOUT_EFFECT | RESERVED


CHAT = Endpoint(
    path="/v1/chat/completions",
    fields=_SAMPLING
    | frozenset(
        "messages model logprobs top_logprobs tools tool_choice parallel_tool_calls reasoning_effort "
        "add_generation_prompt continue_final_message include_reasoning".split()
    ),
    cap="max_tokens",
    cap_aliases=("max_completion_tokens",),
    unsupported=_PROMPT_SCORES
    | frozenset("functions function_call audio modalities web_search_options moderation verbosity".split()),
    templates=TEMPLATE_FIELDS,
)
COMPLETIONS = Endpoint(
    path="/v1/completions",
    fields=_SAMPLING | frozenset(["prompt", "model", "logprobs"]),
    cap="max_tokens",
    required="prompt",
    unsupported=_PROMPT_SCORES | frozenset(["suffix", "best_of"]),
)
RESPONSES = Endpoint(
    path="/v1/responses",
    fields=frozenset(
        "input model instructions stream temperature top_p tools tool_choice parallel_tool_calls text reasoning "
        "truncation include top_logprobs max_tool_calls metadata stream_options "
        # the engine's own extensions
        "top_k min_p frequency_penalty presence_penalty repetition_penalty logit_bias seed stop stop_token_ids "
        "include_stop_str_in_output ignore_eos skip_special_tokens structured_outputs include_reasoning".split()
    ),
    cap="max_output_tokens",
    required="input",
    unsupported=frozenset(
        "background background_options previous_response_id conversation prompt context_management moderation image "
        "access_programs".split()
    ),
    templates=frozenset(["chat_template", "chat_template_kwargs"]),
)
TOKENIZE = Endpoint(
    path="/tokenize",
    fields=frozenset(
        "model prompt messages add_generation_prompt continue_final_message return_token_strs tools".split()
    ),
    cap="",
    required="",
    templates=frozenset(["chat_template", "chat_template_kwargs"]),
)

# What asks for nothing: the default of a field that is otherwise unsupported.
_NEUTRAL: dict[str, Any] = {
    "modalities": ["text"],
    "verbosity": "medium",
    "functions": [],
    "function_call": "none",
    "background": False,
    "suffix": "",
    "echo": False,
}
_INSTEAD = {"functions": "'tools'", "function_call": "'tool_choice'"}
_NO_PROMPT = ("chat_template", "chat_template_kwargs", "response_format", "structured_outputs", "text")
_STREAM_OPTIONS = frozenset(["include_usage", "include_obfuscation"])


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine."""

    body: bytes
    stream: bool
    choices: int  # finish reasons to wait for
    wants_usage: bool  # the caller asked for the usage chunk of a stream
    prompt_bytes: int  # of the body, about: without templates and schemas, which are no prompt
    output_cap: int = 0  # tokens of all choices together


def parse(raw: bytes) -> dict[str, Any]:
    """The body as an object. Raises InvalidRequestError."""
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise InvalidRequestError(f"The body is not valid JSON: {exc}", code="invalid_json") from exc
    if not isinstance(fields, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    return fields


def model_of(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequestError(
            "You must provide a model: the name of an adapter.", param="model", code="missing_value"
        )
    return model


def prepare(
    endpoint: Endpoint,
    fields: Mapping[str, Any],
    *,
    engine_name: str,
    cache_salt: str,
    defaults: ServingDefaults | None,
    limits: RequestSettings,
    templates: bool = False,
) -> Prepared:
    """Check every field, add what travels with the adapter and what the gateway alone may set.

    templates: whether the caller's key may bring chat templates.
    Raises InvalidRequestError that names the field, PermissionDeniedError.
    """
    if not fields.keys() <= endpoint.known:
        raise _unknown(endpoint, [name for name in fields if name not in endpoint.known])
    forwarded = {name: value for name, value in fields.items() if _passes(endpoint, name, value, fields, templates)}
    forwarded["model"] = engine_name
    if endpoint.required and forwarded.get(endpoint.required) is None:
        raise InvalidRequestError(
            f"You must provide '{endpoint.required}'.", param=endpoint.required, code="missing_value"
        )
    if endpoint is RESPONSES:
        _check_tools(forwarded.get("tools"))
    if defaults is not None:
        _apply_prompt(endpoint, forwarded, defaults)
    if endpoint is RESPONSES and "chat_template" in forwarded:  # has no field for it there
        own = {"chat_template": forwarded.pop("chat_template")}
        forwarded["chat_template_kwargs"] = _object(forwarded, "chat_template_kwargs") | own
    if endpoint is TOKENIZE:
        if ("messages" in forwarded) == ("prompt" in forwarded):
            raise InvalidRequestError("You must provide either 'messages' or 'prompt'.", param="messages")
        body, prompt_bytes = _encode(forwarded)
        return Prepared(body, stream=False, choices=0, wants_usage=False, prompt_bytes=prompt_bytes)

    forwarded["cache_salt"] = cache_salt
    if defaults is not None:
        _apply_sampling(forwarded, defaults)
    forwarded[endpoint.cap] = _output_cap(endpoint, fields, defaults, limits)

    stream = _boolean(forwarded, "stream")
    choices = _positive(forwarded.get("n") or 1, "n")
    if choices > limits.max_choices:
        raise InvalidRequestError(f"'n' may be at most {limits.max_choices} here.", param="n")
    if endpoint is COMPLETIONS:  # all of them run under one turn
        choices *= _prompts(forwarded["prompt"])
        if choices > limits.max_choices:
            raise InvalidRequestError(
                f"The prompts of one request, times 'n', may be at most {limits.max_choices} here.", param="prompt"
            )
    options = _object(forwarded, "stream_options")
    forwarded.pop("stream_options", None)
    if not options.keys() <= _STREAM_OPTIONS:
        raise _unknown(endpoint, [f"stream_options.{name}" for name in options if name not in _STREAM_OPTIONS])
    if options and not stream:
        raise InvalidRequestError("'stream_options' needs 'stream': true.", param="stream_options")
    wants_usage = False
    if endpoint is RESPONSES:
        forwarded["store"] = False
    elif stream:
        wants_usage = bool(options.get("include_usage"))
        forwarded["stream_options"] = {"include_usage": True}  # metered always, shown on request
    output_cap = forwarded[endpoint.cap] * choices
    body, prompt_bytes = _encode(forwarded)
    return Prepared(body, stream, choices, wants_usage, prompt_bytes, output_cap)


def _encode(forwarded: Mapping[str, Any]) -> tuple[bytes, int]:
    """The body, and how much of it is prompt. Raises InvalidRequestError: more levels are read than can be written."""
    try:
        body = orjson.dumps(forwarded)
    except orjson.JSONEncodeError as exc:
        raise InvalidRequestError("The body is nested too deeply.", code="invalid_json") from exc
    besides = [forwarded[name] for name in _NO_PROMPT if name in forwarded]
    return body, len(body) - sum(len(orjson.dumps(value)) for value in besides)


def _passes(endpoint: Endpoint, name: str, value: Any, fields: Mapping[str, Any], templates: bool) -> bool:
    """Whether a known field goes to the engine. Raises for what may not be sent at all."""
    if name in endpoint.fields:
        return value is not None
    if name in endpoint.templates:
        if value is not None and not templates:
            raise PermissionDeniedError(
                f"This API key lacks the scope 'chat-template', which '{name}' needs.", param=name
            )
        return value is not None
    if name in endpoint.unsupported:
        if value is None or value == _NEUTRAL.get(name) or (name == "best_of" and value == (fields.get("n") or 1)):
            return False
        advice = f" Use {_INSTEAD[name]} instead." if name in _INSTEAD else ""
        raise InvalidRequestError(
            f"'{name}' is not supported by this server.{advice}", param=name, code="unsupported_parameter"
        )
    if name in RESERVED:
        raise InvalidRequestError(
            f"'{name}' is set by the server and cannot be sent.", param=name, code="reserved_parameter"
        )
    return False


def _check_tools(tools: Any) -> None:
    """The engine passes over OpenAI's own tools without a word. Raises InvalidRequestError."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise InvalidRequestError(
                f"Tools of type '{kind}' are not supported by this server, only functions.",
                param=f"tools[{index}].type",
                code="unsupported_parameter",
            )


def _unknown(endpoint: Endpoint, names: list[str]) -> InvalidRequestError:
    """In the words OpenAI's endpoints use."""
    if endpoint is RESPONSES:
        message = f"Unknown parameter: '{names[0]}'."
    else:
        message = f"Unrecognized request argument{'s' * (len(names) > 1)} supplied: {', '.join(names)}"
    return InvalidRequestError(message, param=names[0], code="unknown_parameter")


def _apply_prompt(endpoint: Endpoint, forwarded: dict[str, Any], defaults: ServingDefaults) -> None:
    """The owner's template and system prompt, where the engine renders messages."""
    turns = forwarded.get("input" if endpoint is RESPONSES else "messages")
    if turns is None:  # a plain prompt is what it is
        return
    if defaults.chat_template is not None:
        _fill(forwarded, "chat_template", defaults.chat_template, defaults)
    if defaults.system_prompt is None:
        return
    brings_own = forwarded.get("instructions") is not None or (isinstance(turns, list) and _has_system(turns))
    if brings_own and "system_prompt" not in defaults.overridable:
        raise _fixed("instructions" if forwarded.get("instructions") is not None else "messages", "the system prompt")
    if brings_own:
        return
    if endpoint is RESPONSES:
        forwarded["instructions"] = defaults.system_prompt
    elif isinstance(turns, list) and turns:
        forwarded["messages"] = [{"role": "system", "content": defaults.system_prompt}, *turns]


def _apply_sampling(forwarded: dict[str, Any], defaults: ServingDefaults) -> None:
    for name, value in defaults.sampling.items():
        _fill(forwarded, name, value, defaults)
    if not defaults.stop:
        return
    sent = forwarded.get("stop")
    if sent is None:
        forwarded["stop"] = defaults.stop
    elif "stop" not in defaults.overridable:  # both can hold
        forwarded["stop"] = [*defaults.stop, *(sent if isinstance(sent, list) else [sent])]


def _fill(forwarded: dict[str, Any], name: str, own: Any, defaults: ServingDefaults) -> None:
    """The owner's value where the caller sends none. Raises InvalidRequestError where it sends another and may not."""
    if forwarded.setdefault(name, own) != own and name not in defaults.overridable:
        raise _fixed(name, f"'{name}'")


def _fixed(param: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The owner of this model has fixed {what}; leave it out.", param=param, code="fixed_parameter"
    )


def _output_cap(
    endpoint: Endpoint, fields: Mapping[str, Any], defaults: ServingDefaults | None, limits: RequestSettings
) -> int:
    names = (endpoint.cap, *endpoint.cap_aliases)
    caps = [_positive(fields[name], name) for name in names if fields.get(name) is not None]
    own = defaults.max_tokens if defaults else None
    if own is None:
        return min(caps, default=limits.default_max_tokens)
    if caps and defaults is not None and "max_tokens" in defaults.overridable:
        return min(caps)
    return min(*caps, own) if caps else own


def _has_system(messages: list[Any]) -> bool:
    return any(isinstance(message, dict) and message.get("role") in ("system", "developer") for message in messages)


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequestError(f"'{name}' must be a positive integer.", param=name)
    return value


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"'{name}' must be true or false.", param=name)
    return value


def _object(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidRequestError(f"'{name}' must be an object.", param=name)
    return value


def _prompts(prompt: Any) -> int:
    """How many prompts one completions body holds: a list of texts or of token-id lists counts each."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
