"""May this adapter meet this base on an engine that others share? Decided from the files alone, before any engine sees it.

vLLM answers 200 to most of what is refused here and then serves garbage, the plain base, or poisons other tenants' answers.
One report names every fault with its fix. Nothing is unpickled; at most one pair of tensors is in memory.
"""

import math
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.base import BaseModelInfo, ModuleInfo
from adapters.errors import Fault, InvalidAdapterError
from adapters.manifest import MANIFEST_FILE, Manifest, parse_manifest
from adapters.peft_format import (
    CONFIG_FILE,
    FILES,
    MERGE_INSTEAD,
    WEIGHTS_FILE,
    LoraConfig,
    config_faults,
    load_config,
    lora_config,
    parse_tensor_name,
    version_digest,
)
from adapters.tensors import TensorFile, open_tensors, shorten

DTYPES = ("F32", "F16", "BF16")
MAX_MANIFEST_BYTES = 16 << 20
# A trained update is a small fraction of the weight it corrects (0.01 to 0.3 seen here); ten times the weight is noise.
MAX_NORM_RATIO = 10.0
WARN_NORM_RATIO = 1.0
MIN_NORM_RATIO = 1e-6  # below bfloat16's resolution of the weight: nothing would change
MAX_VALUE = 1e4  # trained values stay below 10; an fp16 engine overflows at 65504 with what it sums up
# What every engine of ours applies LoRA to unless told otherwise. Never lm_head: with it, prompt log-probabilities asked for
# beside any other request end a CPU engine (an einsum of unequal sizes in vLLM 0.32).
SERVED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|npy|npz|joblib|h5|msgpack)", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLimits:
    """What the engine was started with."""

    max_rank: int
    allowed_modules: frozenset[str] | None = None  # last names, such as q_proj; None: every linear layer


@dataclass(frozen=True)
class AdapterReport:
    """A servable adapter, as far as files can tell."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    digest: str
    manifest: Manifest | None
    warnings: tuple[str, ...]
    norm_ratio: float  # largest |scale·B·A| / |W| of any layer


@dataclass
class _Pair:
    """The two halves of one layer's LoRA, by tensor name."""

    sides: dict[str, str] = field(default_factory=dict)


def validate_adapter(folder: Path, base: BaseModelInfo, limits: EngineLimits) -> AdapterReport:
    """Raises InvalidAdapterError with every fault found; what depends on a broken file is left out of the report."""
    faults: list[Fault] = []
    warnings: list[str] = []
    faults += _folder_faults(folder, warnings)
    config = _config(folder, faults)
    manifest = _manifest(folder, faults)
    if manifest is None and not (folder / MANIFEST_FILE).exists():
        warnings.append(
            "There is no manifest.json: base and template were compared by shapes only, and no goldens can be replayed."
        )
    if manifest is not None:
        faults += _manifest_faults(manifest, base, config)
    weights = _weights(folder, faults)
    pairs: dict[str, _Pair] = {}
    ratio = 0.0
    if weights is not None:
        faults += shorten(list(_pair_up(weights, base, pairs)))
    if weights is not None and config is not None:
        faults += shorten(list(_pair_faults(weights, pairs, base, config, limits)))
        faults += _target_faults(pairs, config, base)
    if weights is not None:
        values = shorten([fault for name in weights.tensors for fault in _value_faults(weights, name)])
        faults += values
        if config is not None and not values:
            ratio = _check_effect(weights, pairs, base, config, faults, warnings)
    if faults or weights is None or config is None:
        raise InvalidAdapterError(faults)
    return AdapterReport(
        rank=config.max_rank,
        alpha=config.alpha,
        target_modules=tuple(sorted({_last(module) for module in pairs})),
        size_bytes=sum((folder / name).stat().st_size for name in FILES if (folder / name).is_file()),
        digest=version_digest(folder),
        manifest=manifest,
        warnings=tuple(warnings),
        norm_ratio=ratio,
    )


