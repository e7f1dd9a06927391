"""A model that judges answers, through any OpenAI endpoint: two beside each other in both orders, or one by a rubric.

A judge leans to what it reads first; a pair counts as won only where the verdict survives a change of places (Zheng et al.
2023, section 3.4). Answers are kept, so that asking again costs nothing.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.data.chat import Row
from trainer.errors import EvaluationError
from trainer.evaluation.client import Answer, ChatClient

Verdict = Literal["first", "second", "tie"]
VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
SWAPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}
CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
GRADE = re.compile(r"\[\[\s*(\d+)\s*\]\]")

PAIRWISE = """You compare two answers to the same request. {rubric}
{reference}Ignore the order of the answers and their length. Explain in one or two sentences, then end with your verdict on a \
line of its own: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if neither is."""
POINTWISE = """You grade an answer to a request from 1 (useless) to {best} (nothing to improve). {rubric}
{reference}Explain in one or two sentences, then end with the grade on a line of its own, such as [[3]]."""


class JudgeConfig(BaseModel):
    """Who judges, by which rubric."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="An OpenAI endpoint, without /v1.")
    model: str
    key_env: str = Field("JUDGE_API_KEY", description="Environment variable with its API key.")
    rubric: str = Field(
        "Judge whether the answer does what was asked, is right, and says no more than is useful.",
        description="What makes an answer good, in a sentence or two.",
    )
    pairwise: bool = Field(True, description="The adapter's answer beside the rival's.")
    pointwise: bool = Field(False, description="Each answer by itself, from 1 to `best`.")
    rival: Literal["base", "few-shot", "predecessor"] = "few-shot"
    best: int = Field(5, gt=1, description="Highest grade.")
    show_reference: bool = Field(True, description="Show the judge the wanted answer.")
    max_tokens: int = Field(256, gt=0)
    concurrency: int = Field(4, gt=0)
    timeout_s: float = Field(120.0, gt=0)
    input_price: float = Field(0.0, ge=0, description="Per million prompt tokens; the currency is yours.")
    output_price: float = Field(0.0, ge=0, description="Per million output tokens.")

    @property
    def rubric_sha256(self) -> str:
        """Of everything that shapes a verdict: another rubric is another judge."""
        shaping = (self.rubric, self.best, self.show_reference, PAIRWISE, POINTWISE)
        return hashlib.sha256(json.dumps(shaping).encode()).hexdigest()

    def key(self) -> str:
        """Raises EvaluationError where the environment has none."""
        found = os.environ.get(self.key_env)
        if not found:
            raise EvaluationError(f"The judge needs an API key: set {self.key_env}.")
        return found


@dataclass(frozen=True)
class Pair:
    """Two answers to one request."""

    prompt: Row
    first: str
    second: str
    wanted: str = ""


@dataclass(frozen=True)
class Opinion:
    """A judge's verdict on a pair, asked in both orders. None: it gave none that can be read."""

    straight: Verdict | None
    swapped: Verdict | None  # as of the pair's own order

    @property
    def verdict(self) -> Verdict:
        """What holds in both orders; otherwise neither is better."""
        return self.straight if self.straight is not None and self.straight == self.swapped else "tie"

    @property
    def readable(self) -> bool:
        return self.straight is not None and self.swapped is not None

    @property
    def flipped(self) -> bool:
        """The order decided: each order names another winner, or one names none."""
        return self.readable and self.straight != self.swapped


@dataclass(frozen=True)
class Spent:
    """What judging took. asked: requests that were sent; kept: answers that were known already."""

    asked: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


def pair_messages(config: JudgeConfig, pair: Pair, *, swapped: bool) -> Row:
    a, b = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    said = PAIRWISE.format(rubric=config.rubric, reference=_reference(config, pair.wanted))
    asked = f"{_conversation(pair.prompt)}\n\n### Answer A\n{a}\n\n### Answer B\n{b}"
    return [{"role": "system", "content": said}, {"role": "user", "content": asked}]


