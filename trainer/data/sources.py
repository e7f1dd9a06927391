"""What the files inside the packages look like, and how each becomes chat rows. Reads bytes, imports nothing of them."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainer.data.chat import Row
from trainer.errors import FetchError

ENTITY = re.compile(r"(?:^|, )(?P<name>.+?) - (?P<kind>PERSON|ORGANIZATION|LOCATION)(?=, |$)")
ENTITY_KINDS = ("person", "organization", "location")
NO_ENTITIES = "No entities found"


def chat_row(system: str, question: str, answer: str) -> Row:
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def labelled_tab(content: bytes, *, system: str, max_words: int) -> Iterator[Row]:
    """Orange's tab format: three header lines, then label and text. Texts are cut to max_words."""
    lines = csv.reader(io.StringIO(content.decode("utf-8")), delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, fields in enumerate(lines):
        if number >= 3 and len(fields) == 2 and fields[1].strip():
            yield chat_row(system, " ".join(fields[1].split()[:max_words]), fields[0])


def entities_as_json(ideal: str) -> str:
    """`[Bank - ORGANIZATION, Ann Lee - PERSON]` as one JSON object of lists, each name once, in order of appearance."""
    found: dict[str, list[str]] = {kind: [] for kind in ENTITY_KINDS}
    if ideal != NO_ENTITIES:
        for match in ENTITY.finditer(ideal.removeprefix("[").removesuffix("]")):
            names = found[match["kind"].lower()]
            if match["name"] not in names:
                names.append(match["name"])
    return json.dumps(found, ensure_ascii=False)


def named_entities(content: bytes, *, system: str, max_words: int, keep_empty: float) -> Iterator[Row]:
    """Chat samples with an "ideal" list of entities. Longer sentences are left out, and so are rows without any entity
    beyond a share of keep_empty: more than half of a contract names nobody."""
    empty = filled = 0
    for line in content.decode("utf-8").splitlines():
        sample: dict[str, Any] = json.loads(line)
        text, ideal = sample["input"][-1]["content"], sample["ideal"]
        if len(text.split()) > max_words:
            continue
        if ideal == NO_ENTITIES:
            if empty + 1 > keep_empty * (filled + empty + 1):
                continue
            empty += 1
        else:
            filled += 1
        yield chat_row(system, text, entities_as_json(ideal))


LETTERS = "ABCDE"
MULTIPLE_CHOICE = "Answer with the letter of the right choice only."


def question_row(question: str, answer: str) -> Row:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def choices_row(question: str, choices: Sequence[str], right: int) -> Row:
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return question_row(f"{question}\n{listed}\n{MULTIPLE_CHOICE}", LETTERS[right])


def _json_lines(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.decode("utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def mmlu(content: bytes) -> Iterator[Row]:
    """One object a line: question, answer_a … answer_d, correct_answer. Rows that are table headers are left out."""
    for row in _json_lines(content):
        if row["correct_answer"] in LETTERS[:4]:
            choices = [str(row[f"answer_{letter}"]) for letter in "abcd"]
            yield choices_row(str(row["question"]), choices, LETTERS.index(row["correct_answer"]))


def hellaswag(content: bytes) -> Iterator[Row]:
    for row in _json_lines(content):
        yield choices_row(f"How does this go on?\n{row['ctx']} …", row["endings"], row["expected_index"])


def gsm8k(content: bytes) -> Iterator[Row]:
    for row in _json_lines(content):
        yield question_row(f"{row['prompt']}\nEnd your answer with the number.", str(row["expected"]).replace(",", ""))


def injections(content: bytes) -> Iterator[Row]:
    """Labelled attacks on prompts and harmless look-alikes; the answer of a row is `attack` or `benign`."""
    for row in _json_lines(content):
        yield question_row(row["text"], "attack" if row["label"] == "malicious" else "benign")


def plain_lines(content: bytes, *, answer: str) -> Iterator[Row]:
    """A request a line, all with the same wanted answer."""
    for line in content.decode("utf-8").splitlines():
        if line.strip():
            yield question_row(line.strip(), answer)


CONVERTERS: Mapping[str, Callable[..., Iterator[Row]]] = {
    "labelled-tab": labelled_tab,
    "named-entities": named_entities,
    "mmlu": mmlu,
    "hellaswag": hellaswag,
    "gsm8k": gsm8k,
    "injections": injections,
    "plain-lines": plain_lines,
}


def convert(kind: str, content: bytes, options: Mapping[str, Any]) -> list[Row]:
    """Raises FetchError where the file is not what the converter knows."""
    try:
        rows = list(CONVERTERS[kind](content, **options))
    except (KeyError, IndexError, TypeError, ValueError, csv.Error) as exc:
        raise FetchError(f"The file is not what the converter '{kind}' reads ({type(exc).__name__}: {exc}).") from exc
    if not rows:
        raise FetchError(f"The converter '{kind}' found no rows in the file.")
    return rows
