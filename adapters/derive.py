"""An adapter made from others, without training: held against its parents on their goldens, written whole or not at all.

Its manifest names the parents by digest, joins their data and licences, and has goldens made anew from the parents' prompts:
the same proof that a trained adapter brings.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters.base import BaseModelInfo, Report, open_checkpoint, read_base, silent
from adapters.errors import MergeError
from adapters.factors import Factors, write_factors
from adapters.ladder import Divergence, Limits, Rung, add_rung, judge_rung
from adapters.manifest import DataLineage, Golden, Manifest, ServingDefaults, write_manifest
from adapters.merge import building, check_adapter
from adapters.parity import (
    Questions,
    Reference,
    check_memory,
    greedy,
    load_model,
    look,
    questions_for,
    quietly,
    torch_and_peft,
)
from adapters.peft_format import load_config, lora_config, version_digest

MAX_GOLDENS = 16  # as many as are asked of a parent
KL_FLOOR, KL_OF_EFFECT = 5e-3, 0.1  # a copy may be off by a tenth of what the original does
MEAN_FLOOR, MEAN_OF_EFFECT = 0.02, 0.3


@dataclass(frozen=True)
class Parent:
    """An adapter that others are made from."""

    name: str  # as it was asked for: support@3, or a folder's name
    folder: Path
    digest: str
    manifest: Manifest | None

    @property
    def goldens(self) -> Sequence[Golden]:
        return self.manifest.goldens if self.manifest is not None else ()


@dataclass(frozen=True)
class Derived:
    """What was made. rungs: how far it is from each parent."""

    out: str
    digest: str
    rank: int
    method: str
    goldens: int
    rungs: tuple[Rung, ...]
    effect: Divergence  # the base against the first parent: how much there was to lose
    errors: Mapping[str, float]  # by layer: what the cut left out, as a share of the layer's update

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(replace(self, rungs=())), "rungs": [rung.model_dump(mode="json") for rung in self.rungs]}


def read_parent(name: str, folder: Path, base: Path) -> Parent:
    """Raises MergeError unless it belongs to the base."""
    manifest = check_adapter(folder, base, read_base(base))
    return Parent(name, folder, version_digest(folder), manifest)


@dataclass
class Bench:
    """Base and parents in one model in memory, each adapter by its place: "0", "1" …"""

    model: Any
    base: Path
    info: BaseModelInfo
    parents: Sequence[Parent]
    scratch: Path
    prompts: Path | None = None

    def references(self) -> list[Reference]:
        """What each parent makes of its goldens and of the sample prompts."""
        return [self.reference(place) for place in range(len(self.parents))]

    def reference(self, place: int) -> Reference:
        self.model.set_adapter(str(place))
        folder = self.scratch / f"reference-{place}"
        folder.mkdir()
        return Reference(self.model, self.questions(place), folder)

    def questions(self, place: int) -> Questions:
        return questions_for(self.base, self.info, self.parents[place].goldens, prompts=self.prompts)

    @contextmanager
    def trying(self, factors: Mapping[str, Factors]) -> Iterator[None]:
        """The model with these updates as they would be saved."""
        folder = self.scratch / "tried"
        folder.mkdir()
        write_factors(folder, factors, self.info)
        try:
            if load_config(self.parents[0].folder).get("peft_type") == "LORA":
                self.model.load_adapter(folder, "tried")
                self.model.set_adapter("tried")
            else:  # one model holds adapters of one kind
                del self.model
                self.model = _with_adapter(self.base, folder, "tried")
            yield
        finally:
            shutil.rmtree(folder)
            if len(self.model.peft_config) > 1 and "tried" in self.model.peft_config:
                self.model.set_adapter("0")  # else PEFT warns that it has to choose
                self.model.delete_adapter("tried")

    def goldens(self) -> list[Golden]:
        """The parents' prompts, in turns, answered anew by the adapter that is active."""
        chosen = [each for group in zip_longest_present([parent.goldens for parent in self.parents]) for each in group]
        chosen = chosen[:MAX_GOLDENS]
        if not chosen:
            return []
        questions = self.questions(0)
        prompts = [golden.prompt_token_ids for golden in chosen]
        texts = greedy(self.model, prompts, questions).tokens
        sequences = [(*prompt, *text) for prompt, text in zip(prompts, texts, strict=True)]
        tuned, _ = look(self.model, sequences)
        with self.model.disable_adapter():
            plain, _ = look(self.model, sequences)
        decode = _decoder(self.base)
        made, end = [], 0
        for golden, text, sequence in zip(chosen, texts, sequences, strict=True):
            end += len(sequence) - 1
            own = slice(end - len(text), end)
            made.append(
                Golden(
                    messages=golden.messages,
                    completion=decode(text),
                    prompt_token_ids=golden.prompt_token_ids,
                    completion_token_ids=list(text),
                    logprobs=[round(float(value), 5) for value in tuned.logprobs[own]],
                    base_logprobs=[round(float(value), 5) for value in plain.logprobs[own]],
                )
            )
        return made


@contextmanager
def bench(
    base: Path, parents: Sequence[Parent], scratch: Path, *, prompts: Path | None, report: Report
) -> Iterator[Bench]:
    """Raises MergeError where the model does not fit into the memory, or cannot be loaded."""
    info = read_base(base)
    check_memory(open_checkpoint(base))
    report("loading the base", 0, 0)
    with quietly():
        model = _with_adapter(base, parents[0].folder, "0")
        for place, parent in enumerate(parents[1:], start=1):
            model.load_adapter(parent.folder, str(place))
        yield Bench(model, base, info, parents, scratch, prompts)


