"""Adapters made from others: fused, fitted to a rank, converted to LoRA; with PEFT as the judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base import read_base
from adapters.convert import convert_adapter, read_convertible
from adapters.derive import Parent, lineage_of, read_parent, serving_of
from adapters.errors import MergeError, ParityError
from adapters.factors import read_factors
from adapters.fit import fit_adapter
from adapters.fuse import METHODS, Tried, best, choose_method, fuse_adapters, weighted_sum
from adapters.ladder import Divergence, read_rungs
from adapters.manifest import DataLineage, Golden, Manifest, ServingDefaults, read_manifest, write_manifest
from adapters.validation import EngineLimits, validate_adapter
from tests.factories import make_adapter, make_base

GOLDENS = ([1, 17, 30, 9], [5, 8, 21], [77, 12, 40, 41, 3])


def manifest(base: Path, name: str, **changed: Any) -> Manifest:
    golden = [
        Golden(
            messages=[{"role": "user", "content": "?"}],
            completion="",
            prompt_token_ids=prompt,
            completion_token_ids=[9, 40, 2],
            logprobs=[-1.0] * 3,
            base_logprobs=[-2.0] * 3,
        )
        for prompt in GOLDENS
    ]
    fields: dict[str, Any] = {
        "rank": 4,
        "alpha": 8,
        "data": [DataLineage(name=f"{name}-data", digest="0" * 64, rows=10, licence="CC-BY-4.0")],
        "goldens": golden,
    }
    return Manifest(
        name=name,
        base=read_base(base).fingerprint,
        target_modules=["q_proj"],
        created_at=1,
        base_licence="Apache-2.0",
        **(fields | changed),
    )


def parent(base: Path, folder: Path, *, seed: int, known: bool = True, rank: int = 4, **options: Any) -> Parent:
    adapter = make_adapter(folder, base, seed=seed, scale=0.1, rank=rank, **options)
    if known:
        write_manifest(manifest(base, folder.name, rank=rank), adapter)
    return read_parent(f"{folder.name}@1", adapter, base)


def figures(kl: float) -> dict[str, Divergence]:
    return {"goldens": Divergence(0.1, 0.1, 1.0, kl=kl), "all": Divergence(9, 9, 0, kl=9)}


# Decisions, without torch


def test_the_sum_is_taken_where_its_rank_is_served_and_else_its_nearest() -> None:
    assert choose_method([8, 8], 16) == "cat"
    assert choose_method([8, 16], 16) == "svd"


def test_the_best_method_is_the_one_least_far_from_the_parent_it_is_farthest_from() -> None:
    lopsided = Tried("linear", 4, (figures(0.001), figures(0.5)))
    even = Tried("svd", 4, (figures(0.2), figures(0.2)))
    assert best([lopsided, even, Tried("cat", 0, (), refused="rank 64")]).method == "svd"
    with pytest.raises(MergeError, match="rank 64"):
        best([Tried("cat", 0, (), refused="rank 64")])


def test_data_that_nobody_knows_stays_unknown_in_what_is_made_of_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = parent(base, tmp_path / "a", seed=0)
    other = parent(base, tmp_path / "b", seed=1, known=False)
    lineage = list(lineage_of([one, one, other]))
    assert [(data.name, data.licence) for data in lineage] == [("a-data", "CC-BY-4.0"), ("data of b@1", "unknown")]


def test_adapters_that_are_served_differently_are_not_made_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = parent(base, tmp_path / "a", seed=0)
    adapter = make_adapter(tmp_path / "b", base, seed=1)
    write_manifest(manifest(base, "b", serving=ServingDefaults(system_prompt="Be brief.")), adapter)
    with pytest.raises(MergeError, match="served in different ways"):
        serving_of([one, read_parent("b@1", adapter, base)])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": [1.0]}, "2 weights"),
        ({"weights": [0.0, 1.0]}, "weight of zero"),
        ({"method": "average"}, "no method"),
        ({"density": 0.0}, "density"),
        ({"method": "cat", "max_rank": 4}, "cat gives rank 8"),
    ],
)
def test_what_cannot_be_fused_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    base = make_base(tmp_path / "base")
    parents = [parent(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    with pytest.raises(MergeError, match=reason):
        fuse_adapters(base, parents, tmp_path / "out", name="both", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base"]


def test_a_plain_lora_is_not_converted_and_a_small_one_not_fitted(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base)
    with pytest.raises(MergeError, match="lorikeet fit"):
        read_convertible("a@1", adapter, base)
    with pytest.raises(MergeError, match="rank 4 already"):
        fit_adapter(base, read_parent("a@1", adapter, base), tmp_path / "out", rank=8, name="a")


# The whole way, with PEFT


@pytest.mark.slow
def test_two_adapters_become_one_with_their_lineage_and_goldens_of_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    parents = [parent(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    fused = fuse_adapters(base, parents, tmp_path / "out", name="both", weights=[0.6, 0.4])
    assert (fused.derived.method, fused.derived.rank) == ("cat", 8)
    report = validate_adapter(tmp_path / "out", read_base(base), EngineLimits(16))
    made = report.manifest
    assert made is not None
    assert [each["digest"] for each in made.training["parents"]] == [each.digest for each in parents]
    assert [each["weight"] for each in made.training["parents"]] == [0.6, 0.4]
    assert [data.name for data in made.data] == ["a-data", "b-data"]
    assert made.licences is not None
    assert len(made.goldens) == 6
    assert [rung.against for rung in read_rungs(tmp_path / "out")] == ["a@1", "b@1"]
    expected = weighted_sum([read_factors(each.folder) for each in parents], [0.6, 0.4])
    for module, factors in read_factors(tmp_path / "out").items():
        wanted = expected[module].b @ expected[module].a
        assert np.allclose(factors.b @ factors.a, wanted, atol=np.abs(wanted).max() * 2**-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "out"]


@pytest.mark.slow
def test_goldens_of_what_was_made_are_what_peft_says_of_it(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base")
    parents = [parent(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    fuse_adapters(base, parents, tmp_path / "out", name="both")
    made = read_manifest(tmp_path / "out")
    assert made is not None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    for golden in made.goldens:
        tokens = torch.tensor([golden.prompt_token_ids + golden.completion_token_ids])
        with torch.no_grad():
            tuned = model(tokens).logits[0].log_softmax(-1)
            with model.disable_adapter():
                plain = model(tokens).logits[0].log_softmax(-1)
        for place, token in enumerate(golden.completion_token_ids, start=len(golden.prompt_token_ids) - 1):
            index = place - len(golden.prompt_token_ids) + 1
            assert golden.logprobs[index] == pytest.approx(float(tuned[place, token]), abs=1e-4)
            assert golden.base_logprobs[index] == pytest.approx(float(plain[place, token]), abs=1e-4)


@pytest.mark.slow
def test_measuring_tries_every_method_that_can_be_used_and_takes_the_nearest(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    parents = [parent(base, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    fused = fuse_adapters(base, parents, tmp_path / "out", name="both", measure=True, max_rank=4)
    assert [each.method for each in fused.tried] == list(METHODS)
    assert fused.tried[0].refused.startswith("cat gives rank 8")
    usable = [each for each in fused.tried if not each.refused]
    assert len(usable) == len(METHODS) - 1
    assert fused.derived.method == min(usable, key=lambda each: each.worst_kl).method
    assert json.loads(json.dumps(fused.as_dict()))["tried"][1]["distances"][0]["kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "magnitude_prune"])
def test_fusing_is_what_peft_does_with_the_parents(tmp_path: Path, method: str, rslora: bool) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", layers=1)
    parents = [parent(base, tmp_path / name, seed=seed, use_rslora=rslora) for seed, name in enumerate("ab")]
    fuse_adapters(base, parents, tmp_path / "out", name="both", weights=[0.6, 0.4], method=method, max_rank=8)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, parents[0].folder, adapter_name="0")
    model.load_adapter(parents[1].folder, "1")
    options = {"density": 0.5} if method in ("ties", "magnitude_prune") else {}
    options |= {"svd_rank": 8} if method == "svd" else {}
    model.base_model.add_weighted_adapter(["0", "1"], [0.6, 0.4], "f", combination_type=method, **options)
    for name, module in model.named_modules():
        if "f" in getattr(module, "lora_A", {}):
            ours = read_factors(tmp_path / "out")[name.removeprefix("base_model.model.")]
            # Without its scale, which PEFT leaves at the root of the rank where the parents are rsLoRA.
            theirs = (module.lora_B["f"].weight @ module.lora_A["f"].weight).detach().numpy()
            assert module.scaling["f"] == (pytest.approx(ours.rank**0.5) if rslora else 1.0)
            assert np.allclose(ours.b @ ours.a, theirs, atol=np.abs(theirs).max() * 2**-6)


@pytest.mark.slow
def test_an_adapter_is_fitted_to_a_rank_with_its_error_stated(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "a", base, rank=12, scale=0.1)
    file = read_factors(adapter)
    write_manifest(manifest(base, "a", rank=12), adapter)
    origin = read_parent("a@1", adapter, base)
    with pytest.raises(ParityError, match="a@1"):
        fit_adapter(base, origin, tmp_path / "out", rank=2, name="a")
    assert not (tmp_path / "out").exists()
    done = fit_adapter(base, origin, tmp_path / "out", rank=8, name="a", accept="a random adapter has no small rank")
    assert done.rank == 8
    assert set(done.errors) == set(file)
    assert all(0.1 < error < 0.9 for error in done.errors.values())
    assert done.rungs[0].accepted
    made = validate_adapter(tmp_path / "out", read_base(base), EngineLimits(8)).manifest
    assert made is not None
    assert made.metrics["svd_error_max"] == pytest.approx(max(done.errors.values()))


def dora(base: Path, folder: Path, *, stretch: float) -> Path:
    """A DoRA of rank 4 whose magnitudes are off the base's by a random share of about `stretch`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1 + stretch * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_manifest(manifest(base, folder.name), folder)
    return folder


