"""A served model, asked over the OpenAI interface: greedy texts with how likely each token was, and uploads of new versions."""

import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from adapters.errors import MergeError
from adapters.home import home
from adapters.ladder import Divergence
from adapters.parity import Figures, Known, Questions, Reference, Seen, Texts, compare, compare_all, with_texts
from adapters.peft_format import FILES

TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # an upload is answered when the adapter was probed, behind other loads
CANDIDATES = 5  # likeliest tokens told for each: what OpenAI's completions allow
_TOKEN = "token_id:"  # noqa: S105 - how vLLM spells a token by its number


@dataclass(frozen=True)
class Written:
    """A greedy text as it was served."""

    tokens: tuple[int, ...]
    likely: tuple[Mapping[int, float], ...]  # for each token, the likeliest ones with their log-probabilities
    stopped: bool


@dataclass(frozen=True)
class ServedModel:
    """A model by the name callers use, behind a gateway or any engine that speaks vLLM's completions.

    transport: a stand-in for the network, for tests.
    """

    url: str
    model: str
    key: str
    tenant: str | None = None
    transport: httpx.BaseTransport | None = None

    def write(self, prompts: Sequence[Sequence[int]], questions: Questions) -> list[Written]:
        """Raises MergeError."""
        with self._client() as client:
            return [self._write(client, prompt, questions) for prompt in prompts]

    def hold(self, reference: Reference) -> Figures:
        """How far what is served is from the reference, as far as both write the same tokens. Raises MergeError."""
        found: dict[str, Divergence] = {}
        everything: list[tuple[Seen, Seen]] = []
        for name, known in reference.known.items():
            written = self.write(known.of.prompts, reference.questions)
            wanted, seen = as_far_as_equal(known, written)
            texts = Texts(tuple(one.tokens for one in written), tuple(one.stopped for one in written))
            found[name] = with_texts(compare(wanted, seen), known.texts, texts)
            everything.append((wanted, seen))
        return found | {"all": compare_all(everything)}

    def upload(self, folder: Path, name: str) -> dict[str, Any]:
        """The adapter as a new version of `name`, tried on the engine. Raises MergeError with the gateway's reason."""
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for each in sorted(FILES):
                if (folder / each).is_file():
                    file.writestr(zipfile.ZipInfo(each), (folder / each).read_bytes())
        with self._client() as client:
            parts = {"file": (f"{name}.zip", archive.getvalue(), "application/zip")}
            return self._answer(client.post("/v1/adapters", params={"wait": "true"}, data={"name": name}, files=parts))

    def _write(self, client: httpx.Client, prompt: Sequence[int], questions: Questions) -> Written:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": questions.greedy_tokens,
            "temperature": 0,
            "logprobs": CANDIDATES,
            "return_tokens_as_token_ids": True,
        }
        try:
            choice = self._answer(client.post("/v1/completions", json=body))["choices"][0]
            logprobs = choice["logprobs"]
            tokens = tuple(_number(token) for token in logprobs["tokens"])
            likely = tuple(
                {_number(token): float(value) for token, value in (more or {}).items()} | {own: float(chosen)}
                for own, chosen, more in zip(tokens, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            )
        except (LookupError, TypeError, ValueError) as exc:
            raise MergeError(f"{self.url} did not tell how likely the tokens of an answer are.") from exc
        return Written(tokens, likely, choice.get("finish_reason") == "stop")

    @contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        headers = {"authorization": f"Bearer {self.key}"} | ({"openai-project": self.tenant} if self.tenant else {})
        try:
            with httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT, transport=self.transport) as client:
                yield client
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise MergeError(f"No gateway answers at {self.url}: {exc or type(exc).__name__}.") from exc

    def _answer(self, response: httpx.Response) -> dict[str, Any]:
        if response.is_success:
            return dict(response.json())
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = response.text[:300]
        raise MergeError(f"{self.url} refused '{self.model}': {response.status_code} {message}")


def find_key(url: str) -> str:
    """LORIKEET_API_KEY, else the operator's key of a gateway on this machine. Raises MergeError where there is neither."""
    key = os.environ.get("LORIKEET_API_KEY") or home().operator_key_for(url)
    if not key:
        raise MergeError(f"There is no API key for {url}. Set LORIKEET_API_KEY.")
    return key


def as_far_as_equal(known: Known, written: Sequence[Written]) -> tuple[Seen, Seen]:
    """Reference and served, at each token of the answers before which both wrote the same.

    The KL divergence is that of the likeliest tokens and of the rest together, which is never more than the whole one.
    Raises MergeError when not a token can be compared.
    """
    rows = []
    for start, answer, one in zip(known.first_rows(), known.answers, written, strict=True):
        for place, (wanted, likely) in enumerate(zip(answer, one.likely, strict=False)):
            logprobs = np.asarray(known.full[start + place], np.float64)
            own = max(likely, key=lambda token: likely[token])
            if wanted in likely:
                rows.append((logprobs[wanted], likely[wanted], int(logprobs.argmax()), own, _kl(logprobs, likely)))
            else:  # compared at what was written instead: the token wanted is not among the likeliest
                rows.append((logprobs[own], likely[own], int(logprobs.argmax()), own, _kl(logprobs, likely)))
            if one.tokens[place] != wanted:
                break
    if not rows:
        raise MergeError("The served model wrote nothing to compare.")
    reference, served, first, own_first, kl = (np.array(column) for column in zip(*rows, strict=True))
    return (
        Seen(reference.astype(np.float32), first.astype(np.int64), np.zeros(len(rows))),
        Seen(served.astype(np.float32), own_first.astype(np.int64), kl.astype(np.float64)),
    )


def _kl(reference: np.ndarray[Any, Any], likely: Mapping[int, float]) -> float:
    tokens = list(likely)
    known = [(float(reference[token]), likely[token]) for token in tokens]
    total = sum(math.exp(wanted) * (wanted - given) for wanted, given in known)
    rest = 1 - sum(math.exp(wanted) for wanted, _ in known)
    rest_given = 1 - sum(math.exp(given) for _, given in known)
    if rest > 1e-9 and rest_given > 1e-9:
        total += rest * math.log(rest / rest_given)
    return max(total, 0.0)


def _number(token: str) -> int:
    return int(token.removeprefix(_TOKEN))
