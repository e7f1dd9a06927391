"""Merged checkpoints on their way into a machine's store."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base import BaseSpec, describe_base, read_base, write_base
from adapters.errors import MergeError, ParityError
from adapters.ladder import Divergence, Limits, Rung, add_rung
from adapters.manifest import DataLineage, ServingDefaults
from adapters.merged_store import bring_in, quantized_difference, remove_merged, remove_merged_of
from adapters.records import AdapterVersion, VersionStatus
from adapters.tensors import save_tensors
from tests.adapters.test_registry import make_manifest
from tests.factories import make_base

CLOSE = Divergence(max_abs=0.1, mean_abs=0.01, top1=1.0)


def a_version(digest: str = "a" * 64, **changes: Any) -> AdapterVersion:
    fields: dict[str, Any] = {
        "tenant": "acme",
        "adapter": "support",
        "version": 3,
        "digest": digest,
        "status": VersionStatus.READY,
        "created_at": 0.0,
        "rank": 4,
        "alpha": 8.0,
        "size_bytes": 1,
        "files": {},
    }
    return AdapterVersion(**fields | changes)


class Bench:
    """A base, and a folder that says it is version 3 merged into it."""

    def __init__(self, tmp_path: Path) -> None:
        self.base = read_base(make_base(tmp_path / "base"))
        self.merged = tmp_path / "home" / "merged"
        self.source = make_base(tmp_path / "source", seed=1)
        self.version = a_version()
        report = {"adapter_digest": "a" * 64, "base_weights_digest": self.base.fingerprint.weights_digest}
        (self.source / "merge-report.json").write_text(json.dumps(report | {"dtype": "bfloat16"}))
        add_rung(self.source, Rung(name="saved", dtype="bfloat16", by="transformers", goldens=CLOSE))

    def change_report(self, **changes: Any) -> None:
        path = self.source / "merge-report.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def change_config(self, **changes: Any) -> None:
        path = self.source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_checkpoint_arrives_whole_under_a_name_of_its_own(bench: Bench) -> None:
    (bench.source / "evil.py").write_text("print('no')")
    (bench.source / "weights.bin").write_bytes(b"no")
    arrived = bring_in(bench.source, bench.version, bench.base, bench.merged)
    folder = bench.merged / f"acme/support@3-{arrived.digest[:8]}"
    assert read_base(folder).fingerprint.weights_digest == arrived.digest != bench.base.fingerprint.weights_digest
    assert (arrived.scheme, arrived.report["adapter_digest"]) == ("bfloat16", "a" * 64)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "merge-report.json", "chat_template.jinja"} <= names
    assert not names & {"evil.py", "weights.bin"}
    assert (bench.source / "model.safetensors").is_file()
    assert bring_in(bench.source, bench.version, bench.base, bench.merged) == arrived
    assert [path.name for path in bench.merged.iterdir()] == ["acme"]


def test_a_merge_of_our_own_is_moved_and_not_copied(bench: Bench) -> None:
    scratch = bench.merged / ".incoming-mine"
    scratch.mkdir(parents=True)
    own = scratch / "out"
    shutil.copytree(bench.source, own)
    bring_in(own, bench.version, bench.base, bench.merged)
    assert not own.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_digest": "b" * 64}, "merged from adapter content bbbbbbbbbbbb"),
        ({"base_weights_digest": "b" * 64}, "another base"),
        ({"rungs": []}, "does not say how equal"),
    ],
)
def test_what_is_not_this_version_on_this_base_is_refused(bench: Bench, changes: dict[str, Any], said: str) -> None:
    bench.change_report(**changes)
    with pytest.raises(MergeError, match=said):
        bring_in(bench.source, bench.version, bench.base, bench.merged)
    assert not list(bench.merged.glob("*"))


def test_a_folder_without_a_report_is_no_merge(bench: Bench) -> None:
    (bench.source / "merge-report.json").unlink()
    with pytest.raises(MergeError, match="lorikeet merge support@3"):
        bring_in(bench.source, bench.version, bench.base, bench.merged)


def test_a_rung_outside_its_limits_is_refused_whoever_wrote_it(bench: Bench) -> None:
    far = Rung(name="saved", dtype="bfloat16", by="hand", goldens=CLOSE, limits=Limits(mean_abs=0.001))
    bench.change_report(rungs=[far.model_dump(mode="json")])
    with pytest.raises(ParityError, match="on average"):
        bring_in(bench.source, bench.version, bench.base, bench.merged)


def test_a_quantized_checkpoint_needs_a_measure_of_its_own(bench: Bench) -> None:
    bench.change_config(quantization_config={"format": "pack-quantized"})
    with pytest.raises(MergeError, match="quantized"):
        bring_in(bench.source, bench.version, bench.base, bench.merged)
    add_rung(bench.source, Rung(name="quantized", dtype="w4a16", by="x", goldens=Divergence(2.0, 0.3, 0.9)))
    arrived = bring_in(bench.source, bench.version, bench.base, bench.merged)
    assert arrived.scheme == "pack-quantized"
    assert quantized_difference(arrived.report) == 0.3


def test_weights_that_changed_since_the_merge_are_refused_and_leave_nothing(bench: Bench) -> None:
    save_tensors(bench.source / "model.safetensors", {"model.embed_tokens.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(MergeError, match="not those that were merged"):
        bring_in(bench.source, bench.version, bench.base, bench.merged)
    assert not list(bench.merged.glob("*"))


def test_a_chat_template_is_the_bases_or_the_adapters_own(bench: Bench) -> None:
    (bench.source / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(MergeError, match="chat template"):
        bring_in(bench.source, bench.version, bench.base, bench.merged)
    own = a_version(serving=ServingDefaults(chat_template="{{ messages }}"))
    assert bring_in(bench.source, own, bench.base, bench.merged).digest


def test_a_check_by_weights_stands_in_for_rungs(bench: Bench) -> None:
    bench.change_report(rungs=[], weights={"changed": 14})
    assert bring_in(bench.source, bench.version, bench.base, bench.merged).scheme == "bfloat16"


def test_licences_that_forbid_it_are_overruled_with_a_reason_only(bench: Bench) -> None:
    data = [DataLineage(name="scraped", digest="d" * 64, rows=5, licence="proprietary")]
    version = a_version(manifest_source=make_manifest(data=data))
    with pytest.raises(MergeError, match="--force --reason"):
        bring_in(bench.source, version, bench.base, bench.merged)
    arrived = bring_in(bench.source, version, bench.base, bench.merged, forced="a trial inside the house")
    assert arrived.licences is not None
    assert arrived.licences.level == "block"


def test_forms_go_one_by_one_or_with_their_version(bench: Bench) -> None:
    first = bring_in(bench.source, bench.version, bench.base, bench.merged)
    folder = bench.merged / "acme"
    other = make_base(bench.merged.parent / "other", seed=2)
    for name in ("merge-report.json", "config.json"):
        shutil.copy(bench.source / name, other / name)
    write_base(other, describe_base(other, BaseSpec(name="o", model="o", licence="MIT", folder=other)))
    bring_in(other, bench.version, bench.base, bench.merged)
    assert len(list(folder.iterdir())) == 2
    remove_merged(bench.merged, f"acme/support@3-{first.digest[:8]}")
    assert len(list(folder.iterdir())) == 1
    remove_merged_of(bench.merged, a_version(version=33))
    assert len(list(folder.iterdir())) == 1
    remove_merged_of(bench.merged, bench.version)
    assert not list(folder.iterdir())
    assert [path.name for path in bench.merged.iterdir()] == ["acme"]
