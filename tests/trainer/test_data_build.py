"""Building a data set end to end: nothing is lost, nothing leaks, the same bytes come out, and half a build is none."""

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.build import Base, Built, build
from trainer.data.card import read_dataset
from trainer.data.digests import jaccard, said
from trainer.data.recipe import BuildConfig
from trainer.errors import ConfigError, DataError, LicenceError, TemplateError

WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("ak", "el", "im", "or", "un", "ay")]
LINES = ("train.jsonl", "eval.jsonl", "rejected.jsonl")


def text(words: int, seed: object) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=words))


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def rows_of(count: int, tag: str = "") -> list[dict[str, Any]]:
    return [chat(text(12, f"q{tag}{number}") + "?", text(15, f"a{tag}{number}") + ".") for number in range(count)]


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(built: Built, name: str) -> list[Any]:
    return [json.loads(line) for line in (built.folder / name).read_text().splitlines()]


def config_of(path: Path | str, **more: Any) -> BuildConfig:
    source = {"path": str(path), "licence": "CC0-1.0"}
    return BuildConfig.model_validate({"name": "set", "base": None, "processes": 1, "sources": [source], **more})


def run(config: BuildConfig, folder: Path, name: str = "out", **more: Any) -> Built:
    return build(config, folder / name, relative_to=folder, fetch=lambda known: folder / known, **more)


def test_every_row_ends_in_one_file_with_its_reason(tmp_path: Path) -> None:
    good = rows_of(60)
    bad = [
        chat("What?", "ok"),
        chat(text(9, "echo"), text(9, "echo").upper()),
        {"messages": [{"role": "user", "content": "alone"}]},
        {"unknown": 1},
    ]
    path = write(tmp_path / "rows.jsonl", [*good, *bad, good[0], {**good[1]}])
    path.write_text(path.read_text() + "not json\n")
    built = run(config_of(path), tmp_path)
    train, evaluation, rejected = (lines(built, name) for name in LINES)
    assert (len(train), len(evaluation)) == (54, 6)
    assert Counter(row["step"] for row in rejected) == {"validate": 3, "length": 1, "quality": 1, "exact duplicates": 2}
    assert {row["line"] for row in rejected} == {61, 62, 63, 64, 65, 66, 67}
    assert rejected[-1]["reason"].endswith("rows.jsonl:2")
    assert rejected[-3] == {
        "line": 67,
        "source": "rows.jsonl",
        "reason": rejected[-3]["reason"],
        "step": "validate",
        "row": "not json",
    }
    account = built.account
    assert account.read == len(train) + len(evaluation) + len(rejected) == 67
    assert account.steps[-1].before - account.steps[-1].rejected == 60


MUTATIONS = st.sampled_from(["again", "near", "same question", "short", "fresh", "fresh", "fresh"])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(MUTATIONS, st.integers(0, 9)), min_size=4, max_size=30), st.integers(0, 5))
def test_whatever_repeats_nothing_is_lost_and_nothing_leaks(
    tmp_path: Path, changes: list[tuple[str, int]], seed: int
) -> None:
    rows = rows_of(10)
    for number, (change, of) in enumerate(changes):
        question, answer = (message["content"] for message in rows[of]["messages"])
        rows.append(
            {
                "again": chat(question.upper(), answer),
                "near": chat(question, f"{answer} {WORDS[number]}"),
                "same question": chat(question, text(15, f"other{number}")),
                "short": chat(question, "no"),
                "fresh": chat(text(12, f"f{number}"), text(15, f"g{number}")),
            }[change]
        )
    path = write(tmp_path / "rows.jsonl", rows)
    built = run(config_of(path, seed=seed, split={"eval_share": 0.3}), tmp_path, force=True)
    train, evaluation, rejected = (lines(built, name) for name in LINES)
    assert len(train) + len(evaluation) + len(rejected) == len(rows)
    known = [said(row) for row in evaluation]
    for row in train:
        own = said(row)
        assert own.asked not in {each.asked for each in known}
        alike = [jaccard(own.shingles(frozenset())[0], each.shingles(frozenset())[0]) for each in known]
        assert max(alike, default=0) < 0.8
    assert built.account.leak_proof.holds


