"""Write a checkpoint as one GGUF file, which llama.cpp and what is built on it load.

llama.cpp's converter writes the file, its row quantizers make the K types, and llama.cpp itself is asked whether the result
answers and stops, all in an environment of their own. What the file's weights compute is held against the checkpoint.
"""

import gc
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.base import BaseModelInfo, Report, open_checkpoint, silent
from adapters.calibration import load_tokenizer
from adapters.environments import Environment, Tool
from adapters.errors import MergeError, QuantizeError
from adapters.ladder import Divergence, Limits, Rung, TaskScore, add_rung, judge_rung
from adapters.manifest import Golden
from adapters.parity import Questions, Reference, Texts, answer, check_memory, load_model, questions_for, quietly
from adapters.quantize import read_unquantized, weights_bytes
from adapters.task import Task

GGUF_TOOLS = Tool("gguf")
BESIDE_TOKENS = 64  # room in llama.cpp's context beside prompt and answer


@dataclass(frozen=True)
class GgufType:
    """What `--type` names. mix: GGML types of most rows, of those that lose most, and of the output; None: by the converter."""

    name: str
    outtype: str  # the converter's
    file_type: int  # llama.cpp's number of the mix
    limits: Limits
    mix: Mapping[str, str] | None = None


def _mixed(name: str, file_type: int, limits: Limits, plain: str, more: str, output: str) -> GgufType:
    return GgufType(name, "auto", file_type, limits, {"plain": plain, "more": more, "output": output})


TYPES = {
    kind.name: kind
    for kind in (
        GgufType("f32", "f32", 0, Limits(kl=1e-4, top1=0.99)),
        GgufType("f16", "f16", 1, Limits(kl=1e-3, top1=0.98)),
        GgufType("bf16", "bf16", 32, Limits(kl=0.01, top1=0.97)),
        GgufType("q8_0", "q8_0", 7, Limits(kl=0.01, top1=0.95)),
        _mixed("q6_k", 18, Limits(kl=0.03, top1=0.93), "Q6_K", "Q6_K", "Q6_K"),
        _mixed("q5_k_m", 17, Limits(kl=0.1, top1=0.9), "Q5_K", "Q6_K", "Q6_K"),
        _mixed("q4_k_m", 15, Limits(kl=0.2, top1=0.8), "Q4_K", "Q6_K", "Q6_K"),
        _mixed("q4_0", 2, Limits(kl=0.2, top1=0.8), "Q4_0", "Q4_0", "Q6_K"),
    )
}


@dataclass(frozen=True)
class Exported:
    """What was written. Sizes in bytes; took_s: writing it, not measuring."""

    out: str
    type: str
    source_bytes: int
    size_bytes: int
    took_s: float
    answer: str  # llama.cpp's to the first prompt
    rung: Rung

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "rung": self.rung.model_dump(mode="json")}


@dataclass(frozen=True)
class Answer:
    """What llama.cpp said to a prompt, greedily."""

    text: str
    stopped: bool


