"""A served adapter on the parity ladder: asked over HTTP, compared as far as both texts are equal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import MergeError
from adapters.parity import Known, PromptSet, Questions, Reference, Seen, Texts
from adapters.served import ServedModel, Written, as_far_as_equal

VOCABULARY = 6


def distribution(likeliest: int, share: float = 0.9) -> np.ndarray[Any, Any]:
    rest = (1 - share) / (VOCABULARY - 1)
    return np.log(np.array([share if token == likeliest else rest for token in range(VOCABULARY)], np.float32))


def known(prompts: list[tuple[int, ...]], answers: list[tuple[int, ...]], stopped: bool = True) -> Known:
    """A reference that gives each token of its answers nine tenths."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows += [distribution(0)] * (len(prompt) - 1) + [distribution(token) for token in answer]
    full = np.array(rows, np.float32)
    seen = Seen(full.max(axis=1), full.argmax(axis=1))
    texts = Texts(tuple(answers), (stopped,) * len(answers))
    return Known(PromptSet("goldens", "goldens", tuple(prompts)), tuple(answers), seen, texts, full)


def written(tokens: tuple[int, ...], share: float = 0.9) -> Written:
    likely = tuple(
        {token: float(value) for token, value in enumerate(distribution(own, share)) if value > np.log(0.015)}
        for own in tokens
    )
    return Written(tokens, likely, True)


def test_equal_texts_are_compared_at_every_token_of_the_answers() -> None:
    wanted, seen = as_far_as_equal(known([(1, 2), (3,)], [(4, 5), (5,)]), [written((4, 5)), written((5,))])
    assert np.allclose(wanted.logprobs, np.log(0.9), atol=1e-6)
    assert np.allclose(seen.logprobs, np.log(0.9), atol=1e-6)
    assert seen.kl is not None
    assert len(seen.logprobs) == 3
    assert np.allclose(seen.kl, 0, atol=1e-6)


def test_nothing_is_compared_beyond_the_first_token_that_differs() -> None:
    wanted, seen = as_far_as_equal(known([(1, 2)], [(4, 5, 3)]), [written((4, 1, 3))])
    assert len(wanted.logprobs) == 2
    assert list(seen.choices == wanted.choices) == [True, False]


@given(share=st.floats(0.2, 0.99))
def test_the_kl_of_the_likeliest_tokens_is_never_more_than_the_whole_one(share: float) -> None:
    _, seen = as_far_as_equal(known([(1,)], [(4,)]), [written((4,), share)])
    mine, theirs = np.exp(distribution(4)), np.exp(distribution(4, share))
    whole = float(np.sum(mine * np.log(mine / theirs)))
    assert seen.kl is not None
    assert -1e-6 <= seen.kl[0] <= whole + 1e-5


class Stored(Reference):
    """A reference that was looked at before."""

    def __init__(self, one: Known) -> None:
        self.questions = Questions((one.of,), frozenset({5}), greedy_tokens=4)
        self.known = {one.of.name: one}


def served(answer: Callable[[httpx.Request], httpx.Response]) -> ServedModel:
    return ServedModel("http://gateway", "support@1", "key", "acme", transport=httpx.MockTransport(answer))


def completion(tokens: tuple[int, ...], share: float = 0.9) -> dict[str, Any]:
    likely = written(tokens, share).likely
    return {
        "finish_reason": "stop",
        "logprobs": {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [each[token] for each, token in zip(likely, tokens, strict=True)],
            "top_logprobs": [{f"token_id:{token}": value for token, value in each.items()} for each in likely],
        },
    }


def test_a_served_adapter_is_asked_greedily_by_token_ids_for_its_tenant() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"choices": [completion((4, 5))]})

    figures = served(answer).hold(Stored(known([(1, 2)], [(4, 5)])))
    body = json.loads(asked[0].content)
    assert (body["model"], body["prompt"], body["temperature"], body["max_tokens"]) == ("support@1", [1, 2], 0, 4)
    assert asked[0].headers["authorization"] == "Bearer key"
    assert asked[0].headers["openai-project"] == "acme"
    goldens = figures["goldens"]
    assert (goldens.top1, goldens.same_text, goldens.stop_rate, goldens.reference_stop_rate) == (1.0, 1.0, 1.0, 1.0)
    assert goldens.max_abs < 1e-5


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(404, json={"error": {"message": "The model 'support@1' does not exist"}}), "does not exist"),
        (httpx.Response(502, text="bad gateway"), "502 bad gateway"),
        (httpx.Response(200, json={"choices": [{"text": "hello"}]}), "did not tell how likely"),
    ],
)
def test_an_answer_that_cannot_be_used_is_told(answer: httpx.Response, says: str) -> None:
    with pytest.raises(MergeError, match=says):
        served(lambda request: answer).hold(Stored(known([(1,)], [(4,)])))


def test_a_gateway_that_is_not_there_is_named() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(MergeError, match="No gateway answers at http://gateway"):
        served(refuse).hold(Stored(known([(1,)], [(4,)])))


def test_an_adapter_is_uploaded_as_a_new_version(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("not part of a version")
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"adapter": "both", "version": 1, "status": "ready"})

    assert served(answer).upload(tmp_path, "both")["version"] == 1
    assert asked[0].url.path == "/v1/adapters"
    assert b"adapter_config.json" in asked[0].content
    assert b"README.md" not in asked[0].content