def test_the_same_bytes_come_out_whatever_the_number_of_processes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(80))
    first, second = (run(config_of(path), tmp_path, name) for name in ("one", "two"))
    other = run(config_of(path, seed=1), tmp_path, "three")
    for name in (*LINES, "report.json", "report.html", "dataset.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert (first.folder / "eval.jsonl").read_bytes() != (other.folder / "eval.jsonl").read_bytes()


@pytest.mark.slow
def test_several_processes_write_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(4000))
    monkeypatch.setattr("trainer.data.build.ALONE_BYTES", 0)
    first, second = (run(config_of(path, processes=count), tmp_path, str(count)) for count in (1, 2))
    for name in (*LINES, "report.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_rows_that_ask_what_a_published_test_set_asks_are_leaks(tmp_path: Path) -> None:
    rows, held_out = rows_of(30), rows_of(10, "test")
    question = held_out[3]["messages"][0]["content"]
    near = f"{question[:-1]} please"
    leaks = [held_out[0], chat(question, text(15, "else")), chat(near, text(15, "third"))]
    write(tmp_path / "rows.jsonl", [*rows, *leaks])
    write(tmp_path / "test.jsonl", held_out)
    config = config_of("rows.jsonl", evaluation=[{"path": "test.jsonl", "licence": "MIT"}])
    built = run(config, tmp_path)
    rejected = lines(built, "rejected.jsonl")
    assert [row["step"] for row in rejected] == ["leakage"] * 3
    assert len(lines(built, "eval.jsonl")) == 10
    assert built.account.dataset.sources[0].rows == 10


def test_near_duplicates_may_stay_but_not_on_both_sides(tmp_path: Path) -> None:
    rows = rows_of(10)
    near = [chat(row["messages"][0]["content"], row["messages"][1]["content"] + " bak") for row in rows]
    write(tmp_path / "rows.jsonl", [*rows, *near])
    config = config_of("rows.jsonl", duplicates={"near": False}, split={"eval_share": 0.3})
    built = run(config, tmp_path)
    assert lines(built, "rejected.jsonl") == []
    evaluated = Counter(said(row).asked for row in lines(built, "eval.jsonl"))
    assert set(evaluated.values()) == {2}


def test_rows_with_other_system_messages_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    rows = rows_of(20)
    told = [chat(f"{row['messages'][0]['content']} now", row["messages"][1]["content"]) for row in rows]
    write(tmp_path / "plain.jsonl", rows)
    write(tmp_path / "told.jsonl", told)
    sources = [{"path": "plain.jsonl"}, {"path": "told.jsonl", "system": "Answer as a pirate would."}]
    built = run(config_of("plain.jsonl", sources=sources, split={"eval_share": 0.2}), tmp_path)
    assert lines(built, "rejected.jsonl") == []
    prompts = Counter(" ".join(said(row).prompt).removesuffix(" now") for row in lines(built, "eval.jsonl"))
    assert set(prompts.values()) == {2}


def test_benchmarks_general_data_balance_and_agreement_are_told(tmp_path: Path) -> None:
    rows = [
        {**row, "kind": "common" if number % 10 else "rare", "other": "common"}
        for number, row in enumerate(rows_of(100))
    ]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "general.jsonl", rows_of(50, "general"))
    (tmp_path / "exam.txt").write_text(rows[5]["messages"][0]["content"] + "\n\nSomething else that is asked.\n")
    built = run(
        config_of(
            "rows.jsonl",
            general={"share": 0.2, "sources": [{"path": "general.jsonl", "licence": "CC0-1.0"}]},
            decontaminate=[{"name": "exam", "path": "exam.txt"}],
            balance={"label": "kind", "production": {"common": 1, "rare": 1}, "action": "resample", "tolerance": 0.05},
            agreement={"fields": ["kind", "other"]},
        ),
        tmp_path,
    )
    account = built.account
    assert [(each.name, each.contaminated) for each in account.contamination] == [("exam", 1)]
    assert account.mix is not None
    assert account.mix.share == pytest.approx(0.2, abs=0.03)
    assert account.classes is not None
    assert account.classes.before is not None
    assert account.classes.distance is not None
    assert account.classes.before > 0.3 > 0.06 > account.classes.distance
    assert account.agreement[0].raw == pytest.approx(0.9, abs=0.01)
    assert account.agreement[0].kappa == pytest.approx(0, abs=0.01)
    steps = Counter(row["step"] for row in lines(built, "rejected.jsonl"))
    assert steps["mix"] + account.mix.rows == 50
    assert steps["balance"] > 50
    page = (built.folder / "report.html").read_text()
    assert all(word in page for word in ("Cohen", "exam", "production", "General data"))


def test_production_may_be_a_file_of_rows(tmp_path: Path) -> None:
    labels = ["yes", "no"] * 20
    write(tmp_path / "rows.jsonl", [chat(text(12, number), label) for number, label in enumerate(labels)])
    write(tmp_path / "production.jsonl", [chat(text(9, f"p{number}"), "yes") for number in range(9)])
    config = config_of("rows.jsonl", length={"min_chars": 1}, balance={"production": "production.jsonl"})
    account = run(config, tmp_path).account
    assert account.classes is not None
    assert account.classes.production == {"yes": 1.0}
    assert account.lengths["production"].rows == 9
    assert any("away from production" in warning for warning in account.warnings)