def export_gguf(
    folder: Path,
    out: Path,
    kind: GgufType,
    environment: Environment,
    *,
    goldens: Sequence[Golden] = (),
    prompts: Path | None = None,
    task: Task | None = None,
    accept: str = "",
    report: Report = silent,
) -> Exported:
    """Write the checkpoint to the file `out` and put its rung into the checkpoint's parity report.

    Raises QuantizeError for what cannot be exported, ToolError when converter or llama.cpp fail, ParityError outside the
    limits; all leave no `out` behind and the report as it was.
    """
    if out.exists():
        raise QuantizeError(f"{out} exists already. Give a file that does not.")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read at import: transformers' own bar would run through ours
    info = read_unquantized(folder)
    check_memory(open_checkpoint(folder))
    tokenizer = load_tokenizer(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        scratch = Path(temporary)
        made = scratch / "model.gguf"
        started = time.monotonic()
        _run_converter(folder, made, kind, info, environment, report)
        took_s = time.monotonic() - started
        questions = questions_for(folder, info, goldens, prompts=prompts)
        answers = {each.name: ask(made, each.prompts, questions, environment, report) for each in questions.sets}
        figures, score = _measure(folder, made, questions, answers, tokenizer, scratch, report, task, environment)
        rung = Rung(
            name=f"gguf {kind.name}",
            dtype=kind.name,
            by="transformers, with the file's weights in float32; texts by llama.cpp",
            against="the checkpoint in float32",
            goldens=figures.get("goldens"),
            sample=figures.get("sample"),
            task=score,
            limits=kind.limits,
            accepted=accept,
            note="llama.cpp rounds activations besides, which only the texts show.",
        )
        judge_rung(rung)
        result = Exported(
            out=str(out),
            type=kind.name,
            source_bytes=weights_bytes(folder),
            size_bytes=made.stat().st_size,
            took_s=round(took_s, 1),
            answer=answers[questions.sets[-1].name][0].text,
            rung=rung,
        )
        made.rename(out)
    add_rung(folder, rung)
    return result


def ask(
    file: Path,
    prompts: Sequence[Sequence[int]],
    questions: Questions,
    environment: Environment,
    report: Report = silent,
) -> list[Answer]:
    """llama.cpp's greedy answers, cut where the reference's would be. Raises ToolError when it does not load or answer."""
    longest = max(map(len, prompts))
    answers = file.with_name("answers.json")
    asked = {
        "model": str(file.resolve()),
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": questions.greedy_tokens,
        "context": longest + questions.greedy_tokens + BESIDE_TOKENS,
        "threads": max(1, len(os.sched_getaffinity(0))),
        "out": str(answers.resolve()),
    }
    environment.run("ask_gguf.py", [json.dumps(asked)], report)
    found = json.loads(answers.read_text(encoding="utf-8"))
    return [Answer(each["text"], each["finish_reason"] == "stop") for each in found]


def _run_converter(
    folder: Path, made: Path, kind: GgufType, info: BaseModelInfo, environment: Environment, report: Report
) -> None:
    metadata = made.with_name("metadata.json")
    described = {"general.name": info.name, "general.license.name": info.licence}
    metadata.write_text(json.dumps(described), encoding="utf-8")
    asked = {
        "model": str(folder.resolve()),
        "out": str(made.resolve()),
        "outtype": kind.outtype,
        "mix": kind.mix,
        "file_type": kind.file_type,
        "metadata": str(metadata.resolve()),
    }
    environment.run("write_gguf.py", [json.dumps(asked)], report)
    if not made.is_file():
        raise QuantizeError(f"The converter left no file of {folder}.")


def _measure(
    folder: Path,
    made: Path,
    questions: Questions,
    answers: Mapping[str, Sequence[Answer]],
    tokenizer: Any,
    scratch: Path,
    report: Report,
    task: Task | None,
    environment: Environment,
) -> tuple[dict[str, Divergence], TaskScore | None]:
    """By set: how far the file's weights are from the checkpoint, and how llama.cpp's texts are from its texts; the task's
    score, after by llama.cpp."""
    import torch

    with quietly():
        report("parity: the checkpoint", 0, 2)
        model = load_model(folder, torch.float32)
        reference = Reference(model, questions, scratch)
        before = answer(model, task.prompts, questions, tokenizer) if task else []
        del model
        gc.collect()
        report("parity: the file's weights", 1, 2)
        figures = reference.hold(_load_gguf(made), texts=False)
        report("parity", 2, 2)
    after = [each.text for each in ask(made, task.prompts, questions, environment, report)] if task else []
    found = {
        name: with_answers(figures[name], known.texts, answers[name], tokenizer)
        for name, known in reference.known.items()
    }
    return found, task.compare(before, after) if task else None


def with_answers(figures: Divergence, wanted: Texts, answers: Sequence[Answer], tokenizer: Any) -> Divergence:
    """The figures with stop rates, and the share of answers that read as the reference's do."""
    texts = [tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens in wanted.tokens]
    return replace(
        figures,
        prompts=len(answers),
        stop_rate=sum(answer.stopped for answer in answers) / len(answers),
        reference_stop_rate=wanted.stop_rate,
        same_text=sum(answer.text == text for answer, text in zip(answers, texts, strict=True)) / len(answers),
    )


def _load_gguf(file: Path) -> Any:
    """The file's tensors in float32, by transformers' reader. Raises MergeError for an architecture it does not know."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as exc:
        raise MergeError(
            f"transformers cannot read the GGUF file of this architecture, so it is not proven: {exc}"
        ) from exc