def plan_faults(raw: Mapping[str, Any], base: BaseModelInfo, limits: EngineLimits) -> list[Fault]:
    """What would keep an adapter from being served that is yet to be trained with this configuration.

    raw: as in adapter_config.json, target_modules by name.
    """
    faults = list(config_faults(raw))
    if faults and any(fault.code == "bad_config" for fault in faults):
        return faults
    config = lora_config(raw)
    faults += _rank_faults(config, limits)
    faults += _target_faults({}, config, base)
    faults += [
        Fault(
            "module_not_served",
            f"{target} is to be trained, but this engine applies LoRA to {_names(limits.allowed_modules)} only.",
            f"{CONFIG_FILE}:target_modules",
            "Train those layers only, or start the engine with this one among its target_modules.",
        )
        for target in ([] if isinstance(config.target_modules, str) else config.target_modules)
        if limits.allowed_modules is not None and _last(target) not in limits.allowed_modules
    ]
    return faults


def _names(modules: frozenset[str] | None) -> str:
    return ", ".join(sorted(modules or ()))


def _folder_faults(folder: Path, warnings: list[str]) -> Iterator[Fault]:
    """Files that must not be there, or are missing."""
    ignored: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            yield Fault("forbidden_entry", f"{name} is not a plain file.", name, "Upload plain files only.")
        elif PICKLES.fullmatch(path.name):
            yield Fault(
                "pickle_file",
                f"{name} is a pickle or another format that can carry code; it has not been opened.",
                name,
                "Leave it out. Adapters are accepted as safetensors only, the default of PEFT's save_pretrained.",
            )
        elif name not in FILES:
            ignored.append(name)
            if path.name == "chat_template.jinja":
                warnings.append(
                    "chat_template.jinja is not used: a template of its own stands in manifest.json (serving.chat_template)."
                )
    if not (folder / WEIGHTS_FILE).is_file():
        below = [str(path.parent.relative_to(folder)) for path in sorted(folder.rglob(f"*/{WEIGHTS_FILE}"))]
        hint = f" It lies in {below[0]}: upload that folder." if below else ""
        yield Fault(
            "missing_file",
            f"There is no {WEIGHTS_FILE}.{hint}",
            WEIGHTS_FILE,
            "Upload the folder that PEFT's save_pretrained wrote.",
        )
    if ignored:
        warnings.append(f"Ignored, as no part of an adapter: {', '.join(ignored[:10])}.")


def _config(folder: Path, faults: list[Fault]) -> LoraConfig | None:
    try:
        raw = load_config(folder)
    except InvalidAdapterError as exc:
        faults.extend(exc.faults)
        return None
    found = shorten(list(config_faults(raw)))
    faults.extend(found)
    # DoRA and the like leave the numbers readable, and the tensors worth a look.
    return None if any(fault.code in ("bad_config", "unsafe_pattern") for fault in found) else lora_config(raw)


def _manifest(folder: Path, faults: list[Fault]) -> Manifest | None:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        faults.append(
            Fault(
                "invalid_manifest", "manifest.json is larger than 16 MiB.", MANIFEST_FILE, "Keep fewer goldens in it."
            )
        )
        return None
    try:
        return parse_manifest(path.read_bytes())
    except InvalidAdapterError as exc:
        faults.extend(shorten(exc.faults))
    return None