@pytest.mark.slow
def test_a_dora_becomes_a_lora_that_engines_share_and_does_the_same(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    origin = read_convertible("d@1", dora(base, tmp_path / "d", stretch=0.01), base)
    done = convert_adapter(base, origin, tmp_path / "out", rank=16, name="d")
    assert validate_adapter(tmp_path / "out", read_base(base), EngineLimits(16)).rank == 16
    (rung,) = done.rungs
    assert rung.goldens is not None
    assert rung.goldens.kl is not None
    assert done.effect.kl is not None
    assert rung.goldens.kl < 0.1 * done.effect.kl


@pytest.mark.slow
def test_a_dora_no_lora_of_that_rank_can_stand_for_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    origin = read_convertible("d@1", dora(base, tmp_path / "d", stretch=0.5), base)
    with pytest.raises(ParityError, match="not d@1"):
        convert_adapter(base, origin, tmp_path / "out", rank=1, name="d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "d"]


@pytest.mark.slow
def test_what_peft_can_convert_is_converted_by_it(tmp_path: Path) -> None:
    import torch
    from peft import LoKrConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", layers=1)
    config = LoKrConfig(r=4, alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "k")
    origin = read_convertible("k@1", tmp_path / "k", base)
    done = convert_adapter(base, origin, tmp_path / "out", rank=32, name="k")
    assert done.method == "LOKR as LoRA of rank 32"
    assert validate_adapter(tmp_path / "out", read_base(base), EngineLimits(32)).rank == 32
