"""Length and quality of a row: each rule tells what is wrong, or nothing. Pure."""

import re
from collections.abc import Callable, Iterable

from trainer.data.formats import Value, answered, asked, texts_of
from trainer.data.recipe import LengthConfig, QualityConfig

# What UTF-8 looks like once it was read as Latin-1 and written again.
MANGLED = re.compile("\ufffd|Ã[\u0080-\u00bf©¨¤¶¼]|â€[\u0099\u009c\u009d™œ“”]|Â[\u00a0-\u00bf]")
REPEATING_WORDS = 20  # below so many words repetition is no sign of anything
LETTERS_CHARS = 20  # as above, for the share of letters

Rule = Callable[[Value, QualityConfig], str | None]


def length_fault(value: Value, limits: LengthConfig) -> str | None:
    for text in answered(value):
        if len(text) < limits.min_chars:
            return f"answer of {len(text)} characters, fewer than {limits.min_chars}"
        if len(text) > limits.max_chars:
            return f"answer of {len(text)} characters, more than {limits.max_chars}"
    return None


def broken_text(value: Value, limits: QualityConfig) -> str | None:
    found = sum(len(MANGLED.findall(text)) for text in texts_of(value) if not text.isascii())
    return f"{found} broken characters" if found > limits.max_broken_chars else None


def repetition(value: Value, limits: QualityConfig) -> str | None:
    for text in answered(value):
        words = text.split()
        if len(words) >= REPEATING_WORDS:
            share = 1 - len(set(words)) / len(words)
            # a long text repeats its common words; what tells is a share no prose of its length reaches
            if share > max(limits.max_repetition, 1 - 400 / len(words)):
                return f"repeats itself: {share:.0%} of its words came before"
    return None


def few_letters(value: Value, limits: QualityConfig) -> str | None:
    for text in answered(value):
        shown = "".join(text.split())
        if len(shown) >= LETTERS_CHARS:
            share = sum(map(str.isalnum, shown)) / len(shown)
            if share < limits.min_letters:
                return f"only {share:.0%} letters and digits"
    return None


def echo(value: Value, limits: QualityConfig) -> str | None:
    if not limits.refuse_echo or "text" in value:
        return None
    last = asked(value)[-1].strip().casefold()
    return (
        "the answer repeats the question" if any(text.strip().casefold() == last for text in answered(value)) else None
    )


def phrases(value: Value, limits: QualityConfig) -> str | None:
    chosen = answered(value)[:1]  # a rejected answer may well be of the kind that is not wanted
    lowered = [text.lower() for text in chosen]
    for phrase in limits.refuse_phrases:
        if any(phrase.lower() in text for text in lowered):
            return f'holds the phrase "{phrase}"'
    return None


RULES: tuple[Rule, ...] = (broken_text, repetition, few_letters, echo, phrases)


def quality_fault(value: Value, limits: QualityConfig, rules: Iterable[Rule] = RULES) -> str | None:
    """The first rule's complaint."""
    return next((fault for rule in rules if (fault := rule(value, limits)) is not None), None)