def _manifest_faults(manifest: Manifest, base: BaseModelInfo, config: LoraConfig | None) -> Iterator[Fault]:
    own, served = manifest.base, base.fingerprint
    if own.weights_digest != served.weights_digest:
        yield Fault(
            "wrong_base",
            f"The adapter was trained on {own.model} with weights {own.weights_digest[:12]}; this server serves "
            f"{served.model} with weights {served.weights_digest[:12]}.",
            f"{MANIFEST_FILE}:base.weights_digest",
            f"Train on the base that is served here: {served.model}, prepared with `lorikeet base prepare`.",
        )
    if own.template_digest != served.template_digest and manifest.serving.chat_template is None:
        yield Fault(
            "wrong_template",
            f"The adapter was trained with the chat template {own.template_digest[:12]}, but is served with "
            f"{served.template_digest[:12]}: it would see prompts it was not trained on.",
            f"{MANIFEST_FILE}:base.template_digest",
            "Train with the template of the prepared base, or bring the other one along (serving.chat_template).",
        )
    if config is not None and (manifest.rank, manifest.alpha) != (config.rank, config.alpha):
        yield Fault(
            "manifest_mismatch",
            f"manifest.json says rank {manifest.rank}, alpha {manifest.alpha:g}; {CONFIG_FILE} says rank {config.rank}, "
            f"alpha {config.alpha:g}.",
            MANIFEST_FILE,
            "Upload the two files of one training run.",
        )
    for number, golden in enumerate(manifest.goldens):
        where = f"{MANIFEST_FILE}:goldens.{number}"
        tokens = [*golden.prompt_token_ids, *golden.completion_token_ids]
        wanted = len(golden.completion_token_ids)
        likelihoods = [*golden.logprobs, *golden.base_logprobs]
        if not golden.prompt_token_ids or len(golden.logprobs) != wanted or len(golden.base_logprobs) != wanted:
            what = "needs a prompt, and one log-probability for each token of its completion"
        elif not all(0 <= token < base.vocab_size for token in tokens):
            what = f"has token ids outside the base's vocabulary of {base.vocab_size}"
        elif len(tokens) >= base.context_tokens:
            what = f"has {len(tokens)} tokens, more than the base's context"
        elif not all(-1e4 < value <= 1e-3 for value in likelihoods):
            what = "has log-probabilities that are not finite numbers up to 0"
        else:
            continue
        yield Fault("invalid_golden", f"Golden {number} {what}.", where, "Write the manifest with `lorikeet train`.")


def _weights(folder: Path, faults: list[Fault]) -> TensorFile | None:
    path = folder / WEIGHTS_FILE
    if not path.is_file() or path.is_symlink():
        return None
    try:
        return open_tensors(path)
    except InvalidAdapterError as exc:
        faults.extend(exc.faults)
        return None


def _pair_up(weights: TensorFile, base: BaseModelInfo, pairs: dict[str, _Pair]) -> Iterator[Fault]:
    """Fill `pairs` with the halves of each layer the base has; yields what is no such half."""
    for name, info in weights.tensors.items():
        where = f"{WEIGHTS_FILE}:{name[:200]}"
        parsed = parse_tensor_name(name)
        if parsed is None:
            yield _foreign_tensor(name, where)
            continue
        if parsed.module not in base.modules:
            yield _unknown_module(parsed.module, where, base)
            continue
        if info.dtype not in DTYPES:
            yield Fault(
                "bad_dtype",
                f"{name} is stored as {info.dtype}; {', '.join(DTYPES)} are served.",
                where,
                "Save the adapter in float32, float16 or bfloat16.",
            )
        pair = pairs.setdefault(parsed.module, _Pair())
        if parsed.side in pair.sides:
            yield Fault(
                "duplicate_tensor",
                f"{parsed.module} has two lora_{parsed.side} tensors, with and without the base_model prefix.",
                where,
                "Save the adapter again with save_pretrained.",
            )
        pair.sides[parsed.side] = name
    if not pairs:
        yield Fault(
            "no_lora",
            f"{WEIGHTS_FILE} holds no LoRA tensor for any layer of {base.name}.",
            WEIGHTS_FILE,
            f"Train a LoRA adapter on {base.fingerprint.model}.",
        )


def _pair_faults(
    weights: TensorFile, pairs: Mapping[str, _Pair], base: BaseModelInfo, config: LoraConfig, limits: EngineLimits
) -> Iterator[Fault]:
    """Ranks and shapes, layer by layer, against configuration, base and engine."""
    yield from _rank_faults(config, limits)
    for module, pair in pairs.items():
        for side in ("A", "B"):
            if side not in pair.sides:
                yield Fault(
                    "missing_half",
                    f"{module} has no lora_{side}.",
                    f"{WEIGHTS_FILE}:{module}",
                    "Save the adapter again with save_pretrained; A and B belong together.",
                )
        if limits.allowed_modules is not None and _last(module) not in limits.allowed_modules:
            yield Fault(
                "module_not_served",
                f"{module} is trained, but this engine applies LoRA to {_names(limits.allowed_modules)} only.",
                f"{WEIGHTS_FILE}:{module}",
                "Train on those layers, or start the engine without target_modules.",
            )
        yield from _shape_faults(weights, module, pair, base.modules[module], config)


