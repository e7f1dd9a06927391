"""A PEFT LoRA folder as it lies on disk: its configuration, the names of its tensors, its digest.

Reading is strict and complete. What a served LoRA may say in `adapter_config.json` is an allow-list, because engines
ignore fields they do not know and then answer with something else than was trained.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapters.errors import Fault, InvalidAdapterError
from adapters.manifest import MANIFEST_FILE
from adapters.tensors import shorten, unique_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)  # what makes up a version; anything else in a folder is ignored

MAX_CONFIG_BYTES = 1 << 20
MERGE_INSTEAD = "It cannot share an engine with other adapters; `lorikeet merge` can fold it into a model of its own."
_PATTERN_KEY = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.)+\$?")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LoraConfig:
    """The fields of adapter_config.json that decide what a LoRA computes."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        return int(_matching(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What multiplies B·A: alpha / rank, or alpha / √rank for rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        return float(_matching(self.alpha_pattern, module, self.alpha)) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def max_rank(self) -> int:
        return max([self.rank, *self.rank_pattern.values()])


@dataclass(frozen=True)
class LoraTensor:
    """The name of a LoRA tensor, taken apart."""

    module: str  # in the base model: model.layers.0.self_attn.q_proj
    side: Literal["A", "B"]


def parse_tensor_name(name: str) -> LoraTensor | None:
    """None for a tensor that is not half of a LoRA on a linear layer."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        return None
    return LoraTensor(match["module"], "A" if match["side"] == "A" else "B")


def read_config(folder: Path) -> LoraConfig:
    """Raises InvalidAdapterError with every field that keeps the adapter from being served."""
    raw = load_config(folder)
    faults = shorten(list(config_faults(raw)))
    if faults:
        raise InvalidAdapterError(faults)
    return lora_config(raw)


def load_config(folder: Path) -> dict[str, Any]:
    """The configuration as a dictionary. Raises InvalidAdapterError when it is no plain JSON object."""
    path = folder / CONFIG_FILE
    fix = "Upload the folder that PEFT's save_pretrained wrote; its adapter_config.json must not be edited by hand."
    if not path.is_file():
        raise InvalidAdapterError([Fault("missing_file", f"There is no {CONFIG_FILE}.", CONFIG_FILE, fix)])
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InvalidAdapterError([Fault("bad_config", f"{CONFIG_FILE} is larger than 1 MiB.", CONFIG_FILE, fix)])
    try:
        raw = json.loads(
            path.read_bytes().decode("utf-8"), object_pairs_hook=unique_object, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as exc:
        raise InvalidAdapterError(
            [Fault("bad_config", f"{CONFIG_FILE} is not plain JSON: {exc}.", CONFIG_FILE, fix)]
        ) from exc
    if not isinstance(raw, dict):
        raise InvalidAdapterError([Fault("bad_config", f"{CONFIG_FILE} is not a JSON object.", CONFIG_FILE, fix)])
    return raw


def lora_config(raw: Mapping[str, Any]) -> LoraConfig:
    """The typed view of a configuration in which `config_faults` found nothing wrong with the numbers."""
    targets = raw.get("target_modules") or ()
    return LoraConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern=dict(raw.get("rank_pattern") or {}),
        alpha_pattern={key: float(value) for key, value in (raw.get("alpha_pattern") or {}).items()},
        dora=bool(raw.get("use_dora")),
        base_model=raw.get("base_model_name_or_path"),
    )


def config_faults(raw: Mapping[str, Any]) -> Iterator[Fault]:
    """Everything in adapter_config.json that an engine would refuse, or, worse, ignore."""
    if raw.get("peft_type") != "LORA":
        yield _config_fault(
            "unsupported_peft_type",
            "peft_type",
            f"peft_type is {_show(raw.get('peft_type'))}; only LORA is served.",
            "Train a LoRA adapter, or convert this one with PEFT's save_as_lora.",
        )
    yield from _number_faults(raw)
    for name, value in raw.items():
        if name in _CHECKED:
            continue
        rule = _RULES.get(name)
        if rule is None:
            if not _is_neutral(value):
                yield _config_fault(
                    "unknown_config_field",
                    name,
                    f"{CONFIG_FILE} sets '{name[:80]}' to {_show(value)}, a field that is not known here, so what it "
                    "changes would be ignored.",
                    "Remove the field if it has no influence on the weights, or train without it.",
                )
        elif not rule.accepts(value):
            yield _config_fault(rule.code, name, rule.message.format(value=_show(value)), rule.fix)


def version_digest(folder: Path) -> str:
    """Content identity of a version: hex sha256 over "name sha256\\n" of its files, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(FILES):
        path = folder / name
        if path.is_file():
            digest.update(f"{name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Rule:
    """A field that is known, and the values that leave a LoRA plain."""

    accepts: Callable[[Any], bool]
    code: str = "bad_config"
    message: str = "has the value {value}"
    fix: str = "Write the configuration with PEFT's save_pretrained."


def _neutral(code: str, message: str, fix: str) -> _Rule:
    return _Rule(_is_neutral, code, message, fix)


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_init(value: Any) -> bool:
    # These only choose the first values of A and B. The others (PiSSA, OLoRA, CorDA, LoftQ) changed the base as well.
    return isinstance(value, bool) or value in (None, "gaussian", "orthogonal", "eva", "mica", "lora_ga")


_ANY = _Rule(lambda _: True)
_CHECKED = frozenset({"peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"})
_RULES: dict[str, _Rule] = {
    # No influence on what the saved weights compute.
    **dict.fromkeys(
        (
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "lora_dropout",
            "layers_to_transform",
            "layers_pattern",
            "exclude_modules",
            "megatron_config",
            "megatron_core",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "qalora_group_size",
            "runtime_config",
            "ensure_weight_tying",
        ),
        _ANY,
    ),
    "task_type": _Rule(
        lambda value: value in (None, "CAUSAL_LM"),
        "unsupported_task",
        "task_type is {value}; only CAUSAL_LM adapters generate text.",
        "Train the adapter on a causal language model.",
    ),
    "fan_in_fan_out": _neutral(
        "unsupported_config",
        "fan_in_fan_out is {value}: the weights are stored transposed, which the engine ignores.",
        "Train on a base whose layers are ordinary linear layers.",
    ),
    "bias": _Rule(
        lambda value: value in (None, "none"),
        "bias",
        "bias is {value}: the adapter also changes biases of the base.",
        f"Train with bias='none'. {MERGE_INSTEAD}",
    ),
    "lora_bias": _neutral("lora_bias", "lora_bias is {value}: B carries a bias.", "Train with lora_bias=False."),
    "use_dora": _neutral(
        "dora",
        "use_dora is {value}: DoRA rescales the base weights, which a shared engine cannot do.",
        f"Train with use_dora=False. {MERGE_INSTEAD}",
    ),
    "modules_to_save": _neutral(
        "modules_to_save",
        "modules_to_save is {value}: whole modules of the base were trained.",
        f"Train LoRA on linear layers only. {MERGE_INSTEAD}",
    ),
    "trainable_token_indices": _neutral(
        "new_tokens",
        "trainable_token_indices is {value}: rows of the embedding were trained.",
        "Train without new or trainable tokens.",
    ),
    "init_lora_weights": _Rule(
        _is_init,
        "unconverted_init",
        "init_lora_weights is {value}: that initialisation moved weights of the base, so the tensors alone are wrong "
        "on the untouched base.",
        "Save with path_initial_model_for_weight_conversion, which turns it into an ordinary LoRA.",
    ),
    "layer_replication": _neutral(
        "unsupported_config",
        "layer_replication is {value}: the adapter belongs to a base with repeated layers.",
        "Train on the base as it is served.",
    ),
    "target_parameters": _neutral(
        "unsupported_config",
        "target_parameters is {value}: parameters that are not linear layers were trained.",
        "Train LoRA on linear layers only.",
    ),
    "alora_invocation_tokens": _neutral(
        "unsupported_config",
        "alora_invocation_tokens is set: activated LoRA is not served.",
        "Train a LoRA without invocation tokens.",
    ),
    **{
        name: _neutral("unsupported_config", f"{name} is {{value}}: {kind} is not served.", "Train a plain LoRA.")
        for name, kind in {
            "use_qalora": "QALoRA",
            "use_bdlora": "block-diagonal LoRA",
            "arrow_config": "Arrow routing",
            "kasa_config": "KaSA",
            "velora_config": "VeLoRA",
            "monteclora_config": "MonteCLoRA",
        }.items()
    },
}


def _number_faults(raw: Mapping[str, Any]) -> Iterator[Fault]:
    fix = "Write the configuration with PEFT's save_pretrained."
    if not _is_rank(raw.get("r")):
        yield _config_fault("bad_config", "r", f"r is {_show(raw.get('r'))}; a rank is a positive whole number.", fix)
    if not _is_alpha(raw.get("lora_alpha")):
        yield _config_fault(
            "bad_config",
            "lora_alpha",
            f"lora_alpha is {_show(raw.get('lora_alpha'))}; it must be a positive, finite number.",
            fix,
        )
    if not isinstance(raw.get("use_rslora", False), bool):
        yield _config_fault("bad_config", "use_rslora", "use_rslora must be true or false.", fix)
    targets = raw.get("target_modules")
    is_names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not targets or not (isinstance(targets, str) or is_names):
        yield _config_fault(
            "bad_config", "target_modules", "target_modules must name the layers that were trained.", fix
        )
    for name, accepts in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict) or not all(accepts(value) for value in pattern.values()):
            yield _config_fault("bad_config", name, f"{name} must map layer names to positive numbers.", fix)
            continue
        for key in pattern:
            # Engines run each key as a regular expression, on the step thread that serves everybody.
            if not _PATTERN_KEY.fullmatch(key) or len(key) > 200:
                yield _config_fault(
                    "unsafe_pattern",
                    name,
                    f"{name} has the key {_show(key)}; only layer names are accepted, no regular expressions.",
                    "List the layers by name, such as 'layers.3.self_attn.q_proj'.",
                )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 16


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches a suffix of the name beginning at a dot."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _config_fault(code: str, name: str, message: str, fix: str) -> Fault:
    return Fault(code, message, f"{CONFIG_FILE}:{name[:80]}", fix)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "…"