def grade_messages(config: JudgeConfig, prompt: Row, answer: str, wanted: str = "") -> Row:
    said = POINTWISE.format(rubric=config.rubric, best=config.best, reference=_reference(config, wanted))
    return [
        {"role": "system", "content": said},
        {"role": "user", "content": f"{_conversation(prompt)}\n\n### Answer\n{answer}"},
    ]


def read_choice(text: str, *, swapped: bool) -> Verdict | None:
    """The last verdict in the judge's answer, as of the pair's own order."""
    found = CHOICE.findall(text)
    verdict = VERDICTS[found[-1]] if found else None
    return SWAPPED[verdict] if verdict is not None and swapped else verdict


def read_grade(text: str, *, best: int) -> int | None:
    found = [int(grade) for grade in GRADE.findall(text)]
    return found[-1] if found and 1 <= found[-1] <= best else None


def _reference(config: JudgeConfig, wanted: str) -> str:
    return f"A right answer is:\n{wanted}\n" if config.show_reference and wanted else ""


def _conversation(prompt: Row) -> str:
    return "\n\n".join(f"### {message['role'].capitalize()}\n{message['content']}" for message in prompt)


class Judge:
    """Asks, remembers and counts. cache: a file that grows by a line for each answer; none: nothing is kept."""

    def __init__(self, config: JudgeConfig, client: ChatClient, cache: Path | None = None) -> None:
        self.config = config
        self._client = client
        self._cache = cache
        self._known = _read_cache(cache) if cache is not None and cache.is_file() else {}
        self.spent = Spent()

    async def compare(self, pairs: Sequence[Pair], advance: Callable[[], None] = lambda: None) -> list[Opinion]:
        """Two requests a pair. Raises EvaluationError."""
        prompts = [pair_messages(self.config, pair, swapped=swapped) for pair in pairs for swapped in (False, True)]
        said = await self._ask(prompts, advance)
        return [
            Opinion(read_choice(said[2 * index], swapped=False), read_choice(said[2 * index + 1], swapped=True))
            for index in range(len(pairs))
        ]

    async def grade(
        self, rows: Sequence[tuple[Row, str, str]], advance: Callable[[], None] = lambda: None
    ) -> list[int | None]:
        """rows: prompt, answer, wanted. Raises EvaluationError."""
        said = await self._ask([grade_messages(self.config, *row) for row in rows], advance)
        return [read_grade(text, best=self.config.best) for text in said]

    async def _ask(self, prompts: Sequence[Row], advance: Callable[[], None]) -> list[str]:
        keys = [_cache_key(self.config.model, self.config.max_tokens, prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}
        for _ in range(len(prompts) - len(new)):
            advance()

        def keep(key: str, answer: Answer) -> None:
            self._known[key] = answer.text
            self._count(answer)
            if self._cache is not None:
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                with self._cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "text": answer.text}, ensure_ascii=False) + "\n")

        waiting = list(new)
        await self._client.answers(
            self.config.model,
            list(new.values()),
            max_tokens=self.config.max_tokens,
            concurrency=self.config.concurrency,
            advance=advance,
            arrived=lambda index, answer: keep(waiting[index], answer),
        )
        self.spent = _plus(self.spent, kept=len(prompts) - len(new))
        return [self._known[key] for key in keys]

    def _count(self, answer: Answer) -> None:
        cost = answer.prompt_tokens * self.config.input_price + answer.output_tokens * self.config.output_price
        self.spent = _plus(
            self.spent,
            asked=1,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            cost=cost / 1e6,
        )


def _plus(spent: Spent, **more: Any) -> Spent:
    return Spent(**{name: getattr(spent, name) + more.get(name, 0) for name in vars(spent)})


def _cache_key(model: str, max_tokens: int, prompt: Row) -> str:
    return hashlib.sha256(json.dumps([model, max_tokens, prompt]).encode()).hexdigest()


def _read_cache(path: Path) -> dict[str, str]:
    """A line that was cut off by an interruption is asked again."""
    known: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            known[entry["key"]] = entry["text"]
        except (ValueError, LookupError, TypeError):
            continue
    return known
