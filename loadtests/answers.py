"""What an answer says, and whether it is the right one: of the adapter that was asked, and of nobody else. Pure."""

import re
from collections.abc import Container
from typing import Any

import orjson

# A first chunk with a role and empty content is no token: counting it made TTFT 2 ms where the truth was 126 ms.
ASIDES = ("reasoning", "reasoning_content", "tool_calls", "refusal")
# `support`, `support@3`, `acme/support@3`
_REFERENCE = re.compile(r"(?:(?P<owner>[^/@]+)/)?(?P<name>[^/@]+)(?:@(?P<version>\d+))?")
_MARK = re.compile(r"(?<![0-9a-f])[0-9a-f]{8}(?![0-9a-f])")


class Answer:
    """What the events of an answer said, up to now."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self._texts: list[str] = []
        self._asides: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def all_text(self) -> str:
        """With what was thought or refused, apart from the answer itself."""
        return self.text + "\n" + "".join(self._asides) if self._asides else self.text

    def add(self, event: bytes, data: bytes) -> bool:
        """Whether it brought content."""
        if data == b"[DONE]":
            return False
        try:
            payload = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.error = "unreadable: an event is not JSON"
            return False
        if not isinstance(payload, dict):
            self.error = "unreadable: an event is not an object"
            return False
        if event == b"error" or payload.get("error"):
            self.error = f"error event: {error_of(data)}"
        try:
            return self._add_choices(payload)
        except (AttributeError, TypeError):
            self.error = "unreadable: an event is not shaped like a chat completion"
            return False

    def _add_choices(self, payload: dict[str, Any]) -> bool:
        has_content = False
        for choice in payload.get("choices") or ():
            part = choice.get("delta") or choice.get("message") or {}
            if text := part.get("content"):
                has_content = True
                self._texts.append(text if isinstance(text, str) else str(text))
            else:
                for name in ASIDES:
                    if aside := part.get(name):
                        has_content = True
                        self._asides.append(str(aside))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage := payload.get("usage"):
            self.prompt_tokens, self.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        return has_content


def error_of(answer: bytes) -> str:
    """Code and message of an OpenAI error object, or the beginning of whatever came instead."""
    try:
        error = orjson.loads(answer)["error"]
        text = ": ".join(str(error[name]) for name in ("code", "message") if error.get(name))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        text = answer.decode("utf-8", "replace").strip()
    return text[:200]


def fault_of(
    *, asked: str, tenant: str, served_by: str, text: str, expect: str, mark: str, marks: Container[str]
) -> str:
    """Why this answer is not that of its request; empty where nothing says so.

    served_by: what the server says answered, empty where it says nothing. expect: text that a canary must contain.
    mark: the request's own, marks: those of every request of the run.
    """
    if is_another(asked, served_by, tenant=tenant):
        return f"asked for {asked}, answered by {served_by}"
    if expect not in text:
        return "the canary's text is missing"
    foreign = next((found for found in _MARK.findall(text) if found != mark and found in marks), None)
    return f"holds the mark of another request: {foreign}" if foreign else ""


def judged_text(expect: str, text: str, finish_reason: str | None) -> str:
    """What the answer to a canary must contain: nothing where it was cut off too early to tell."""
    is_whole = finish_reason == "stop" or (finish_reason == "length" and len(text) >= len(expect))
    return expect if is_whole else ""


def is_another(asked: str, served_by: str, *, tenant: str) -> bool:
    """Whether the label of an answer names another model than was asked for.

    `support` is answered by some version of it, `support@2` by that one. A label leaves the tenant out where it is the
    caller's own, so for acme `acme/support` may be answered by `support@2`, for others only by `acme/support@2`.
    """
    if not served_by or served_by == asked:
        return False
    wanted, got = _REFERENCE.fullmatch(asked), _REFERENCE.fullmatch(served_by)
    if wanted is None or got is None or wanted["name"] != got["name"]:
        return True
    other_owner = (got["owner"] or tenant) != (wanted["owner"] or tenant)
    other_version = wanted["version"] is not None and got["version"] != wanted["version"]
    return other_owner or other_version
