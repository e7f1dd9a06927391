"""Everything that is decided row by row: read, validated, normalised, measured, cleaned, compared with benchmarks, digested.

A chunk of raw rows goes in, and what is left of it comes out with its numbers: chunks are independent, so several processes
work on them and the outcome does not depend on how many.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from trainer.data.agreement import Pair
from trainer.data.chunks import Chunk
from trainer.data.contamination import Benchmark, Decontaminator
from trainer.data.digests import BANDS, PERMUTATIONS, Signer, bands, said
from trainer.data.formats import Value, answered, texts_of, to_value, with_system, with_texts
from trainer.data.normal import normalise
from trainer.data.privacy import PersonalData
from trainer.data.reading import pieces
from trainer.data.recipe import BuildConfig
from trainer.data.rules import length_fault, quality_fault

STEPS = (
    "validate",
    "length",
    "quality",
    "privacy",
    "decontaminate",
    "exact duplicates",
    "near duplicates",
    "leakage",
    "balance",
    "mix",
)
LABEL_CHARS = 64  # an answer that is longer is no class
_NUMBER = re.compile(r"\d[\d,.]*")
_QUOTED = re.compile(r": '.*'$")


@dataclass(frozen=True)
class Refining:
    """What every process knows."""

    config: BuildConfig
    boilerplate: tuple[frozenset[int], ...]  # by source
    benchmarks: tuple[Benchmark, ...]


@dataclass
class Refined:
    """What is left of a chunk, and what was seen on the way."""

    source: int
    rows: bytes = b""
    sizes_bytes: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    labels: list[str | None] = field(default_factory=list)
    rejected: bytes = b""
    read: int = 0
    pieces: int = 0  # rows that came of texts cut in pieces, beyond one for each text
    normalised: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (step, reason without its numbers)
    personal: Counter[str] = field(default_factory=Counter)
    personal_rows: int = 0
    contaminated: Counter[str] = field(default_factory=Counter)
    agreed: Counter[tuple[Pair, Pair]] = field(default_factory=Counter)  # (annotators, labels)


@dataclass(frozen=True)
class Rejection:
    step: str
    reason: str


@dataclass(frozen=True)
class Kept:
    value: Value
    label: str | None
    line: int


def rejected_line(line: int, source: str, rejection: Rejection, row: Any) -> bytes:
    """One line of rejected.jsonl. row: the parsed row, or the line's text where it could not be parsed."""
    told = {"line": line, "source": source, "reason": rejection.reason, "step": rejection.step, "row": row}
    return orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE)


def kind_of(reason: str) -> str:
    """A reason without its numbers and quotations, so that equal ones can be counted."""
    return _NUMBER.sub("…", _QUOTED.sub("", reason))


def refining(know: Refining) -> Callable[[Chunk], Refined]:
    return Refinery(know).refine


