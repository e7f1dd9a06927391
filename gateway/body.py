"""What a caller may put into a generation request, and what of it reaches the engine. Pure.

Every field is one of: passed on, accepted without effect (OpenAI's own bookkeeping), the gateway's alone, or unknown;
the last two are refused by name, so nothing is dropped in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from adapters.manifest import ServingDefaults
from gateway.errors import InvalidRequestError
from gateway.settings import RequestSettings

_SAMPLING = frozenset(
    "frequency_penalty presence_penalty logit_bias seed stop stream stream_options temperature top_p n "
    # the engine's own extensions
    "top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens "
    "skip_special_tokens spaces_between_special_tokens bad_words allowed_token_ids structured_outputs response_format "
    "return_token_ids truncate_prompt_tokens".split()
)
# OpenAI's bookkeeping: meaningless here, so harmless to accept.
_WITHOUT_EFFECT = frozenset(
    "metadata user safety_identifier prompt_cache_key prompt_cache_retention service_tier store verbosity "
    "prompt_cache_options moderation".split()
)
# Set by the gateway, or able to reach past the caller's own tenant.
_RESERVED = frozenset(
    "cache_salt priority request_id chat_template chat_template_kwargs kv_transfer_params vllm_xargs use_beam_search "
    "mm_processor_kwargs add_special_tokens documents data_parallel_rank".split()
)

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
    | frozenset("functions function_call audio modalities prediction web_search_options".split()),
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
        "input model instructions stream temperature top_p top_k tools tool_choice parallel_tool_calls text reasoning "
        "truncation include top_logprobs max_tool_calls".split()
    ),
    cap="max_output_tokens",
    required="input",
    unsupported=frozenset(
        "background previous_response_id conversation prompt stream_options context_management".split()
    ),
)
TOKENIZE = Endpoint(
    path="/tokenize",
    fields=frozenset("model prompt messages add_generation_prompt return_token_strs tools".split()),
    cap="",
    required="",
)

_NEUTRAL: dict[str, Any] = {"modalities": ["text"], "best_of": 1, "background": False, "suffix": "", "echo": False}


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine."""

    body: bytes
    stream: bool
    choices: int  # finish reasons to wait for
    wants_usage: bool  # the caller asked for the usage chunk of a stream


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
) -> Prepared:
    """Check every field, add what travels with the adapter and what the gateway alone may set.

    Raises InvalidRequestError that names the field.
    """
    forwarded = {name: value for name, value in fields.items() if _passes(endpoint, name, value)}
    forwarded["model"] = engine_name
    if endpoint.required and forwarded.get(endpoint.required) is None:
        raise InvalidRequestError(
            f"You must provide '{endpoint.required}'.", param=endpoint.required, code="missing_value"
        )
    if not endpoint.cap:
        return Prepared(orjson.dumps(forwarded), stream=False, choices=0, wants_usage=False)

    forwarded["cache_salt"] = cache_salt
    if defaults is not None:
        _apply_defaults(endpoint, forwarded, defaults)
    own_cap = defaults.max_tokens if defaults else None
    names = (endpoint.cap, *endpoint.cap_aliases)
    caps = [_positive(fields[name], name) for name in names if fields.get(name) is not None]
    forwarded[endpoint.cap] = min(caps) if caps else own_cap or limits.default_max_tokens

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
    wants_usage = False
    if endpoint is RESPONSES:
        forwarded["store"] = False
    elif stream:
        options = forwarded.get("stream_options") or {}
        if not isinstance(options, dict):
            raise InvalidRequestError("'stream_options' must be an object.", param="stream_options")
        wants_usage = bool(options.get("include_usage"))
        forwarded["stream_options"] = {"include_usage": True}  # metered always, shown on request
    else:
        forwarded.pop("stream_options", None)
    return Prepared(orjson.dumps(forwarded), stream, choices, wants_usage)


def _passes(endpoint: Endpoint, name: str, value: Any) -> bool:
    """Whether the field goes to the engine. Raises InvalidRequestError for what may not be sent at all."""
    if name in endpoint.fields:
        return value is not None
    if name in (endpoint.cap, *endpoint.cap_aliases) or name in _WITHOUT_EFFECT:
        return False
    if name in _RESERVED:
        raise InvalidRequestError(
            f"'{name}' is set by the server and cannot be sent.", param=name, code="reserved_parameter"
        )
    if name in endpoint.unsupported:
        if value is None or value == _NEUTRAL.get(name):
            return False
        raise InvalidRequestError(
            f"'{name}' is not supported by this server.", param=name, code="unsupported_parameter"
        )
    raise InvalidRequestError(f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")


def _apply_defaults(endpoint: Endpoint, forwarded: dict[str, Any], defaults: ServingDefaults) -> None:
    """What the adapter's manifest says holds where the caller said nothing."""
    messages = forwarded.get("messages")
    if endpoint is CHAT and defaults.system_prompt and isinstance(messages, list) and not _has_system(messages):
        forwarded["messages"] = [{"role": "system", "content": defaults.system_prompt}, *messages]
    if defaults.temperature is not None:
        forwarded.setdefault("temperature", defaults.temperature)
    if defaults.top_p is not None:
        forwarded.setdefault("top_p", defaults.top_p)
    if defaults.stop and endpoint is not RESPONSES:
        forwarded.setdefault("stop", defaults.stop)


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


def _prompts(prompt: Any) -> int:
    """How many prompts one completions body holds: a list of texts or of token-id lists counts each."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