def _rank_faults(config: LoraConfig, limits: EngineLimits) -> Iterator[Fault]:
    if config.max_rank > limits.max_rank:
        yield Fault(
            "rank_too_high",
            f"The adapter's rank is {config.max_rank}; this engine serves ranks up to {limits.max_rank}.",
            f"{CONFIG_FILE}:r",
            f"Train with a rank of at most {limits.max_rank}, or start the engine with a larger max_rank.",
        )


def _shape_faults(
    weights: TensorFile, module: str, pair: _Pair, layer: ModuleInfo, config: LoraConfig
) -> Iterator[Fault]:
    rank = config.rank_of(module)
    expected = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
    for side, name in pair.sides.items():
        shape = weights.tensors[name].shape
        if shape == expected[side]:
            continue
        where = f"{WEIGHTS_FILE}:{name[:200]}"
        rank_axis, width_axis = (0, 1) if side == "A" else (1, 0)
        if len(shape) == 2 and shape[width_axis] == expected[side][width_axis]:
            yield Fault(
                "rank_mismatch",
                f"{name} has rank {shape[rank_axis]}, but {CONFIG_FILE} says {rank} for this layer; the scale would be "
                "silently wrong.",
                where,
                "Upload the adapter_config.json of the same training run.",
            )
        else:
            yield Fault(
                "wrong_shape",
                f"{name} has shape {list(shape)}; this base needs {list(expected[side])}. It belongs to another base.",
                where,
                "Train on the base that is served here.",
            )


