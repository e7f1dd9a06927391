"""What the stand-in engine says, in the shapes vLLM says it: pure functions from a request to JSON objects.

Words are tokens. Log-probabilities are a hash of the adapter's bytes, the position and the token, so equal adapters
agree to the last digit and different ones never do.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

VOCAB_SIZE = 49_152
CREATED = 1_700_000_000  # unix seconds: answers are the same on every run
_WORD = re.compile(r"\s*\S+")

Json = dict[str, Any]


@dataclass(frozen=True)
class Voice:
    """Who answers: a name and what makes its answers its own."""

    name: str
    text: str  # the whole answer
    seed: bytes  # of the log-probabilities; the base model's is empty
    nan: bool = False  # its log-probabilities are not numbers


@dataclass(frozen=True)
class Answer:
    """One finished choice, before it is cut into events."""

    id: str
    voice: Voice
    tokens: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    choices: int = 1  # all alike

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + len(self.tokens) * self.choices,
            "completion_tokens": len(self.tokens) * self.choices,
            "prompt_tokens_details": None,
        }


class BadRequestError(ValueError):
    """The request is refused as vLLM refuses it: status 400. `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


def words(text: str) -> tuple[str, ...]:
    """The tokens of a text; joined they are the text again, up to trailing space."""
    return tuple(_WORD.findall(text))


def token_id(word: str) -> int:
    return zlib.crc32(word.encode()) % VOCAB_SIZE


def logprob(seed: bytes, position: int, token: int) -> float:
    """Natural log-probability in (-4, 0) that the voice with this seed gives the token at this place."""
    digest = hashlib.blake2b(b"%b|%d|%d" % (seed, position, token), digest_size=4).digest()
    return -4.0 * (int.from_bytes(digest) + 1) / (2**32 + 1)


def prompt_token_ids(body: Json) -> list[int]:
    """Of chat messages, one or several text prompts or lists of token ids, or the input of the responses API."""
    template = body.get("chat_template") or (body.get("chat_template_kwargs") or {}).get("chat_template")
    if template:
        if template.count("{%") != template.count("%}"):
            raise BadRequestError("The chat template cannot be read.", "chat_template")
        without: Json = {name: body[name] for name in ("messages", "input", "instructions") if name in body}
        return [*map(token_id, words(template)), *prompt_token_ids(without)]
    if body.get("instructions"):
        told = {"role": "system", "content": body["instructions"]}
        turns = body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]
        return prompt_token_ids({"messages": [told, *turns]})
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages:
            raise BadRequestError("messages: List should have at least 1 item", "messages")
        return [
            token
            for message in messages
            for token in (1, *map(token_id, words(f"{message.get('role')} {_content_text(message.get('content'))}")), 2)
        ]
    prompt = body.get("prompt", body.get("input"))
    if isinstance(prompt, str):
        return [token_id(word) for word in words(prompt)]
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(item, dict) for item in prompt):
        return prompt_token_ids({"messages": prompt})
    if isinstance(prompt, list) and prompt and all(isinstance(item, str | list) for item in prompt):
        return [token for item in prompt for token in prompt_token_ids({"prompt": item})]
    raise BadRequestError("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")


def _content_text(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def answer_of(id_: str, voice: Voice, body: Json, *, default_tokens: int, context_tokens: int) -> Answer:
    """The choice this voice gives: its text cut at max_tokens and stop strings, or repeated under `ignore_eos`.

    Raises BadRequestError when the prompt or the wanted answer alone exceeds the context.
    """
    prompt = len(prompt_token_ids(body))
    wanted = next(
        (
            body[key]
            for key in ("max_completion_tokens", "max_tokens", "max_output_tokens")
            if body.get(key) is not None
        ),
        default_tokens,
    )
    if wanted > context_tokens and wanted != default_tokens:
        raise BadRequestError(
            f"max_tokens={wanted} cannot be greater than max_model_len={context_tokens}. "
            "Please request fewer output tokens.",
            "max_tokens",
        )
    if prompt > context_tokens:
        raise BadRequestError(
            f"This model's maximum context length is {context_tokens} tokens. However, your prompt contains {prompt} "
            "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
            "input prompt.",
            "input_tokens",
        )
    limit = min(wanted, context_tokens - prompt)  # cut without a word, as vLLM does
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    text = voice.text
    for stop in stops:
        text = text.split(stop)[0]
    said = words(text)
    prompts = body.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    choices = several * (body.get("n") or 1)
    if body.get("ignore_eos") and said:
        said = (said * math.ceil(max(limit, 1) / len(said)))[:limit]
        return Answer(id_, voice, said, "length", prompt, choices)
    return Answer(id_, voice, said[:limit], "length" if len(said) > limit else "stop", prompt, choices)


def error_object(message: str, kind: str, code: int, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sse(event: Json | str, *, name: str | None = None) -> bytes:
    """One server-sent event."""
    data = event.encode() if isinstance(event, str) else orjson.dumps(event)
    return (b"event: %b\n" % name.encode() if name else b"") + b"data: " + data + b"\n\n"


def is_last_word(event: bytes) -> bool:
    """The generation is over with this event; what may follow is bookkeeping."""
    return b'"finish_reason":"' in event or event.startswith(
        (b"event: response.completed", b"event: response.incomplete")
    )


def has_word(event: bytes) -> bool:
    """The event carries a token of the answer."""
    marks = (b'"content":"', b'"text":"', b'"delta":"')
    return any(mark in event for mark in marks) and not any(mark + b'"' in event for mark in marks)


def prompt_logprobs(voice: Voice, tokens: Sequence[int], wanted: int) -> list[dict[str, Json] | None]:
    """One entry a prompt token: null for the first, then {token id: {logprob, rank, decoded_token}} of the token itself
    and, when asked for, of the likeliest ones.
    """
    entries: list[dict[str, Json] | None] = [None]
    for position, token in enumerate(tokens[1:], start=1):
        own = logprob(voice.seed, position, token)
        entry = {str(token): _candidate(own, min(wanted + 1, 3), token)}
        for rank in range(1, min(wanted, 2) + 1):
            other = (token + rank) % VOCAB_SIZE
            entry[str(other)] = _candidate(own / (4 - rank), rank, other)
        entries.append(entry)
    return entries


def _candidate(value: float, rank: int, token: int) -> Json:
    return {"logprob": value, "rank": rank, "decoded_token": f" t{token}"}


def chat_body(answer: Answer, body: Json) -> Json:
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": CREATED,
        "model": answer.voice.name,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None, "tool_calls": []},
                "logprobs": {"content": _chat_logprobs(answer, body)} if body.get("logprobs") else None,
                "finish_reason": answer.finish_reason,
                "stop_reason": None,
            }
            for index in range(answer.choices)
        ],
        "usage": answer.usage,
        "system_fingerprint": "echo",
        "prompt_logprobs": _asked_prompt_logprobs(answer, body),
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }


def _chat_logprobs(answer: Answer, body: Json) -> list[Json]:
    def entry(word: str, value: float) -> Json:
        return {"token": word, "logprob": value, "bytes": list(word.encode())}

    entries = []
    for index, word in enumerate(answer.tokens):
        own = logprob(answer.voice.seed, answer.prompt_tokens + index, token_id(word))
        others = [entry(f" t{rank}", own - rank) for rank in range(1, body.get("top_logprobs") or 0)]
        entries.append(
            entry(word, own) | {"top_logprobs": [entry(word, own), *others] if body.get("top_logprobs") else []}
        )
    return entries


def completion_body(answer: Answer, body: Json) -> Json:
    return {
        "id": answer.id,
        "object": "text_completion",
        "created": CREATED,
        "model": answer.voice.name,
        "choices": [
            {
                "index": index,
                "text": answer.text,
                "logprobs": _completion_logprobs(answer) if body.get("logprobs") is not None else None,
                "finish_reason": answer.finish_reason,
                "stop_reason": None,
                "prompt_logprobs": _asked_prompt_logprobs(answer, body),
            }
            for index in range(answer.choices)
        ],
        "usage": answer.usage,
        "system_fingerprint": "echo",
    }


def _asked_prompt_logprobs(answer: Answer, body: Json) -> list[dict[str, Json] | None] | None:
    if body.get("prompt_logprobs") is None:
        return None
    return prompt_logprobs(answer.voice, prompt_token_ids(body), body["prompt_logprobs"])


def _completion_logprobs(answer: Answer) -> Json:
    values = [entry["logprob"] for entry in _chat_logprobs(answer, {})]
    starts = [len("".join(answer.tokens[:index])) for index in range(len(answer.tokens))]
    return {
        "text_offset": starts,
        "token_logprobs": values,
        "tokens": list(answer.tokens),
        "top_logprobs": [{word: value} for word, value in zip(answer.tokens, values, strict=True)],
    }


def response_body(answer: Answer, *, done: bool = True) -> Json:
    """The object of the responses API; `done` False is how a stream's first event shows it."""
    complete = answer.finish_reason == "stop"
    return {
        "id": answer.id,
        "created_at": CREATED,
        "object": "response",
        "model": answer.voice.name,
        "status": ("completed" if complete else "incomplete") if done else "in_progress",
        "incomplete_details": {"reason": "max_output_tokens"} if done and not complete else None,
        "output": [_output_item(answer)] if done else [],
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": len(answer.tokens),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + len(answer.tokens),
        }
        if done
        else None,
    }


def _output_item(answer: Answer) -> Json:
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": answer.text, "annotations": []}],
    }


def chat_events(answer: Answer, body: Json) -> Iterator[bytes]:
    """One event a token, after the one that names the role; usage where asked for; then [DONE]."""

    def chunk(choices: list[Json], **extra: Any) -> bytes:
        return sse(
            {
                "id": answer.id,
                "object": "chat.completion.chunk",
                "created": CREATED,
                "model": answer.voice.name,
                "choices": choices,
                **extra,
            }
        )

    def each(delta: Json, finish: str | None = None, logprobs: Json | None = None) -> Iterator[bytes]:
        for index in range(answer.choices):
            yield chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    yield from each({"role": "assistant", "content": ""})
    logprobs = _chat_logprobs(answer, body) if body.get("logprobs") else None
    for position, word in enumerate(answer.tokens):
        yield from each({"content": word}, logprobs={"content": [logprobs[position]]} if logprobs else None)
    yield from each({"content": ""}, answer.finish_reason)
    yield from _stream_end(answer, body, chunk)


def completion_events(answer: Answer, body: Json) -> Iterator[bytes]:
    def chunk(choices: list[Json], **extra: Any) -> bytes:
        return sse(
            {
                "id": answer.id,
                "object": "text_completion",
                "created": CREATED,
                "model": answer.voice.name,
                "choices": choices,
                **extra,
            }
        )

    for word, finish in [*((word, None) for word in answer.tokens), ("", answer.finish_reason)]:
        for index in range(answer.choices):
            yield chunk([{"index": index, "text": word, "logprobs": None, "finish_reason": finish}])
    yield from _stream_end(answer, body, chunk)


def _stream_end(answer: Answer, body: Json, chunk: Any) -> Iterator[bytes]:
    options: Mapping[str, Any] = body.get("stream_options") or {}
    if options.get("include_usage"):
        yield chunk([], usage=answer.usage)
    yield sse("[DONE]")


def response_events(answer: Answer, _body: Json) -> Iterator[bytes]:
    """The typed events of the responses API; no [DONE]."""
    number = iter(range(len(answer.tokens) + 8))

    def event(kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, "sequence_number": next(number), **fields}, name=kind)

    item = _output_item(answer)
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield event("response.created", response=response_body(answer, done=False))
    yield event("response.in_progress", response=response_body(answer, done=False))
    yield event("response.output_item.added", output_index=0, item=item | {"status": "in_progress", "content": []})
    part = {"type": "output_text", "text": "", "annotations": []}
    yield event("response.content_part.added", part=part, **place)
    for word in answer.tokens:
        yield event("response.output_text.delta", delta=word, logprobs=[], **place)
    yield event("response.output_text.done", text=answer.text, logprobs=[], **place)
    yield event("response.content_part.done", part=item["content"][0], **place)
    yield event("response.output_item.done", output_index=0, item=item)
    kind = "response.completed" if answer.finish_reason == "stop" else "response.incomplete"
    yield sse({"type": kind, "sequence_number": len(answer.tokens) + 7, "response": response_body(answer)}, name=kind)
