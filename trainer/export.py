"""Write what was trained as every engine can load it, with the manifest that proves what it is.

Adapters are stored in bfloat16, which is how engines hold them. Goldens are computed with exactly those weights on the base
that will serve them, read again from the disk in full precision whatever the training held in memory (an adapter trained
over NF4 is served over the base itself), in float32 arithmetic where the memory allows: a served value then differs by the
engine's rounding only.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adapters.base import BaseModelInfo, BaseSpec, describe_base, read_base, write_base
from adapters.licences import Verdict
from adapters.manifest import DataLineage, Golden, Manifest, write_manifest
from adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, load_config, lora_config
from adapters.tensors import open_tensors, save_tensors
from trainer.config import TrainConfig
from trainer.data.chat import Row, prompt_of
from trainer.errors import TrainingError
from trainer.examples import Features
from trainer.plan import PLAN_FILE, Plan, write_json
from trainer.template import ChatRenderer

CARD_FILE = "lorikeet-training.json"
FLOAT32_BYTES = 4.5  # per parameter: the weights and some room
Report = Callable[[int, int], None]  # goldens done, of how many


def export_adapter(
    checkpoint: Path,
    config: TrainConfig,
    plan: Plan,
    folder: Path,
    *,
    metrics: dict[str, float],
    report: Report = lambda done, total: None,
) -> Manifest:
    """Fill `folder` with adapter_config.json, adapter_model.safetensors and manifest.json, and compute the goldens."""
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(checkpoint, plan.info, folder)
    last = plan.stages[-1]
    goldens: list[Golden] = []
    if last.prompts or config.tuning == "qlora":
        model = load_served(plan.base, folder)
        goldens = make_goldens(model, plan.renderer, last.prompts, max_tokens=config.golden_tokens, report=report)
        if config.tuning == "qlora" and "input_ids" in last.eval[0]:
            metrics = metrics | {"eval_loss_served": mean_loss(model, last.eval)}
    manifest = _manifest(
        config, plan.info, folder, lineage=plan.lineage, licences=plan.licences, metrics=metrics, goldens=goldens
    )
    write_manifest(manifest, folder)
    return manifest


def export_checkpoint(run: Path, checkpoint: Path, folder: Path) -> Manifest:
    """A checkpoint of a run as an adapter folder, while the run goes on. Without goldens: they need the model.

    Needs no torch. Raises TrainingError where the run trains no adapter, or the checkpoint is gone already.
    """
    try:
        config = TrainConfig.model_validate_json((run / "config.json").read_bytes())
        plan = json.loads((run / PLAN_FILE).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise TrainingError(f"{checkpoint} of {run} cannot be exported: {exc}") from exc
    if config.tuning == "full":
        raise TrainingError(f"{run} trains every weight, so its checkpoints are models and no adapters.")
    info = read_base(Path(plan["base"]))
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(checkpoint, info, folder)
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    manifest = _manifest(
        config,
        info,
        folder,
        lineage=[DataLineage.model_validate(each) for each in plan["lineage"]],
        licences=Verdict.model_validate(plan["licences"]),
        metrics={"steps": float(state["global_step"])} | ({"eval_loss": losses[-1]} if losses else {}),
        goldens=[],
    )
    write_manifest(manifest, folder)
    return manifest


def _manifest(
    config: TrainConfig,
    base: BaseModelInfo,
    folder: Path,
    *,
    lineage: Sequence[DataLineage],
    licences: Verdict,
    metrics: dict[str, float],
    goldens: list[Golden],
) -> Manifest:
    written = lora_config(load_config(folder))
    return Manifest(
        name=config.name,
        base=base.fingerprint,
        rank=written.rank,
        alpha=written.alpha,
        target_modules=list(written.target_modules),
        created_at=int(time.time()),
        base_licence=base.licence,
        data=list(lineage),
        training=config.model_dump(mode="json"),
        metrics=metrics,
        goldens=goldens,
        serving=config.serving,
        licences=licences,
    )


def write_adapter(checkpoint: Path, base: BaseModelInfo, folder: Path) -> None:
    """The PEFT files of a checkpoint, in bfloat16 and without a word about this machine."""
    weights = open_tensors(checkpoint / WEIGHTS_FILE)
    save_tensors(
        folder / WEIGHTS_FILE,
        {name: to_bfloat16(weights.read(name)) for name in weights.tensors if ".lora_" in name},
    )
    raw = load_config(checkpoint)
    raw |= {
        "base_model_name_or_path": base.fingerprint.model,
        "revision": base.fingerprint.revision,
        "inference_mode": True,
        "target_modules": sorted(raw["target_modules"]),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def to_bfloat16(values: Any) -> Any:
    return np.asarray(values).astype(ml_dtypes.bfloat16)


def export_model(checkpoint: Path, config: TrainConfig, plan: Plan, folder: Path, metrics: dict[str, float]) -> None:
    """A fully trained model as a prepared base of its own, in the base's dtype; a half-made one is not seen under its name.

    Raises TrainingError when `folder` holds something else already.
    """
    from transformers import AutoModelForCausalLM

    if folder.exists() and any(folder.iterdir()):
        raise TrainingError(f"{folder} is not empty. Give a folder that is, or does not exist.")
    building = folder.with_name(f".{folder.name}-writing")
    shutil.rmtree(building, ignore_errors=True)
    base_dtype = json.loads((plan.base / "config.json").read_text(encoding="utf-8")).get("dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=base_dtype, local_files_only=True)
    model.save_pretrained(building)
    own = {path.name for path in building.iterdir()}
    for path in plan.base.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in own | {"lorikeet-base.json"}:
            shutil.copyfile(path, building / path.name)
    (building / "model.safetensors.index.json").unlink(missing_ok="model.safetensors.index.json" not in own)
    spec = BaseSpec(name=config.name, model=config.name, licence=plan.info.licence, folder=folder.absolute())
    write_base(building, describe_base(building, spec))
    card: Mapping[str, Any] = {
        "name": config.name,
        "base": plan.info.fingerprint.model_dump(mode="json"),
        "base_licence": plan.info.licence,
        "data": [each.model_dump(mode="json") for each in plan.lineage],
        "licences": plan.licences.model_dump(mode="json"),
        "training": config.model_dump(mode="json"),
        "metrics": metrics,
    }
    write_json(building / CARD_FILE, card)
    if folder.exists():
        folder.rmdir()
    building.rename(folder)


def load_served(base: Path, adapter: Path) -> Any:
    """Base and adapter as they are served: bfloat16 values, computed in float32 where the device has room for it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, local_files_only=True)
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    wanted = FLOAT32_BYTES * sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cpu" or wanted < torch.cuda.mem_get_info()[0]:
        model = model.float()
    return model.to(device).eval()


