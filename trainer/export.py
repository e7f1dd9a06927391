"""Write a trained adapter as every engine can load it, with the manifest that proves what it is. Torch lives here.

The weights are stored in bfloat16, which is how engines hold them; goldens are computed with exactly those weights, in
float32 arithmetic, so that a served value differs by the engine's rounding only.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters.base import BaseModelInfo
from adapters.manifest import DataLineage, Golden, Manifest, write_manifest
from adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from trainer.config import TrainConfig
from trainer.data.chat import Row, prompt_of
from trainer.template import ChatRenderer

Report = Callable[[int, int], None]  # goldens done, of how many


def export_adapter(
    model: Any,
    config: TrainConfig,
    base: BaseModelInfo,
    renderer: ChatRenderer,
    folder: Path,
    *,
    goldens: Sequence[Row],
    lineage: Sequence[DataLineage],
    metrics: dict[str, float],
    report: Report = lambda done, total: None,
) -> Manifest:
    """Fill `folder` with adapter_config.json, adapter_model.safetensors and manifest.json."""
    folder.mkdir(parents=True, exist_ok=True)
    round_to_served(model)
    targets = write_weights(model, base, folder)
    manifest = Manifest(
        name=config.name,
        base=base.fingerprint,
        rank=config.lora.r,
        alpha=config.lora.alpha,
        target_modules=targets,
        created_at=int(time.time()),
        base_licence=base.licence,
        data=list(lineage),
        training=config.model_dump(mode="json"),
        metrics=metrics,
        goldens=make_goldens(model, renderer, goldens, max_tokens=config.golden_tokens, report=report),
        serving=config.serving,
    )
    write_manifest(manifest, folder)
    return manifest


def round_to_served(model: Any) -> None:
    """Every weight to the bfloat16 value that is stored and served, then all in float32 to compute with."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    model.eval()
    # the trainer wraps forward in autocast for bf16 runs; goldens want the plain one
    inner = model.get_base_model()
    for module in (model, inner):
        original = getattr(module, "_original_forward", None)
        if original is not None:
            module.forward = original


def write_weights(model: Any, base: BaseModelInfo, folder: Path) -> list[str]:
    """The PEFT files, without a word about this machine. Returns the target modules."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    raw = model.peft_config["default"].to_dict()
    targets = sorted(raw["target_modules"])
    raw |= {
        "base_model_name_or_path": base.fingerprint.model,
        "revision": base.fingerprint.revision,
        "inference_mode": True,
        "target_modules": targets,
    }
    text = json.dumps(raw, indent=1, sort_keys=True, default=_plain) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return targets


def _plain(value: Any) -> Any:
    """PEFT's enums and sets, as JSON has them."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


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

    tokens = torch.tensor([list(prompt)])
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

    tokens = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
    return [round(float(value), 5) for value in chosen]
