"""Is one model the same as another? Measured on log-probabilities and greedy texts of real prompts, with torch.

The reference is looked at once; its distributions lie in a file, so that one model is in memory at a time, and each other model
is held against them. Needs about four bytes a parameter in float32, and on the disk a vocabulary's row for each token.
"""

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from adapters.base import BaseModelInfo, Report
from adapters.errors import MergeError
from adapters.ladder import Divergence
from adapters.manifest import Golden
from adapters.tensors import TensorFile
from adapters.wording import one_line

MAX_PROMPTS = 16  # of each set
MAX_BATCH_TOKENS = 1024  # their logits over a vocabulary of 50,000 take 200 MB
MAX_TOKENS = 256  # of one prompt with its answer: parity shows within a few dozen
GREEDY_TOKENS = 32  # enough to see short answers end; each costs a step of every model
BYTES_PER_PARAMETER = 4.5  # float32 and some room
TORCH_BYTES = 1 << 30  # torch, transformers and peft, imported
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "My order has not arrived. What can I do?",
    "Translate to German: The train leaves at noon.",
    "List three prime numbers larger than ten.",
    "Summarise: The meeting was moved from Monday to Tuesday because the room was taken.",
)

Figures = Mapping[str, Divergence]  # by name of the prompt set; "all" for both together


@dataclass(frozen=True)
class PromptSet:
    """Prompts in token ids, with the answers to compare on; none: the reference's own greedy ones."""

    name: str  # goldens or sample
    source: str
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Questions:
    """What models are asked: one or two sets of prompts, and when a greedy text ends."""

    sets: tuple[PromptSet, ...]
    stop_ids: frozenset[int]
    greedy_tokens: int = GREEDY_TOKENS

    @property
    def source(self) -> str:
        return " and ".join(each.source for each in self.sets)


@dataclass(frozen=True)
class Seen:
    """What a model makes of the sequences of a set, one value for each token after the first, in order."""

    logprobs: NDArray[np.float32]  # of the token that comes next
    choices: NDArray[np.int64]  # its own first choice
    kl: NDArray[np.float64] | None = None  # from the reference


@dataclass(frozen=True)
class Texts:
    """Greedy continuations of a set's prompts, up to and including the first stop token."""

    tokens: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]

    @property
    def stop_rate(self) -> float:
        return sum(self.stopped) / len(self.stopped)


@dataclass(frozen=True)
class Known:
    """What the reference makes of one set."""

    of: PromptSet
    answers: tuple[tuple[int, ...], ...]
    seen: Seen
    texts: Texts
    full: NDArray[np.float32]  # [tokens after the first of all sequences, vocabulary], in a file

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        return [(*prompt, *answer) for prompt, answer in zip(self.of.prompts, self.answers, strict=True)]

    def first_rows(self) -> list[int]:
        """For each sequence, the row of `full` that says how likely the first token of its answer is."""
        rows, start = [], 0
        for prompt, answer in zip(self.of.prompts, self.answers, strict=True):
            rows.append(start + len(prompt) - 1)
            start += len(prompt) + len(answer) - 1
        return rows