def make_goldens(
    model: Any, renderer: ChatRenderer, rows: Sequence[Row], *, max_tokens: int, report: Report
) -> list[Golden]:
    """For each row's prompt the adapter's own greedy answer, and how likely adapter and base find it."""
    import torch

    goldens = []
    for number, row in enumerate(rows):
        prompt = renderer.prompt_ids(prompt_of(row))
        completion = greedy(model, prompt, renderer.stop_ids, max_tokens=max_tokens)
        with torch.no_grad():
            logprobs = completion_logprobs(model, prompt, completion)
            with model.disable_adapter():
                base_logprobs = completion_logprobs(model, prompt, completion)
        goldens.append(
            Golden(
                messages=prompt_of(row),
                completion=renderer.tokenizer.decode(completion, skip_special_tokens=True),
                prompt_token_ids=prompt,
                completion_token_ids=completion,
                logprobs=logprobs,
                base_logprobs=base_logprobs,
            )
        )
        report(number + 1, len(rows))
    return goldens


def greedy(model: Any, prompt: Sequence[int], stop_ids: frozenset[int], *, max_tokens: int) -> list[int]:
    """The most likely continuation, up to and including the first end-of-turn token."""
    import torch

    tokens = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
    )
    return [int(token) for token in output[0, len(prompt) :]]


def completion_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    """Natural log-probability of each completion token given all before it, in float32."""
    import torch

    tokens = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
    return [round(float(value), 5) for value in chosen]


def mean_loss(model: Any, examples: Sequence[Features]) -> float:
    """Negative log-likelihood per labelled token over all examples, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    total, count = 0.0, 0
    for example in examples:
        # rows that share a sequence count one by one: here nobody packs
        start = 0
        for length in example.get("seq_lengths", [len(example["input_ids"])]):
            ids = torch.tensor([example["input_ids"][start : start + length]], device=model.device)
            labels = torch.tensor(example["labels"][start : start + length], device=model.device)[1:]
            start += length
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / max(count, 1)