class Refinery:
    """Refines chunks, in one process."""

    def __init__(self, know: Refining) -> None:
        self._know = know
        self._config = know.config
        self._personal = PersonalData(know.config.privacy)
        self._decontaminator = Decontaminator(know.benchmarks)
        self._signer = Signer()
        self._held_out = len(know.config.evaluation)  # sources before this place are evaluated with, not trained on

    def refine(self, chunk: Chunk) -> Refined:
        done = Refined(chunk.source)
        kept: list[Kept] = []
        rejected: list[bytes] = []
        for line, data in chunk.rows:
            done.read += 1
            raw = _parse(data)
            found = self._values(raw, chunk.source)
            if isinstance(found, Rejection):
                self._reject(done, rejected, chunk, line, found, raw.text if isinstance(raw, NotJson) else raw)
                continue
            done.pieces += len(found) - 1
            self._count_agreement(done, raw)
            for value in found:
                refined = self._refine(value, chunk.source, done)
                if isinstance(refined, tuple):
                    rejection, shown = refined
                    self._reject(done, rejected, chunk, line, rejection, shown)
                else:
                    kept.append(Kept(refined, self._label(raw, refined), line))
        done.rejected = b"".join(rejected)
        self._measure(done, kept, chunk.source)
        return done

    def _reject(
        self, done: Refined, rejected: list[bytes], chunk: Chunk, line: int, rejection: Rejection, row: Any
    ) -> None:
        done.reasons[rejection.step, kind_of(rejection.reason)] += 1
        rejected.append(rejected_line(line, chunk.origin, rejection, row))

    def _values(self, raw: Any, source: int) -> list[Value] | Rejection:
        """The rows that one raw row makes: one, or the pieces of a long text."""
        given = self._config.all_sources[source]
        if isinstance(raw, NotJson):
            return Rejection("validate", raw.fault)
        value = to_value(raw, self._config.format, None if given.format == "auto" else given.format)
        if isinstance(value, str):
            return Rejection("validate", value)
        limit = self._config.length.max_chars
        if "text" in value and len(value["text"]) > limit:
            lines = enumerate(value["text"].splitlines(), start=1)
            return [{"text": piece} for _, piece in pieces(lines, limit)]
        return [with_system(value, given.system)]

    def _refine(self, value: Value, source: int, done: Refined) -> Value | tuple[Rejection, Value]:
        texts = texts_of(value)
        plain = [normalise(text) for text in texts]
        if plain != texts:
            done.normalised += 1
            value = with_texts(value, plain)
            if not all(plain):
                return Rejection("validate", "a message holds invisible signs only"), value
        fault = length_fault(value, self._config.length)
        if fault is not None:
            return Rejection("length", fault), value
        fault = quality_fault(value, self._config.quality)
        if fault is not None:
            return Rejection("quality", fault), value
        cleaned = self._personal.clean(plain)
        if cleaned.found:
            done.personal.update(cleaned.found)
            done.personal_rows += 1
            value = with_texts(value, cleaned.texts)
            if self._config.privacy.action == "reject":
                kinds = ", ".join(sorted(cleaned.found))
                return Rejection("privacy", f"personal data: {kinds}"), value
        if source >= self._held_out:
            hit = self._decontaminator.find(value)
            if hit is not None:
                done.contaminated[hit.benchmark] += 1
                return Rejection("decontaminate", hit.how), value
        return value

    def _label(self, raw: Any, value: Value) -> str | None:
        """The row's class; none where the answer is no class."""
        if self._config.balance is not None and self._config.balance.label is not None:
            given = raw.get(self._config.balance.label)
            return None if given is None else str(given)
        if "messages" not in value:
            return None
        answer = answered(value)[0]
        return answer if len(answer) <= LABEL_CHARS and "\n" not in answer else None

    def _count_agreement(self, done: Refined, raw: Any) -> None:
        if self._config.agreement is None:
            return
        for pair in itertools.combinations(self._config.agreement.fields, 2):
            labels = [raw.get(name) for name in pair]
            if all(label is not None and label != "" for label in labels):
                done.agreed[pair, (str(labels[0]), str(labels[1]))] += 1

    def _measure(self, done: Refined, kept: list[Kept], source: int) -> None:
        """Digests, bands and lengths of the rows that are left."""
        lines = [orjson.dumps(row.value, option=orjson.OPT_APPEND_NEWLINE) for row in kept]
        words = [said(row.value) for row in kept]
        done.rows = b"".join(lines)
        done.sizes_bytes = np.array([len(line) for line in lines], dtype=np.uint32)
        done.labels = [row.label for row in kept]
        prompts = np.empty((len(kept), PERMUTATIONS), dtype=np.uint32)
        wholes = np.empty_like(prompts)
        boilerplate = self._know.boilerplate[source]
        for place, each in enumerate(words):
            prompt, answer = each.shingles(boilerplate)
            prompts[place] = self._signer.sign(prompt)
            wholes[place] = np.minimum(prompts[place], self._signer.sign(answer)) if answer else prompts[place]
        by_text = bands(wholes)
        by_prompt = by_text if self._config.format == "text" else bands(prompts)
        done.columns = {
            "source": np.full(len(kept), source, dtype=np.uint16),
            "line": np.array([row.line for row in kept], dtype=np.uint64),
            "exact": np.array([each.exact for each in words], dtype=np.uint64),
            "asked": np.array([each.asked for each in words], dtype=np.uint64),
            "chars": np.array([sum(map(len, answered(row.value)[:1])) for row in kept], dtype=np.uint32),
            **{f"text{band}": by_text[:, band] for band in range(BANDS)},
            **{f"prompt{band}": by_prompt[:, band] for band in range(BANDS) if self._config.format != "text"},
        }


def column_types(config: BuildConfig) -> dict[str, Any]:
    """Of everything `Refined.columns` holds, and `label`, whose numbers the builder gives."""
    kinds = ("text",) if config.format == "text" else ("text", "prompt")
    return {
        "source": np.uint16,
        "line": np.uint64,
        "exact": np.uint64,
        "asked": np.uint64,
        "chars": np.uint32,
        "label": np.uint16,
        **{f"{kind}{band}": np.uint64 for kind in kinds for band in range(BANDS)},
    }


@dataclass(frozen=True)
class NotJson:
    """A line that could not be parsed."""

    fault: str
    text: str


def _parse(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        return NotJson(f"not JSON: {exc.msg} at column {exc.colno}", data.decode("utf-8", "replace"))


def sample_values(rows: Iterable[tuple[int, bytes]], config: BuildConfig, source: int) -> list[Value]:
    """The rows as they are before anything is decided, without faulty ones: to learn a source's form from."""
    given = config.all_sources[source]
    wanted = None if given.format == "auto" else given.format
    found = (to_value(_parse(data), config.format, wanted) for _, data in rows)
    return [value for value in found if not isinstance(value, str)]