def questions_for(
    base: Path,
    info: BaseModelInfo,
    goldens: Sequence[Golden],
    *,
    prompts: Path | None = None,
    greedy_tokens: int = GREEDY_TOKENS,
) -> Questions:
    """The adapter's goldens, and a sample: a file of prompts, else default ones in the base's template, else, for want of a
    tokenizer, random tokens.

    prompts: JSONL of {"messages": […]}, {"prompt": text or messages} or {"text": …}; answers in it are left away.
    Raises MergeError for a file that cannot be read.
    """
    limit = max(1, min(greedy_tokens, info.context_tokens // 2))
    longest = max(1, min(MAX_TOKENS, info.context_tokens) - limit)
    sets = []
    if goldens:
        chosen = goldens[:MAX_PROMPTS]
        sets.append(
            PromptSet(
                "goldens",
                "goldens",
                tuple(tuple(golden.prompt_token_ids[-longest:]) for golden in chosen),
                tuple(tuple(golden.completion_token_ids[:limit]) for golden in chosen),
            )
        )
    source, ids = _sample(base, info, prompts)
    sets.append(PromptSet("sample", source, tuple(tuple(one[-longest:]) for one in ids[:MAX_PROMPTS])))
    return Questions(tuple(sets), stop_ids(base), limit)


def stop_ids(folder: Path) -> frozenset[int]:
    """End-of-turn tokens by generation_config.json, else config.json; empty where neither names one."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def _sample(base: Path, info: BaseModelInfo, prompts: Path | None) -> tuple[str, list[list[int]]]:
    if (base / "tokenizer.json").is_file() or (base / "tokenizer.model").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        conversations = [[{"role": "user", "content": text}] for text in PROMPTS] if not prompts else read_rows(prompts)
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if isinstance(messages, list)
            else messages
            for messages in conversations[:MAX_PROMPTS]
        ]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return (prompts.name if prompts else "default prompts"), [one for one in ids if one]
    if prompts:
        raise MergeError(f"{base} has no tokenizer, so the prompts in {prompts} cannot be asked.")
    rng = np.random.default_rng(0)
    shape = (8, min(32, info.context_tokens // 2))
    return "random tokens", rng.integers(0, info.vocab_size, shape).tolist()


def read_rows(path: Path) -> list[Any]:
    """Prompts of a JSONL file: chats without their last answer, or texts. Raises MergeError naming the line."""
    found: list[Any] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if len(found) == MAX_PROMPTS:
                break
            try:
                row = json.loads(line)
                prompt = row.get("messages") or row.get("prompt") or row["text"]
                if isinstance(prompt, list):
                    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
                    prompt = [{"role": one["role"], "content": one["content"]} for one in prompt[: last + 1]]
                found.append(prompt)
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise MergeError(f"{path}, line {number}, holds no prompt: {one_line(exc)}.") from exc
    if not found:
        raise MergeError(f"{path} holds no prompts.")
    return found


class Reference:
    """A model that others are held against. Its distributions are kept in `folder`, which has to outlive it."""

    def __init__(self, model: Any, questions: Questions, folder: Path) -> None:
        """Looks at the model: greedy texts, then every distribution along prompts and answers."""
        self.questions = questions
        self.known: dict[str, Known] = {}
        for each in questions.sets:
            texts = greedy(model, each.prompts, questions)
            answers = each.answers or texts.tokens
            sequences = [(*prompt, *answer) for prompt, answer in zip(each.prompts, answers, strict=True)]
            seen, full = look(model, sequences, store=folder / f"{each.name}.distributions")
            self.known[each.name] = Known(each, answers, seen, texts, full)

    @property
    def tokens(self) -> int:
        """That are compared."""
        return sum(known.seen.logprobs.size for known in self.known.values())

    def hold(self, model: Any, *, texts: bool = True) -> dict[str, Divergence]:
        """How far another model is, by set and over all. texts: whether it is to write greedy texts as well."""
        found: dict[str, Divergence] = {}
        everything: list[tuple[Seen, Seen]] = []
        for name, known in self.known.items():
            seen, _ = look(model, known.sequences, against=known.full)
            written = greedy(model, known.of.prompts, self.questions) if texts else None
            found[name] = compare(known.seen, seen, known.texts if texts else None, written)
            everything.append((known.seen, seen))
        return found | {"all": compare_all(everything)}


def compare(reference: Seen, other: Seen, wanted: Texts | None = None, written: Texts | None = None) -> Divergence:
    """Figures of one set. wanted and written: the greedy texts of both, where they are to be told."""
    apart = np.abs(other.logprobs - reference.logprobs)
    figures = Divergence(
        max_abs=float(apart.max()),
        mean_abs=float(apart.mean()),
        top1=float((other.choices == reference.choices).mean()),
        kl=float(other.kl.mean()) if other.kl is not None else None,
        tokens=apart.size,
    )
    return figures if wanted is None or written is None else with_texts(figures, wanted, written)


def with_texts(figures: Divergence, wanted: Texts, written: Texts) -> Divergence:
    """The same with stop rates and the share of equal greedy texts."""
    same = [a == b for a, b in zip(wanted.tokens, written.tokens, strict=True)]
    return Divergence(
        figures.max_abs,
        figures.mean_abs,
        figures.top1,
        figures.kl,
        figures.tokens,
        prompts=len(same),
        stop_rate=written.stop_rate,
        reference_stop_rate=wanted.stop_rate,
        same_text=sum(same) / len(same),
    )


def compare_all(pairs: Sequence[tuple[Seen, Seen]]) -> Divergence:
    """Figures over several sets. pairs: the reference's and the other's of each."""
    return compare(_joined([wanted for wanted, _ in pairs]), _joined([seen for _, seen in pairs]))


def _joined(parts: Sequence[Seen]) -> Seen:
    kl = [part.kl for part in parts if part.kl is not None]
    return Seen(
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.choices for part in parts]),
        np.concatenate(kl) if kl else None,
    )


def look(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    store: Path | None = None,
    against: NDArray[np.float32] | None = None,
) -> tuple[Seen, NDArray[np.float32]]:
    """One forward pass for a group of sequences: on busy cores every pass costs its many thread barriers.

    store: a file to write the log-probabilities of the whole vocabulary to. against: such ones of a reference, to tell the
    KL divergence from. Returns what was seen, and the stored ones (empty where nothing was stored).
    """
    import torch

    starts = np.cumsum([0, *(len(ids) - 1 for ids in sequences)])
    total = int(starts[-1])
    following, choices = np.zeros(total, np.float32), np.zeros(total, np.int64)
    kl = np.zeros(total, np.float64) if against is not None else None
    full: NDArray[np.float32] = np.zeros((0, 0), np.float32)
    with torch.inference_mode():
        for group in groups(sequences):
            longest = max(len(sequences[index]) for index in group)
            # Padded on the right: with causal attention nothing before the padding sees it.
            tokens = torch.tensor(
                [[*sequences[index], *[0] * (longest - len(sequences[index]))] for index in group], device=model.device
            )
            logits = model(tokens).logits
            if store is not None and not full.size and total:
                full = np.memmap(store, np.float32, "w+", shape=(total, logits.shape[-1]))
            for index, own, row in zip(group, tokens, logits, strict=True):
                length = len(sequences[index])
                place = slice(int(starts[index]), int(starts[index + 1]))
                logprobs = torch.log_softmax(row[: length - 1].float(), dim=-1)
                following[place] = logprobs.gather(1, own[1:length, None])[:, 0].cpu().numpy()
                choices[place] = logprobs.argmax(-1).cpu().numpy()
                if store is not None:
                    full[place] = logprobs.cpu().numpy()
                if kl is not None and against is not None:
                    wanted = torch.from_numpy(np.array(against[place])).to(logprobs.device)
                    apart = (wanted.exp() * (wanted - logprobs)).sum(-1, dtype=torch.float64)
                    kl[place] = apart.clamp_min(0).cpu().numpy()  # below 0 only by rounding
    return Seen(following, choices, kl), full


def greedy(model: Any, prompts: Sequence[Sequence[int]], questions: Questions) -> Texts:
    """The most likely continuation of each prompt, up to and including the first stop token, at most so long."""
    import torch

    stops = sorted(questions.stop_ids)
    found: dict[int, tuple[int, ...]] = {}
    with torch.inference_mode():
        for group in groups(prompts, room=questions.greedy_tokens):
            longest = max(len(prompts[index]) for index in group)
            padding = [longest - len(prompts[index]) for index in group]
            rows = [[0] * pad + list(prompts[index]) for pad, index in zip(padding, group, strict=True)]
            mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
            written = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=questions.greedy_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
            )
            for index, row in zip(group, written[:, longest:].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in questions.stop_ids), len(row) - 1)
                found[index] = tuple(row[: end + 1])
    texts = tuple(found[index] for index in range(len(prompts)))
    return Texts(texts, tuple(bool(text) and text[-1] in questions.stop_ids for text in texts))


def answer(model: Any, prompts: Sequence[Sequence[int]], questions: Questions, tokenizer: Any) -> list[str]:
    """Greedy answers as text."""
    written = greedy(model, prompts, questions)
    return [tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens in written.tokens]


def groups(sequences: Sequence[Sequence[int]], *, room: int = 0) -> Iterator[list[int]]:
    """Indices by length, shortest first, as many together as MAX_BATCH_TOKENS allow when padded; at least one.

    room: tokens that each is to grow by.
    """
    group: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index])):
        if group and (len(sequences[index]) + room) * (len(group) + 1) > MAX_BATCH_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def measure_parity(
    base: Path,
    adapter: Path,
    merged: Path,
    changed: Iterator[tuple[str, NDArray[Any]]],
    questions: Questions,
    dtype: str,
    scratch: Path,
    report: Report,
    served: Callable[[Reference], Figures] | None = None,
) -> dict[str, Figures]:
    """Compare with base + adapter in float32; one model is in memory at a time.

    changed: name and float32 value of every merged tensor. served: asks a running engine about the reference's prompts.
    Returns fp32, saved, unmerged and effect, and served where it was asked.
    Raises MergeError when torch or PEFT is missing, or the checkpoint cannot be loaded.
    """
    torch, peft = torch_and_peft()
    narrow = getattr(torch, dtype)
    found: dict[str, Figures] = {}
    with quietly():
        report("parity: base + adapter", 0, 4)
        tuned = peft.PeftModel.from_pretrained(load_model(base, torch.float32), adapter, is_trainable=False)
        reference = Reference(tuned, questions, scratch)
        if served is not None:
            report("parity: the served adapter", 0, 4)
            found["served"] = served(reference)
        report("parity: base + adapter as served", 1, 4)
        found["unmerged"] = reference.hold(tuned.to(narrow))
        del tuned
        gc.collect()
        report("parity: merged in float32", 2, 4)
        model = load_model(base, torch.float32)
        # Not base + adapter with the adapter off: PEFT leaves trained biases in place then.
        found["effect"] = reference.hold(model, texts=False)
        with torch.inference_mode():
            for name, tensor in changed:
                model.get_parameter(name).copy_(torch.from_numpy(tensor))
        found["fp32"] = reference.hold(model)
        del model
        gc.collect()
        report("parity: merged as saved", 3, 4)
        found["saved"] = reference.hold(load_model(merged, narrow))
        report("parity", 4, 4)
    return found


def check_memory(tensors: Mapping[str, TensorFile], free_bytes: int | None = None) -> None:
    """Raises MergeError where the model does not fit into the free memory in float32. free_bytes: None asks the system."""
    needed = TORCH_BYTES + BYTES_PER_PARAMETER * sum(prod(file.tensors[name].shape) for name, file in tensors.items())
    free = psutil.virtual_memory().available if free_bytes is None else free_bytes
    if needed > free:
        raise MergeError(
            f"Comparing log-probabilities loads the whole model in float32 and needs about {needed / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} are free. A merge can compare weights instead, one tensor at a time: --parity weights"
        )


def torch_and_peft() -> tuple[Any, Any]:
    """Both modules. Raises MergeError where they are not installed."""
    try:
        import peft
        import torch
    except ImportError as exc:
        raise MergeError(f"This needs torch, transformers and peft (extra: trainer): {exc}.") from exc
    return torch, peft


def load_model(folder: Path, dtype: Any) -> Any:
    """Raises MergeError."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise MergeError(f"{folder} cannot be loaded by transformers: {exc}") from exc


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own progress bars between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