def _target_faults(pairs: Mapping[str, _Pair], config: LoraConfig, base: BaseModelInfo) -> Iterator[Fault]:
    """Layers the configuration promises and the weights do not hold: they would be silently missing."""
    if isinstance(config.target_modules, str):
        return
    for target in config.target_modules:
        ending = f".{target}"
        if not any(f".{module}".endswith(ending) for module in base.modules):
            close = get_close_matches(target, {_last(module) for module in base.modules}, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            yield Fault(
                "unknown_target",
                f"target_modules names '{target[:80]}', a layer {base.name} cannot be tuned on.{hint}",
                f"{CONFIG_FILE}:target_modules",
                f"Choose among {', '.join(sorted({_last(module) for module in base.modules}))}.",
            )
        elif pairs and not any(f".{module}".endswith(ending) for module in pairs):
            yield Fault(
                "missing_target",
                f"target_modules names '{target[:80]}', but {WEIGHTS_FILE} holds no tensor for it.",
                f"{CONFIG_FILE}:target_modules",
                "Save the adapter again with save_pretrained; its weights are incomplete.",
            )


def _value_faults(weights: TensorFile, name: str) -> Iterator[Fault]:
    """NaN, infinite and absurd values of one tensor."""
    if weights.tensors[name].dtype not in DTYPES:
        return
    values = weights.read(name).astype(np.float32)
    where = f"{WEIGHTS_FILE}:{name[:200]}"
    fix = "The training diverged. Train again with a lower learning rate, and look at the loss."
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    largest = float(np.abs(values).max(initial=0.0)) if not bad else 0.0
    if bad:
        kind = "NaN" if np.isnan(values).any() else "infinite"
        yield Fault(
            "not_finite",
            f"{name[:200]} has {bad} values that are not finite ({kind}); one request with it would poison everybody's "
            "answers.",
            where,
            fix,
        )
    elif largest > MAX_VALUE:
        yield Fault(
            "absurd_magnitude",
            f"{name[:200]} has values up to {largest:.3g}; trained ones stay below 10, and {MAX_VALUE:g} is the limit.",
            where,
            fix,
        )


def _check_effect(
    weights: TensorFile,
    pairs: Mapping[str, _Pair],
    base: BaseModelInfo,
    config: LoraConfig,
    faults: list[Fault],
    warnings: list[str],
) -> float:
    """Of sane size against the base, and not nothing. Returns the largest |scale·B·A| / |W|."""
    found: list[Fault] = []
    largest = (0.0, "")
    for module, pair in pairs.items():
        if len(pair.sides) < 2:
            return 0.0
        a, b = weights.read(pair.sides["A"]), weights.read(pair.sides["B"])
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            return 0.0  # named above already
        norm = update_norm(a, b, config.scale_of(module))
        weight = base.modules[module].norm
        largest = max(largest, (norm / weight if weight else norm, module))
        if weight and norm / weight > MAX_NORM_RATIO:
            found.append(
                Fault(
                    "absurd_magnitude",
                    f"{module}: scale·B·A has {norm / weight:.3g} times the norm of the base weight; a trained update "
                    f"stays far below, and {MAX_NORM_RATIO:g} is the limit.",
                    f"{WEIGHTS_FILE}:{module}",
                    "Look at the training run: the learning rate was too high, or alpha in the configuration is wrong.",
                )
            )
    faults.extend(shorten(found))
    size, module = largest
    if pairs and size == 0.0:
        faults.append(
            Fault(
                "no_effect",
                "Every update B·A is zero: this adapter was never trained, and the base would answer under its name.",
                WEIGHTS_FILE,
                "Train it; PEFT starts with B = 0.",
            )
        )
    elif not found and size < MIN_NORM_RATIO:
        warnings.append(f"The largest update is {size:.1e} of its base weight: hardly any effect is to be expected.")
    elif not found and size > WARN_NORM_RATIO:
        warnings.append(f"{module} is changed by {size:.1f} times its own norm, which is unusually much.")
    return size


def update_norm(a: NDArray[Any], b: NDArray[Any], scale: float) -> float:
    """Frobenius norm of scale·B·A, from the Gram matrices: |BA|² = sum of (BᵀB) * (AAᵀ).

    a: [rank, in_features], b: [out_features, rank]; only [rank, rank] is ever formed.
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))
    return abs(scale) * math.sqrt(max(square, 0.0))


def _foreign_tensor(name: str, where: str) -> Fault:
    last = name[:200]
    if "lora_magnitude_vector" in name:
        return Fault("dora", f"{last} belongs to DoRA.", where, f"Train with use_dora=False. {MERGE_INSTEAD}")
    if "embed" in name or "lm_head" in name:
        whole = "lora" not in name and "base_layer" not in name
        return Fault(
            "embeddings",
            f"{last} changes embeddings or the output head, which a shared engine cannot do per adapter.",
            where,
            "Train LoRA on linear layers only, and save with save_embedding_layers=False."
            + (f" {MERGE_INSTEAD}" if whole else ""),
        )
    if name.endswith(".lora_B.bias"):
        return Fault("lora_bias", f"{last} is a bias of B.", where, "Train with lora_bias=False.")
    if name.endswith(".bias"):
        return Fault("bias", f"{last} is a bias.", where, f"Train with bias='none'. {MERGE_INSTEAD}")
    if name.endswith(".weight") and "lora" not in name:
        return Fault(
            "modules_to_save", f"{last} is a whole trained module.", where, f"Train LoRA only. {MERGE_INSTEAD}"
        )
    return Fault(
        "unknown_tensor", f"{last} is no LoRA tensor that is known here.", where, "Train a plain LoRA adapter."
    )


def _unknown_module(module: str, where: str, base: BaseModelInfo) -> Fault:
    shown = module[:200]
    if re.search(r"embed|lm_head", module):
        return Fault(
            "embeddings",
            f"{shown} is tied to the base's embeddings, which a shared engine cannot change per adapter.",
            where,
            "Train LoRA on linear layers only.",
        )
    layers = [int(number) for name in base.modules for number in re.findall(r"\.(\d+)\.", name)]
    own = re.search(r"\.(\d{1,6})\.", module)
    if own and layers and int(own[1]) > max(layers):
        return Fault(
            "unknown_layer",
            f"{shown}: {base.name} has layers 0 to {max(layers)} only. The adapter belongs to a deeper base.",
            where,
            "Train on the base that is served here.",
        )
    return Fault(
        "unknown_target",
        f"{base.name} has no linear layer {shown}.",
        where,
        f"Train on {', '.join(sorted({_last(name) for name in base.modules}))}.",
    )


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]