def _with_adapter(base: Path, adapter: Path, name: str) -> Any:
    torch, peft = torch_and_peft()
    model = load_model(base, torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter, adapter_name=name, is_trainable=False)


def copy_limits(effect: Divergence) -> Limits:
    """What an adapter that is to be a copy of another may differ from it, by what the other does to the base."""
    return Limits(
        kl=max(KL_FLOOR, KL_OF_EFFECT * (effect.kl or 0.0)), mean_abs=max(MEAN_FLOOR, MEAN_OF_EFFECT * effect.mean_abs)
    )


def publish_copy(
    base: Path,
    parent: Parent,
    factors: Mapping[str, Factors],
    out: Path,
    *,
    name: str,
    method: str,
    errors: Mapping[str, float],
    accept: str = "",
    prompts: Path | None = None,
    report: Report = silent,
) -> Derived:
    """Write an adapter that is to do what its parent does. Raises ParityError when it does not; nothing is left then.

    accept: why it may be further from its parent than the limits.
    """
    with building(out) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        with bench(base, [parent], scratch, prompts=prompts, report=report) as made:
            report(f"asking {parent.name}", 0, 3)
            reference = made.reference(0)
            with made.model.disable_adapter():
                effect = reference.hold(made.model, texts=False)["all"]
            with made.trying(factors):
                report(f"comparing with {parent.name}", 1, 3)
                rung = parent_rung("adapter", parent, reference.hold(made.model), copy_limits(effect), accept)
                judge_rung(rung)
                report("making goldens", 2, 3)
                goldens = made.goldens()
        shutil.rmtree(scratch)
        rank = write_derived(
            folder, factors, made.info, [parent], name=name, method=method, goldens=goldens, errors=errors, rungs=[rung]
        )
        digest = version_digest(folder)
    return Derived(str(out), digest, rank, method, len(goldens), (rung,), effect, errors)


def parent_rung(name: str, parent: Parent, figures: Mapping[str, Divergence], limits: Limits, accept: str = "") -> Rung:
    goldens, sample = figures.get("goldens"), figures.get("sample")
    rung = Rung(
        name=name, dtype="bfloat16", by="PEFT", against=parent.name, goldens=goldens, sample=sample, limits=limits
    )
    return rung.model_copy(update={"accepted": accept}) if rung.faults else rung


def write_derived(
    folder: Path,
    factors: Mapping[str, Factors],
    info: BaseModelInfo,
    parents: Sequence[Parent],
    *,
    name: str,
    method: str,
    goldens: Sequence[Golden],
    errors: Mapping[str, float],
    rungs: Sequence[Rung],
    weights: Sequence[float] = (),
) -> int:
    """The adapter's three files, its report and card. Returns its largest rank."""
    write_factors(folder, factors, info)
    config = lora_config(load_config(folder))
    manifest = Manifest(
        name=name,
        base=info.fingerprint,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=list(config.target_modules),
        created_at=int(time.time()),
        base_licence=info.licence,
        data=list(lineage_of(parents)),
        training={
            "method": method,
            "parents": [
                {"name": parent.name, "digest": parent.digest, "weight": weight}
                | ({"training": parent.manifest.training} if parent.manifest is not None else {})
                for parent, weight in zip(parents, weights or [1.0] * len(parents), strict=True)
            ],
        },
        metrics={"svd_error_mean": sum(errors.values()) / len(errors), "svd_error_max": max(errors.values())}
        if errors
        else {},
        goldens=list(goldens),
        serving=serving_of(parents),
    )
    verdict = manifest.judge_licences()
    write_manifest(manifest.model_copy(update={"licences": verdict}), folder)
    lines = [
        f"# {name}",
        "",
        f"Made by `lorikeet` ({method}) from {', '.join(f'{parent.name} (`{parent.digest}`)' for parent in parents)}.",
        "",
        "## Licences",
        "",
        f"Together: {verdict.level}.",
        *(f"- {line}" for line in verdict.lines()),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    for rung in rungs:
        add_rung(folder, rung)
    return config.max_rank


def lineage_of(parents: Sequence[Parent]) -> Iterator[DataLineage]:
    """The data of all parents, each once; a parent without a manifest is data nobody knows the terms of."""
    seen: set[tuple[str, str]] = set()
    for parent in parents:
        unknown = [DataLineage(name=f"data of {parent.name}", digest=parent.digest, rows=0, licence="unknown")]
        for data in parent.manifest.data if parent.manifest is not None else unknown:
            if (data.name, data.digest) not in seen:
                seen.add((data.name, data.digest))
                yield data


def serving_of(parents: Sequence[Parent]) -> ServingDefaults:
    """How all parents are served. Raises MergeError where they do not agree: nobody could say which way holds."""
    kinds = [parent.manifest.serving if parent.manifest is not None else ServingDefaults() for parent in parents]
    if any(kind != kinds[0] for kind in kinds):
        raise MergeError(
            f"{' and '.join(parent.name for parent in parents)} are served in different ways (the `serving` section of their "
            "manifests: template, system prompt, sampling). Train them alike to make one adapter of them."
        )
    return kinds[0]


def zip_longest_present(groups: Sequence[Sequence[Golden]]) -> Iterator[list[Golden]]:
    """The first of each, the second of each …"""
    for place in range(max((len(group) for group in groups), default=0)):
        yield [group[place] for group in groups if place < len(group)]


def _decoder(base: Path) -> Callable[[Sequence[int]], str]:
    if not (base / "tokenizer.json").is_file() and not (base / "tokenizer.model").is_file():
        return lambda tokens: ""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))
