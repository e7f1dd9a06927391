"""Are merged weights the same model as base + adapter? Measured on log-probabilities of real prompts, with torch and PEFT."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import BaseModelInfo, Report
from adapters.errors import MergeError
from adapters.manifest import Manifest

MAX_PROMPTS = 16
MAX_BATCH_TOKENS = 1024  # their logits over a vocabulary of 50,000 take 200 MB
MAX_TOKENS = 256  # of one prompt with its answer: parity shows within a few dozen
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "My order has not arrived. What can I do?",
    "Translate to German: The train leaves at noon.",
    "List three prime numbers larger than ten.",
    "Summarise: The meeting was moved from Monday to Tuesday because the room was taken.",
)


@dataclass(frozen=True)
class Divergence:
    """How far one model is from the reference, over every token after the first of each prompt."""

    max_abs: float  # largest difference of the log-probability of the token that comes next, in nats
    mean_abs: float
    top1: float  # share of positions with the same most likely token


@dataclass(frozen=True)
class Prompts:
    """Token ids to compare on."""

    source: str
    ids: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)


@dataclass(frozen=True)
class _Seen:
    """What a model makes of one prompt: log-probability of each next token, and its own first choice."""

    logprobs: NDArray[np.float32]
    choices: NDArray[np.int64]


def sample_prompts(base: Path, info: BaseModelInfo, manifest: Manifest | None) -> Prompts:
    """The manifest's goldens, else default prompts in the base's template, else random tokens for want of a tokenizer."""
    longest = min(MAX_TOKENS, info.context_tokens)
    if manifest is not None and manifest.goldens:
        goldens = manifest.goldens[:MAX_PROMPTS]
        ids = [[*golden.prompt_token_ids, *golden.completion_token_ids][-longest:] for golden in goldens]
        return Prompts("goldens", ids)
    if (base / "tokenizer.json").is_file() or (base / "tokenizer.model").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        ids = []
        for prompt in PROMPTS:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"][:longest])
        return Prompts("default prompts", ids)
    rng = np.random.default_rng(0)
    return Prompts("random tokens", rng.integers(0, info.vocab_size, (8, min(32, longest))).tolist())


def measure_parity(
    base: Path,
    adapter: Path,
    merged: Path,
    changed: Iterator[tuple[str, NDArray[Any]]],
    prompts: Prompts,
    dtype: str,
    report: Report,
) -> dict[str, Divergence]:
    """Compare with base + adapter in float32; one model is in memory at a time.

    changed: name and float32 value of every merged tensor. Returns fp32, saved, unmerged and effect.
    Raises MergeError when torch or PEFT is missing, or the checkpoint cannot be loaded.
    """
    try:
        import torch
        from peft import PeftModel
    except ImportError as exc:
        raise MergeError(f"A merge needs torch, transformers and peft (extra: trainer): {exc}.") from exc
    narrow = getattr(torch, dtype)
    with _quietly(), torch.inference_mode():
        report("parity: base + adapter", 0, 4)
        tuned = PeftModel.from_pretrained(_load(base, torch.float32), adapter, is_trainable=False)
        reference = _observe(tuned, prompts)
        with tuned.disable_adapter():
            effect = _observe(tuned, prompts)
        report("parity: base + adapter as served", 1, 4)
        unmerged = _observe(tuned.to(narrow), prompts)
        del tuned
        gc.collect()
        report("parity: merged in float32", 2, 4)
        model = _load(base, torch.float32)
        for name, tensor in changed:
            model.get_parameter(name).copy_(torch.from_numpy(tensor))
        fp32 = _observe(model, prompts)
        del model
        gc.collect()
        report("parity: merged as saved", 3, 4)
        saved = _observe(_load(merged, narrow), prompts)
        report("parity", 4, 4)
    observed = {"fp32": fp32, "saved": saved, "unmerged": unmerged, "effect": effect}
    return {name: compare(reference, seen) for name, seen in observed.items()}


def compare(reference: Sequence[_Seen], other: Sequence[_Seen]) -> Divergence:
    apart = np.abs(
        np.concatenate([seen.logprobs for seen in other]) - np.concatenate([seen.logprobs for seen in reference])
    )
    same = np.concatenate([seen.choices for seen in other]) == np.concatenate([seen.choices for seen in reference])
    return Divergence(float(apart.max()), float(apart.mean()), float(same.mean()))


def _observe(model: Any, prompts: Prompts) -> list[_Seen]:
    """One forward pass for a group of prompts: on busy cores every pass costs its many thread barriers."""
    import torch

    found = []
    for group in groups(prompts.ids):
        longest = len(group[-1])
        # Padded on the right: with causal attention nothing before the padding sees it.
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in group])
        logits = model(tokens).logits
        for ids, own, row in zip(group, tokens, logits, strict=True):
            logprobs = torch.log_softmax(row[: len(ids) - 1].float(), dim=-1)
            following = logprobs.gather(1, own[1 : len(ids), None])[:, 0]
            found.append(_Seen(following.numpy(), logprobs.argmax(-1).numpy()))
    return found


def groups(ids: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Prompts by length, shortest first, as many together as MAX_BATCH_TOKENS allow when padded; at least one."""
    group: list[Sequence[int]] = []
    for prompt in sorted(ids, key=len):
        if group and len(prompt) * (len(group) + 1) > MAX_BATCH_TOKENS:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _load(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise MergeError(f"{folder} cannot be loaded by transformers: {exc}") from exc


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own progress bars between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
