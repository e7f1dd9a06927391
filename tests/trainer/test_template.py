"""The mask: exactly the answers and their end of turn, and prompts as serving sends them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import CHATML, build_tokenizer
from trainer.data.chat import Row
from trainer.errors import TemplateError
from trainer.template import ChatRenderer, load_renderer, mask_receipt

ROW: Row = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Bye."},
]
TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1).filter(str.strip)


@pytest.fixture(scope="module")
def renderer(tokenizer_folder: Path) -> ChatRenderer:
    return load_renderer(tokenizer_folder)


def test_answers_and_their_end_of_turn_are_trained_and_nothing_else(renderer: ChatRenderer) -> None:
    rendered = renderer.render(ROW)
    trained = [renderer.decode(rendered.input_ids[start:end]) for start, end in rendered.spans()]
    assert trained == ["Hi.<|im_end|>", "Bye.<|im_end|>"]


def test_labels_repeat_the_tokens_where_trained(renderer: ChatRenderer) -> None:
    rendered = renderer.render(ROW)
    assert all(label in (-100, token) for label, token in zip(rendered.labels(), rendered.input_ids, strict=True))


@given(TEXTS, TEXTS)
@settings(max_examples=40)
def test_training_begins_with_the_served_prompt(renderer: ChatRenderer, question: str, answer: str) -> None:
    row = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = renderer.render(row)
    prompt = renderer.prompt_ids(row[:1])
    assert list(rendered.input_ids[: len(prompt)]) == prompt
    assert rendered.spans()[0][0] == len(prompt)
    assert renderer.decode(rendered.input_ids) == renderer.text(row, prompt=False)


def test_the_receipt_counts_and_shows(renderer: ChatRenderer) -> None:
    receipt = mask_receipt(renderer, [renderer.render(ROW)] * 3, samples=2)
    assert (receipt.rows, receipt.end_of_turn_trained, len(receipt.samples)) == (3, 6, 2)
    assert receipt.samples[0]["trained"] == ["Hi.<|im_end|>", "Bye.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace(" + '<|im_end|>'", ""), "end-of-turn"),
        (
            CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>bot\\n").replace("assistant\n", "bot\n"),
            "differently",
        ),
        ("{{ messages | length }}" + CHATML, "differently"),
        ("{{ raise_exception('no') }}", "refuses"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "whole"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(tmp_path: Path, template: str, said: str) -> None:
    build_tokenizer(tmp_path, template)
    with pytest.raises(TemplateError, match=said):
        load_renderer(tmp_path).render(ROW)


def test_a_template_of_ones_own_takes_the_bases_place(tokenizer_folder: Path) -> None:
    own = CHATML.replace("<|im_start|>' + message['role'] + '\n'", "<|im_start|>[' + message['role'] + '] '").replace(
        "<|im_start|>assistant\n", "<|im_start|>[assistant] "
    )
    renderer = load_renderer(tokenizer_folder, own)
    assert renderer.text(ROW[1:2], prompt=True) == "<|im_start|>[user] Hi?<|im_end|>\n<|im_start|>[assistant] "
    rendered = renderer.render(ROW)
    assert [renderer.decode(rendered.input_ids[start:end]) for start, end in rendered.spans()] == [
        "Hi.<|im_end|>",
        "Bye.<|im_end|>",
    ]


def test_a_folder_without_a_tokenizer_is_a_template_error(tmp_path: Path) -> None:
    with pytest.raises(TemplateError):
        load_renderer(tmp_path)
