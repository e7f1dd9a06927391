"""GGUF: llama.cpp's own mixes, answers compared as texts, and a file only when it holds."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters import gguf_export
from adapters.base import read_base
from adapters.environments import Environment, Tool, make_environment
from adapters.errors import BaseModelError, ParityError, QuantizeError
from adapters.gguf_export import GGUF_TOOLS, TYPES, Answer, export_gguf, with_answers
from adapters.home import home
from adapters.ladder import Divergence, read_rungs
from adapters.parity import GREEDY_TOKENS, PromptSet, Questions, Texts
from adapters.task import find_task
from adapters.tools.write_gguf import choose_type
from tests.adapters.test_compressed import make_quantized
from tests.factories import make_base

Q4_K_M = dict(TYPES["q4_k_m"].mix or {})


@dataclass
class Tensor:
    """Name and shape as a GGUF reader gives them: the row's width first."""

    name: str
    shape: tuple[int, ...]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("blk.0.attn_norm.weight", (2048,), None),
        ("blk.5.attn_q.weight", (2048, 2048), "Q4_K"),
        ("blk.0.attn_v.weight", (2048, 512), "Q6_K"),
        ("blk.5.ffn_down.weight", (2048, 512), "Q4_K"),
        ("blk.4.ffn_down.weight", (2048, 512), "Q6_K"),
        ("blk.15.ffn_down.weight", (2048, 512), "Q6_K"),
        ("token_embd.weight", (2048, 32000), "Q6_K"),
        ("blk.5.attn_q.weight", (576, 576), "Q5_0"),  # 576 is not a multiple of 256
        ("token_embd.weight", (576, 49152), "Q8_0"),
        ("blk.5.attn_q.weight", (24, 24), None),
    ],
)
def test_the_mix_is_llama_cpps(name: str, shape: tuple[int, ...], kind: str | None) -> None:
    assert choose_type(Tensor(name, shape), Q4_K_M, layers=16, tied=True) == kind


def test_an_embedding_beside_an_output_layer_is_one_of_many() -> None:
    assert choose_type(Tensor("token_embd.weight", (2048, 32000)), Q4_K_M, layers=16, tied=False) == "Q4_K"


class Words:
    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(str(token) for token in tokens if token != 2)


def test_answers_are_compared_as_they_read_and_by_whether_they_end() -> None:
    wanted = Texts(((5, 6, 2), (7, 2), (8, 8)), (True, True, False))
    answers = [Answer("5 6", True), Answer("7 7 7", False), Answer("8 8", False)]
    figures = with_answers(Divergence(0.1, 0.01, 0.99), wanted, answers, Words())
    assert figures.stop_rate == pytest.approx(1 / 3)
    assert figures.reference_stop_rate == figures.same_text == pytest.approx(2 / 3)
    assert figures.prompts == 3


def write_sums(path: Path) -> Path:
    asked = "What is {} plus {}? Answer with the number only."
    rows = [
        [{"role": "user", "content": asked.format(n, n + 1)}, {"role": "assistant", "content": str(2 * n + 1)}]
        for n in range(8)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_cannot_be_exported_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    nowhere = Environment(Tool("gguf"), tmp_path / "none")
    base = make_base(tmp_path / "base")
    with pytest.raises(QuantizeError, match="exists already"):
        export_gguf(base, base / "config.json", TYPES["q8_0"], nowhere)
    with pytest.raises(QuantizeError, match="quantized already"):
        export_gguf(make_quantized(tmp_path / "q", "int-quantized"), tmp_path / "f", TYPES["q8_0"], nowhere)
    with pytest.raises(BaseModelError, match="no prepared base"):
        export_gguf(tmp_path, tmp_path / "f", TYPES["q8_0"], nowhere)


def test_a_file_outside_its_limits_is_kept_only_for_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, made: Path, *_: object) -> None:
        made.write_bytes(b"GGUF")

    base, out, nowhere = make_base(tmp_path / "base"), tmp_path / "small.gguf", Environment(Tool("gguf"), tmp_path)
    questions = Questions((PromptSet("sample", "six of ours", ((1, 2),)),), frozenset({2}))
    measured = {"sample": Divergence(9.0, 1.0, 0.5, 0.57)}, None
    monkeypatch.setattr(gguf_export, "load_tokenizer", lambda folder: Words())
    monkeypatch.setattr(gguf_export, "questions_for", lambda *_, **__: questions)
    monkeypatch.setattr(gguf_export, "_run_converter", write)
    monkeypatch.setattr(gguf_export, "ask", lambda *_: [Answer("", False)])
    monkeypatch.setattr(gguf_export, "_measure", lambda *_: measured)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ParityError, match=r"gguf q4_0 .* KL is 0.57"):
        export_gguf(base, out, TYPES["q4_0"], nowhere)
    assert (sorted(tmp_path.iterdir()), read_rungs(base)) == (before, [])
    export_gguf(base, out, TYPES["q4_0"], nowhere, accept="small enough for a phone")
    assert out.read_bytes() == b"GGUF"
    assert [rung.accepted for rung in read_rungs(base)] == ["small enough for a phone"]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_default_base_as_gguf_answers_in_llama_cpp(base_model: Path, tmp_path: Path) -> None:
    """Installs the environment, unless LORIKEET_HOME has it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in base_model.iterdir():
        (folder / path.name).symlink_to(path)
    tools = make_environment(GGUF_TOOLS, home().tools)
    rows = write_sums(tmp_path / "sums.jsonl")
    task = find_task(rows, None, folder, context_tokens=2048, answer_tokens=GREEDY_TOKENS)
    exported = export_gguf(folder, tmp_path / "model.gguf", TYPES["q8_0"], tools, task=task)
    assert exported.size_bytes < 0.6 * exported.source_bytes
    assert len(exported.answer.split()) > 2
    (rung,) = read_rungs(folder)
    assert rung.sample is not None
    assert rung.sample.kl is not None
    assert rung.sample.kl < 0.01
    assert rung.sample.same_text is not None
    assert rung.sample.same_text >= 0.3  # near ties fall either way
    assert rung.task is not None
    assert rung.task.rows == 8
    assert rung.task.before == pytest.approx(rung.task.after, abs=0.3)
    assert read_base(folder).name == read_base(base_model).name
