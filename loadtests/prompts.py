"""What is asked. A source draws a prompt from a seeded generator, so the same seed asks the same questions."""

import json
from pathlib import Path
from typing import Protocol

import numpy as np

from loadtests.errors import ScenarioError
from loadtests.seeds import generator
from loadtests.shapes import BuiltinPrompts, FilePrompts, Length, Prompts, SyntheticPrompts, length_at
from loadtests.traces import BLOCK_TOKENS, TraceRow

QUESTIONS = (
    "My parcel has not arrived after ten days. What can I do?",
    "How do I change the address of an order I placed this morning?",
    "Explain in two sentences why the sky is blue.",
    "What is the difference between a list and a tuple in Python?",
    "Write a short, friendly reminder that an invoice is overdue.",
    "Which is larger, 3/4 or 5/7? Say how you know.",
    "Summarise the plot of Romeo and Juliet in one sentence.",
    "Give me three ideas for a quick dinner with eggs and spinach.",
    "Translate into French: The train leaves at half past nine.",
    "What should I check before I buy a used bicycle?",
    "Classify the sentiment: The room was clean but the staff was rude.",
    "What does a torque wrench do, and when do I need one?",
    "Name the capital of Australia and one fact about it.",
    "Our meeting moves from Tuesday to Thursday at ten. Write the message.",
    "How many minutes are there in a leap year?",
    "List the steps to reset a forgotten password politely.",
)

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information"
).split()


class PromptSource(Protocol):
    def draw(self, rng: np.random.Generator) -> str: ...


class PromptList:
    """Draws uniformly from a list."""

    def __init__(self, prompts: tuple[str, ...]) -> None:
        self._prompts = prompts

    def draw(self, rng: np.random.Generator) -> str:
        return self._prompts[int(rng.integers(len(self._prompts)))]


class SyntheticSource:
    """Random words, as many as the length says."""

    def __init__(self, words: Length) -> None:
        self._words = words

    def draw(self, rng: np.random.Generator) -> str:
        return random_words(length_at(self._words, rng.random()), rng)


def random_words(count: int, rng: np.random.Generator) -> str:
    """Every word is one token of the usual vocabularies, so this is about `count` tokens."""
    return " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=count))


def text_of(row: TraceRow, rng: np.random.Generator, seed: int, salt: str = "") -> tuple[str, str]:
    """A prompt as long as the recorded one: its blocks, where the trace names them, and what comes after.

    Equal blocks get equal words, with another salt others.
    """
    blocks = [random_words(BLOCK_TOKENS, generator(seed, "block", block, salt)) for block in row.blocks]
    words = " ".join(blocks).split()[: row.prompt_tokens]
    rest = random_words(max(row.prompt_tokens, 1) - len(words), rng)
    return " ".join(words), rest


def load_prompts(spec: Prompts) -> PromptSource:
    """Raises ScenarioError when a prompt file is missing, empty or malformed."""
    match spec:
        case BuiltinPrompts():
            return PromptList(QUESTIONS)
        case SyntheticPrompts():
            return SyntheticSource(spec.words)
        case FilePrompts():
            return PromptList(_read(spec.path))


def _read(path: Path) -> tuple[str, ...]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ScenarioError(str(path), [f"cannot be read: {exc}"]) from exc
    if path.suffix == ".jsonl":
        prompts, faults = [], []
        for number, line in enumerate(lines, 1):
            try:
                prompts.append(str(json.loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError):
                faults.append(f"prompt {number}: expected a JSON object with `prompt`")
        if faults:
            raise ScenarioError(str(path), faults)
        lines = prompts
    if not lines:
        raise ScenarioError(str(path), ["holds no prompts; write one a line"])
    return tuple(lines)
