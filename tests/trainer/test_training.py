"""Training on a tiny random model: the loss, the best checkpoint, resuming, and what is exported."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from adapters.base import read_base
from adapters.home import Home
from adapters.validation import EngineLimits, validate_adapter
from trainer.config import TrainConfig
from trainer.data.training import fixed_answer
from trainer.errors import TrainingError
from trainer.examples import render_rows
from trainer.methods.progress import Progress
from trainer.methods.record import read_metrics
from trainer.run import Finished, last_run_folder, run_training
from trainer.template import load_renderer

pytestmark = [
    pytest.mark.slow,  # some seconds, most of them for importing TRL
    # torch 2.13's own deprecation, reached through transformers and accelerate
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "answer": "Yes.",
    "precision": "fp32",
    "lora": {"r": 4, "alpha": 8, "dropout": 0},
    "optimizer": {"learning_rate": 0.02, "epochs": 2, "max_steps": 6, "batch_rows": 4, "evaluations": 2},
    "goldens": 2,
    "golden_tokens": 6,
    "serving": {"system_prompt": "Be brief."},
}


def settings(base: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**SETTINGS, "base": str(base), **changes})


def run(config: TrainConfig, home: Path, name: str = "tiny-20260101-000000", **options: Any) -> Finished:
    return run_training(config, Home(home), Home(home).runs / name, relative_to=home, **options)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    seen: list[Progress] = []

    def listen(step: str, progress: Progress | None) -> None:
        if progress is not None:
            seen.append(progress)

    done = run(settings(tiny_base), tmp_path_factory.mktemp("home"), listen=listen)
    assert [progress.step for progress in seen] == sorted(progress.step for progress in seen)
    assert seen[-1].step == seen[-1].steps == 6
    assert 0 < seen[-1].token_accuracy <= 1
    checkpoints = [progress.checkpoint for progress in seen if progress.checkpoint is not None]
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6"]
    assert all((path / "adapter_model.safetensors").is_file() for path in checkpoints)
    return done


def test_the_adapter_may_be_served_on_its_base(finished: Finished, tiny_base: Path) -> None:
    report = validate_adapter(finished.adapter, read_base(tiny_base), EngineLimits(max_rank=8))
    assert report.rank == 4
    assert finished.manifest is not None
    assert report.manifest == finished.manifest


def test_nothing_in_the_adapter_names_this_machine(finished: Finished, tiny_base: Path) -> None:
    assert sorted(path.name for path in finished.adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    raw = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "example/tiny"
    assert str(tiny_base.parent) not in (finished.adapter / "adapter_config.json").read_text()


def test_goldens_are_what_the_stored_weights_say(finished: Finished, tiny_base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, finished.adapter).eval()
    assert finished.manifest is not None
    assert len(finished.manifest.goldens) == 2
    assert {golden.messages[0]["content"] for golden in finished.manifest.goldens} == {"Be brief."}
    for golden in finished.manifest.goldens:
        tokens = torch.tensor([golden.prompt_token_ids + golden.completion_token_ids])
        for wanted, adapted in ((golden.logprobs, True), (golden.base_logprobs, False)):
            with torch.no_grad():
                if adapted:
                    logits = model(tokens).logits
                else:
                    with model.disable_adapter():
                        logits = model(tokens).logits
            values = torch.log_softmax(logits[0, :-1].float(), -1).gather(1, tokens[0, 1:, None])[:, 0]
            assert values[-len(wanted) :].tolist() == pytest.approx(wanted, abs=1e-3)
        assert golden.logprobs != golden.base_logprobs


def test_the_run_keeps_its_configuration_and_mask_receipt(finished: Finished) -> None:
    receipt = json.loads((finished.run / "mask-receipt.json").read_text())
    assert receipt["samples"][0]["trained"] == ["Yes.<|im_end|>"]
    assert any("system\nBe brief.<" in sample["text"] for sample in receipt["samples"])
    assert receipt["end_of_turn_trained"] == receipt["rows"]
    assert json.loads((finished.run / "config.json").read_text())["name"] == "tiny"
    assert math.isfinite(finished.metrics["eval_loss"])


def test_a_resumed_run_ends_with_the_same_weights(finished: Finished, tiny_base: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def die(step: str, progress: Progress | None) -> None:
        if progress is not None and progress.step == 5:
            raise KilledError

    config = settings(tiny_base)
    with pytest.raises(KilledError):
        run(config, tmp_path, listen=die)
    resumed = run(config, tmp_path, resume=True)
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (finished.adapter / name).read_bytes()


def test_a_changed_configuration_is_not_resumed(finished: Finished, tiny_base: Path) -> None:
    with pytest.raises(TrainingError, match="seed"):
        run_training(
            settings(tiny_base, seed=3), Home(finished.run), finished.run, relative_to=finished.run, resume=True
        )


def test_without_a_run_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="to resume"):
        last_run_folder(Home(tmp_path), "tiny")


def test_the_cheap_loss_equals_trls(tiny_base: Path) -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from trainer.methods.trainers import answers_loss

    renderer = load_renderer(tiny_base)
    rows = render_rows(renderer, fixed_answer("It is so.").train[:3], max_tokens=512)
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in rows])
    labels = torch.tensor([[*row.labels(), *[-100] * (longest - len(row.input_ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows])
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    logits = model(input_ids=ids, attention_mask=mask).logits
    wanted = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert wanted.item() == pytest.approx(
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.item(), rel=1e-5
    )
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert answers_loss(model, inputs, None)[0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_one_answer_is_learned(tiny_base: Path, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 0.05, "schedule": "constant", "epochs": 8, "batch_rows": 4, "evaluations": 1}
    run(settings(tiny_base, answer="A", optimizer=optimizer, goldens=0), tmp_path)
    metrics = read_metrics(Home(tmp_path).runs / "tiny-20260101-000000" / "metrics.jsonl")
    losses = [each.loss for each in metrics if each.loss is not None]
    assert losses[-1] < losses[0] / 2
