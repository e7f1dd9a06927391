"""Every method and every kind of weights on a tiny random model: what is trained, what comes out, what is refused."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.base import read_base
from adapters.home import Home
from adapters.merge import merge_adapter
from adapters.peft_format import load_config
from adapters.tensors import open_tensors
from adapters.validation import EngineLimits, validate_adapter
from tests.trainer.conftest import build_base
from tests.trainer.fresh import Fresh
from trainer.config import TrainConfig
from trainer.errors import TrainingError
from trainer.examples import load_examples
from trainer.export import completion_logprobs, export_checkpoint, load_served
from trainer.methods.progress import Progress
from trainer.methods.record import read_metrics
from trainer.methods.stage import needs, pack
from trainer.run import Finished, run_training
from trainer.template import load_renderer

pytestmark = [
    pytest.mark.slow,
    # torch 2.13's own deprecation, reached through transformers and accelerate
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

WEIGHTS = "adapter_model.safetensors"
TEXTS = [
    f"Line {number}: the lorikeet eats nectar and fruit, and sleeps in the trees at night." for number in range(20)
]
Train = Callable[..., Finished]


def pair(number: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No!!"}],
    }


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "name": "tiny",
            "base": str(tiny_base),
            "precision": "fp32",
            "engine": "cpu",
            "lora": {"r": 4, "alpha": 8, "dropout": 0},
            "optimizer": {"learning_rate": 0.02, "max_steps": 4, "batch_rows": 4, "evaluations": 2},
            "max_tokens": 128,
            "goldens": 2,
            "golden_tokens": 4,
        }
        if not changes.keys() & {"data", "stages"}:
            settings["answer"] = "Yes."
        return TrainConfig.model_validate(settings | changes)

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair(number)) + "\n" for number in range(20)))
    return make


@pytest.fixture
def train(config: Callable[..., TrainConfig], tmp_path: Path) -> Train:
    def run(name: str = "run", **changes: Any) -> Finished:
        options = {key: changes.pop(key) for key in ("listen", "announce", "resume") if key in changes}
        return run_training(config(**changes), Home(tmp_path), tmp_path / name, relative_to=tmp_path, **options)

    return run


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def test_raw_text_is_learned(train: Train) -> None:
    optimizer = {"learning_rate": 0.05, "schedule": "constant", "epochs": 12, "batch_rows": 2, "evaluations": 1}
    done = train(method="pretrain", data={"train": "texts.jsonl"}, optimizer=optimizer)
    losses = [each.loss for each in read_metrics(done.run / "metrics.jsonl") if each.loss is not None]
    assert losses[-1] < losses[0] * 0.7
    assert done.manifest is not None
    assert [golden.messages[-1]["role"] for golden in done.manifest.goldens] == ["user", "user"]


def test_packed_rows_do_not_see_each_other(tiny_base: Path, config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from trainer.methods.trainers import answers_loss

    settings = config()
    found = load_examples(settings, settings, load_renderer(tiny_base), relative_to=tmp_path, fetch=Path)
    rows = [row for row in found.train if len(row["input_ids"]) < 60][:4]
    packed = pack(rows, 128)
    assert sum(len(row["input_ids"]) for row in packed) == sum(len(row["input_ids"]) for row in rows)
    assert len(packed) < len(rows)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention)
        together = answers_loss(model, collate(packed), torch.tensor(1.0))[0].item()
        apart = sum(
            answers_loss(
                model, {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}, torch.tensor(1.0)
            )[0].item()
            for row in rows
        )
        assert together == pytest.approx(apart, rel=1e-5)


def test_packing_takes_fewer_steps_for_the_same_tokens(train: Train) -> None:
    optimizer = {"learning_rate": 0.02, "batch_rows": 1, "evaluations": 1}
    packed, plain = train("packed", packing=True, optimizer=optimizer), train("plain", optimizer=optimizer)
    assert packed.metrics["steps"] < plain.metrics["steps"]
    assert math.isfinite(packed.metrics["eval_loss"])


def test_text_then_chat_is_one_adapter_on_the_untouched_base(train: Train, tiny_base: Path) -> None:
    seen: list[Progress] = []
    done = train(
        stages=[
            {"method": "pretrain", "data": {"train": "texts.jsonl", "licence": "MIT"}},
            {"answer": "Yes.", "optimizer": {"max_steps": 2, "learning_rate": 0.02, "evaluations": 1}},
        ],
        listen=lambda step, progress: seen.append(progress) if progress else None,
    )
    assert validate_adapter(done.adapter, read_base(tiny_base), EngineLimits(16)).rank == 4
    assert [progress.step for progress in seen] == sorted(progress.step for progress in seen)
    assert seen[-1].step == seen[-1].steps == 6
    assert {each.stage for each in read_metrics(done.run / "metrics.jsonl")} == {1, 2}
    assert done.manifest is not None
    assert [source.name for source in done.manifest.data] == ["texts.jsonl", "fixed-answer"]
    first = open_tensors(done.run / "stage-1" / "checkpoints" / "checkpoint-4" / WEIGHTS)
    last = open_tensors(done.run / "stage-2" / "checkpoints" / "checkpoint-2" / WEIGHTS)
    name = next(name for name in first.tensors if "lora_B" in name)
    assert (first.read(name) != last.read(name)).any()


def margin(base: Path, adapter: Path) -> float:
    """How much likelier the chosen answer is than the rejected one, in nats."""
    renderer = load_renderer(base)
    model = load_served(base, adapter)
    example = pair(99)
    prompt = renderer.prompt_ids(example["prompt"])

    def likelihood(answer: list[dict[str, str]]) -> float:
        ids = list(renderer.render([*example["prompt"], *answer]).input_ids)[len(prompt) : -1]
        return sum(completion_logprobs(model, prompt, ids))

    return likelihood(example["chosen"]) - likelihood(example["rejected"])


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "on an adapter"])
def test_preferred_answers_become_likelier(train: Train, tiny_base: Path, tmp_path: Path, fresh: bool) -> None:
    start = train("start", optimizer={"learning_rate": 0.001, "max_steps": 2, "evaluations": 1})
    optimizer = {"learning_rate": 0.01, "epochs": 3, "batch_rows": 4, "evaluations": 2}
    more = {} if fresh else {"adapter": str(start.adapter)}
    done = train("dpo", method="dpo", data={"train": "pairs.jsonl"}, optimizer=optimizer, **more)
    assert margin(tiny_base, done.adapter) > margin(tiny_base, start.adapter) + 1
    assert sorted(path.name for path in done.adapter.iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "manifest.json",
    ]
    assert not any("ref" in name for name in open_tensors(done.adapter / WEIGHTS).tensors)


def test_an_adapter_is_gone_on_with_and_keeps_its_lora(train: Train) -> None:
    start = train("start")
    told: list[str] = []
    done = train("more", adapter=str(start.adapter), lora={"r": 8, "alpha": 1}, announce=told.append)
    assert done.manifest is not None
    assert (done.manifest.rank, done.manifest.alpha) == (4, 8)
    assert weights(done.adapter) != weights(start.adapter)
    assert any("Goes on from" in line and "rank 4" in line for line in told)
    assert done.metrics["eval_loss"] < start.metrics["eval_loss"]


def test_an_adapter_of_another_base_is_not_gone_on_with(train: Train, tmp_path: Path) -> None:
    start = train("start")
    manifest = json.loads((start.adapter / "manifest.json").read_text())
    manifest["base"]["weights_digest"] = "0" * 64
    (start.adapter / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match="weights 000000"):
        train("more", adapter=str(start.adapter))
    with pytest.raises(TrainingError, match="no adapter folder"):
        train("again", adapter="nowhere")


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "alpha": 8, "rslora": True},
        {"r": 4, "alpha": 8, "rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["rslora", "patterns", "targets"],
)
def test_other_plain_adapters_are_served_too(train: Train, tiny_base: Path, lora: dict[str, Any]) -> None:
    done = train(lora={**lora, "dropout": 0})
    report = validate_adapter(done.adapter, read_base(tiny_base), EngineLimits(16))
    assert report.rank == max(4, *lora.get("rank_pattern", {"": 0}).values())
    assert done.profile == "servable"


def test_dora_is_merge_only_and_merges(train: Train, tiny_base: Path, tmp_path: Path) -> None:
    told: list[str] = []
    done = train(lora={"r": 4, "alpha": 8, "dora": True, "dropout": 0}, announce=told.append)
    assert done.profile == "merge-only"
    assert told[0].startswith("Merge-only")
    parity = merge_adapter(tiny_base, done.adapter, tmp_path / "merged")
    assert parity.effect is not None
    assert parity.fp32 is not None
    assert parity.effect.max_abs > 10 * parity.fp32.max_abs


def test_an_adapter_over_nf4_is_judged_on_the_base_that_serves_it(train: Train, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", hidden=64)
    done = train(tuning="qlora", base=str(base))
    validate_adapter(done.adapter, read_base(base), EngineLimits(16))
    assert done.manifest is not None
    assert done.metrics["eval_loss_served"] != done.metrics["eval_loss"]
    model = load_served(base, done.adapter)
    for golden in done.manifest.goldens:
        values = completion_logprobs(model, golden.prompt_token_ids, golden.completion_token_ids)
        assert values == pytest.approx(golden.logprobs, abs=1e-4)


def test_full_fine_tuning_leaves_a_base_of_its_own(train: Train, tiny_base: Path) -> None:
    done = train(tuning="full", optimizer={"learning_rate": 0.001, "max_steps": 4, "evaluations": 2})
    assert (done.profile, done.manifest) == ("merge-only", None)
    info, before = read_base(done.adapter), read_base(tiny_base)
    assert info.fingerprint.weights_digest != before.fingerprint.weights_digest
    assert info.fingerprint.template_digest == before.fingerprint.template_digest
    assert {tensor.dtype for tensor in open_tensors(done.adapter / "model.safetensors").tensors.values()} == {"BF16"}
    card = json.loads((done.adapter / "lorikeet-training.json").read_text())
    assert card["base"] == before.fingerprint.model_dump()
    assert not list(done.run.glob(".*-writing"))


def test_training_stops_when_the_eval_loss_no_longer_falls_and_keeps_the_best(train: Train) -> None:
    optimizer = {
        "learning_rate": 0.1,
        "schedule": "constant",
        "epochs": 30,
        "batch_rows": 4,
        "evaluations": 60,
        "patience": 2,
    }
    done = train(optimizer=optimizer, goldens=0)
    metrics = read_metrics(done.run / "metrics.jsonl")
    evaluated = [(each.eval_loss, each.step) for each in metrics if each.eval_loss is not None]
    assert done.metrics["steps"] < 30 * 5
    assert min(evaluated)[1] == done.metrics["best_step"]
    assert [loss for loss, step in evaluated if step > done.metrics["best_step"]] >= [min(evaluated)[0]] * 2
    assert len([step for _, step in evaluated if step > done.metrics["best_step"]]) == 2


def test_gradient_checkpointing_and_accumulation_learn_the_same(train: Train) -> None:
    optimizer = {"learning_rate": 0.02, "max_steps": 3, "evaluations": 1}
    plain = train("plain", optimizer={**optimizer, "batch_rows": 4})
    saving = train("saving", optimizer={**optimizer, "batch_rows": 2, "accumulate": 2}, gradient_checkpointing=True)
    assert saving.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=0.05)


def test_a_checkpoint_can_be_served_while_its_run_goes_on(train: Train, tiny_base: Path, tmp_path: Path) -> None:
    exported: list[Path] = []

    def listen(step: str, progress: Progress | None) -> None:
        if progress is not None and progress.checkpoint is not None:
            exported.append(tmp_path / progress.checkpoint.name)
            export_checkpoint(tmp_path / "run", progress.checkpoint, exported[-1])

    done = train(listen=listen)
    assert [path.name for path in exported] == ["checkpoint-2", "checkpoint-4"]
    for path in exported:
        report = validate_adapter(path, read_base(tiny_base), EngineLimits(16))
        assert report.manifest is not None
        assert report.manifest.metrics["steps"] == float(path.name.rpartition("-")[2])
    assert weights(exported[-1]) == weights(done.adapter)
    assert load_config(exported[-1]) == load_config(done.adapter)


def test_a_missing_package_is_named_before_anything_is_loaded(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(TrainingError, match="pip install wandb"):
        needs(config(tracking="wandb"))


def test_a_licence_that_forbids_training_is_refused_unless_excepted(train: Train, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "eval.jsonl").write_text(rows)
    from trainer.data.card import file_sha256

    digest = file_sha256(tmp_path / "train.jsonl")
    source = {"name": "answers", "licence": "MIT", "sha256": digest, "rows": 20}
    card = {
        "name": "mine",
        "format": "text",
        "seed": 0,
        "train": {"rows": 20, "sha256": digest},
        "eval": {"rows": 20, "sha256": digest},
        "sources": [source | {"teacher": {"name": "a-model", "licence": "openai-terms"}}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(TrainingError, match="Licences forbid"):
        train(method="pretrain", data={"folder": "."})
    done = train("excepted", method="pretrain", data={"folder": "."}, licence_exceptions={"a-model": "in writing"})
    assert done.manifest is not None
    assert done.manifest.licences is not None
    assert any(finding.excepted == "in writing" for finding in done.manifest.licences.findings)


KILLED: dict[str, dict[str, Any]] = {
    "sft": {"answer": "Yes.", "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
    "chain": {
        "stages": [{"method": "pretrain", "data": {"train": "texts.jsonl"}}, {"answer": "Yes."}],
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    },
    "dpo": {"method": "dpo", "data": {"train": "pairs.jsonl"}, "adapter": "start"},
}


KILLS = {"sft": 2, "chain": 1, "dpo": 1}


@pytest.mark.parametrize("kind", sorted(KILLED))
def test_a_run_killed_and_resumed_ends_with_the_same_bytes(
    train: Train, config: Callable[..., TrainConfig], tmp_path: Path, kind: str
) -> None:
    optimizer = {"learning_rate": 0.02, "epochs": 3, "max_steps": 9, "batch_rows": 4, "evaluations": 4}
    changes: dict[str, Any] = {**KILLED[kind], "optimizer": optimizer, "goldens": 0}
    if changes.get("adapter"):
        changes["adapter"] = str(train("start").adapter)
    (tmp_path / "tiny.yaml").write_text(json.dumps(config(**changes).model_dump(mode="json", exclude_none=True)))
    run, undisturbed, dice = tmp_path / "killed", tmp_path / "undisturbed", random.Random(kind)

    def start(into: Path, *more: str) -> Fresh:
        command = ["train", "tiny.yaml", "--processes", "1", "--into", str(into), *more]
        environment = {"LORIKEET_HOME": str(tmp_path)}
        return Fresh("lorikeet", command, log=tmp_path / "log.txt", folder=tmp_path, environment=environment)

    whole = start(undisturbed)
    assert whole.wait() == 0, whole.said()
    steps = steps_of(undisturbed)
    for kill_at in sorted(dice.sample(range(1, steps), KILLS[kind])):
        more = ["--resume"] if (run / "config.json").is_file() else []
        killed = start(run, *more)
        while killed.poll() is None and steps_of(run) < kill_at:
            time.sleep(0.002)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL, killed.said()
    resumed = start(run, "--resume")
    assert resumed.wait() == 0, resumed.said()
    assert weights(run / "adapter") == weights(undisturbed / "adapter")
    told, wanted = (read_metrics(each / "metrics.jsonl") for each in (run, undisturbed))
    assert [(each.stage, each.step, each.loss, each.eval_loss) for each in told] == [
        (each.stage, each.step, each.loss, each.eval_loss) for each in wanted
    ]
    finished, other = (json.loads((each / "finished.json").read_text())["metrics"] for each in (run, undisturbed))
    assert finished | {"seconds": 0} == other | {"seconds": 0}


def steps_of(run: Path) -> int:
    """How many optimizer steps the run has told of."""
    return sum(each.loss is not None for each in read_metrics(run / "metrics.jsonl"))


def test_two_processes_train_together(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    optimizer = {"learning_rate": 0.02, "batch_rows": 2, "evaluations": 2}
    settings = config(optimizer=optimizer).model_dump(mode="json", exclude_none=True)
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings))
    environment = {**os.environ, "LORIKEET_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lorikeet", "train", "tiny.yaml", "--processes", "2", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["metrics"]["steps"] == 5  # 20 rows, two processes of two rows each
    assert validate_adapter(Path(told["adapter"]), read_base(Path(settings["base"])), EngineLimits(16)).rank == 4