def test_a_receipt_shows_what_is_trained(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [chat(f"<b>{text(9, number)}</b>?", f"{text(12, -number)} <i>so</i>.") for number in range(1, 31)]
    path = write(tmp_path / "rows.jsonl", rows)
    built = run(config_of(path), tmp_path, base=Base("tiny", "Apache-2.0", tokenizer_folder))
    dataset = read_dataset(built.folder)
    receipt = dataset.card.receipt
    assert receipt is not None
    assert receipt.rows == receipt.end_of_turn_trained == receipt.prompts_equal == dataset.card.train.rows
    assert len(receipt.samples) == 20
    assert all(sample.trained[0].endswith("<|im_end|>") for sample in receipt.samples)
    assert dataset.card.train.tokens == receipt.tokens
    page = (built.folder / "report.html").read_text()
    assert page.count("<mark>") == 20
    assert "<b>" not in page.partition("Tokens and mask receipt")[2]
    assert "<i>so" not in page


def test_a_template_that_serving_would_render_otherwise_stops_the_build(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(30))
    config = config_of(path, chat_template="{{ messages | length }}{{ messages[-1]['content'] }}")
    with pytest.raises(TemplateError):
        run(config, tmp_path, base=Base("tiny", "Apache-2.0", tokenizer_folder))
    assert not (tmp_path / "out").exists()


def test_preferences_are_built_and_read_back(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{"prompt": text(9, n), "chosen": text(12, f"c{n}"), "rejected": text(12, f"r{n}")} for n in range(30)]
    path = write(tmp_path / "rows.jsonl", rows)
    built = run(config_of(path, format="preference"), tmp_path, base=Base("tiny", "Apache-2.0", tokenizer_folder))
    dataset = read_dataset(built.folder)
    pairs = list(dataset.preferences("train"))
    assert len(pairs) == 27
    assert {pair.prompt[-1]["role"] for pair in pairs} == {"user"}
    with pytest.raises(DataError, match="preference rows"):
        list(dataset.chat_rows("train"))


def test_texts_are_cut_built_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(text(40, number) for number in range(40)))
    write(tmp_path / "rows.jsonl", [{"text": "\n\n".join(text(30, f"t{number}") for number in range(9))}])
    config = BuildConfig.model_validate(
        {
            "name": "texts",
            "format": "text",
            "base": None,
            "length": {"max_chars": 500},
            "sources": [{"path": name, "licence": "CC0-1.0"} for name in ("book.txt", "rows.jsonl")],
        }
    )
    built = run(config, tmp_path)
    texts = [each for part in ("train", "eval") for each in read_dataset(built.folder).texts(part)]
    assert len(texts) == built.account.read + built.account.pieces
    assert max(map(len, texts)) <= 500
    assert Counter(" ".join(texts).split()) == Counter(
        " ".join([text(40, number) for number in range(40)] + [text(30, f"t{number}") for number in range(9)]).split()
    )


def test_licences_that_block_need_a_recorded_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(30))
    source = {"path": str(path), "licence": "MIT", "teacher": {"name": "served", "licence": "openai-terms"}}
    config = config_of(path).model_copy(update={"sources": (config_of(path, sources=[source]).sources)})
    with pytest.raises(LicenceError, match="served"):
        run(config, tmp_path)
    assert not (tmp_path / "out").exists()
    built = run(config.model_copy(update={"allow_licence": "a written permission"}), tmp_path)
    assert built.account.dataset.sources[0].teacher is not None
    assert any("a written permission" in warning for warning in built.account.warnings)


class Interrupted(BaseException):
    pass


def test_an_interrupted_build_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(30))
    first = run(config_of(path), tmp_path)
    before = {file.name: file.read_bytes() for file in first.folder.iterdir()}

    def listen(step: str, done: int, total: int) -> None:
        if step == "proving":
            raise Interrupted

    with pytest.raises(Interrupted):
        run(config_of(path, seed=4), tmp_path, force=True, listen=listen)
    assert {file.name: file.read_bytes() for file in first.folder.iterdir()} == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_what_a_killed_build_left_is_swept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(30))
    left = tmp_path / ".out.building-999999999"
    left.mkdir()
    run(config_of(path), tmp_path)
    assert not left.exists()


def test_folders_are_not_replaced_unasked(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(30))
    run(config_of(path), tmp_path)
    with pytest.raises(ConfigError, match="--force"):
        run(config_of(path), tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="no data set"):
        run(config_of(path), tmp_path, "mine", force=True)


@pytest.mark.parametrize(
    ("rows", "said_"),
    [
        ([chat("What?", "ok")] * 3, "length"),
        ([chat("The same question as ever?", text(15, number)) for number in range(30)], "held out"),
    ],
)
def test_a_set_without_rows_says_why(tmp_path: Path, rows: list[Any], said_: str) -> None:
    write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=said_):
        run(config_of("rows.jsonl"), tmp_path)


def test_a_changed_file_no_longer_fits_its_card(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", rows_of(30))
    dataset = read_dataset(run(config_of("rows.jsonl"), tmp_path).folder)
    dataset.check_digests()
    with (dataset.folder / "train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"train\.jsonl"):
        dataset.check_digests()


def test_a_folder_without_a_card_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lorikeet data build"):
        read_dataset(tmp_path)
