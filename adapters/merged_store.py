"""Merged checkpoints on this machine: checked against the version they claim to be, brought in whole or not at all, removed."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base import (
    INFO_FILE,
    BaseModelInfo,
    BaseSpec,
    Report,
    describe_base,
    read_base,
    read_template,
    silent,
    template_digest,
    write_base,
)
from adapters.errors import MergeError
from adapters.ladder import judge_rung, read_report, rungs_of
from adapters.licences import PROMOTION, LicencePolicy, Verdict
from adapters.names import engine_name
from adapters.records import AdapterVersion

KEPT = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".md"})  # never pickles, never programs
NOTICES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
MEASURED = ("merged", "saved", "quantized")  # rungs of which a checkpoint needs one: they measure its own weights
INCOMING = ".incoming-"
ABANDONED_S = 6 * 3600.0  # what a killed command left is older; the largest copy is younger


@dataclass(frozen=True)
class Arrived:
    """A checkpoint that passed every check and lies in its place."""

    digest: str  # hex sha256 of its weights
    scheme: str
    size_bytes: int
    report: Mapping[str, Any]
    licences: Verdict | None


def bring_in(
    source: Path,
    version: AdapterVersion,
    base: BaseModelInfo,
    merged: Path,
    *,
    policy: LicencePolicy = PROMOTION,
    forced: str | None = None,
    report: Report = silent,
) -> Arrived:
    """Copy a merged model into its folder below `merged`, after every check. One that is there already is left alone.

    A source below `merged` is a merge of our own and is moved. forced: why it may be used although its licences say no.
    Raises MergeError, ParityError, BaseModelError; nothing is left behind then.
    """
    found, licences = check_merged(source, version, base, policy=policy, forced=forced)
    merged.mkdir(parents=True, exist_ok=True)
    sweep(merged)
    with tempfile.TemporaryDirectory(prefix=INCOMING, dir=merged) as temporary:
        folder = Path(temporary) / "checkpoint"
        _take(source, folder, report, move=merged in source.parents)
        arrived = _describe(folder, version, base, found, licences, report)
        target = merged / engine_name(version.tenant, version.adapter, version.version, arrived.digest)
        target.parent.mkdir(exist_ok=True)
        if not target.is_dir():
            folder.rename(target)
    return arrived


def check_merged(
    source: Path, version: AdapterVersion, base: BaseModelInfo, *, policy: LicencePolicy, forced: str | None
) -> tuple[dict[str, Any], Verdict | None]:
    """The merge's report and what the licences say, read from the small files alone. Raises MergeError, ParityError."""
    reference = f"{version.adapter}@{version.version}"
    found = read_report(source)
    if not found:
        raise MergeError(f"{source} holds no report of a merge. Make one with: lorikeet merge {reference} --out DIR")
    if found.get("adapter_digest") != version.digest:
        made_of = str(found.get("adapter_digest") or "unknown")[:12]
        raise MergeError(
            f"{source} was merged from adapter content {made_of}, but {reference} is {version.digest[:12]}."
        )
    if found.get("base_weights_digest") != base.fingerprint.weights_digest:
        raise MergeError(f"{source} was merged into another base than {base.name}, which is served here.")
    own = version.serving.chat_template  # goes along with every request, so the checkpoint may bring it or the base's
    known = {base.fingerprint.template_digest, *([template_digest(own)] if own is not None else [])}
    if template_digest(read_template(source)) not in known:
        raise MergeError(f"{source} has another chat template than {reference} and {base.name}.")
    _check_parity(source, found)
    return found, _check_licences(version, base, policy, forced)


def quantized_difference(report: Mapping[str, Any]) -> float:
    """How far the quantized weights were from base + adapter, in nats on average over the goldens; 0 where they are not."""
    figures = [
        rung.goldens or rung.sample for rung in rungs_of(dict(report), Path()) if rung.name.split()[0] == "quantized"
    ]
    return max((one.mean_abs for one in figures if one is not None), default=0.0)


def remove_merged(merged: Path, folder: str) -> None:
    """Take a checkpoint's folder away; at once out of sight, so that a kill leaves no half of it under its name."""
    path = merged / folder
    if path.is_dir():
        with tempfile.TemporaryDirectory(prefix=INCOMING, dir=merged) as temporary:
            path.rename(Path(temporary) / "leaving")


def remove_merged_of(merged: Path, version: AdapterVersion) -> None:
    """Every form of a version that was deleted."""
    for path in (merged / version.tenant).glob(f"{version.adapter}@{version.version}-*"):
        remove_merged(merged, f"{version.tenant}/{path.name}")


def sweep(merged: Path) -> None:
    """Take away what killed commands left half way."""
    for path in merged.glob(f"{INCOMING}*"):
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)


def _check_parity(source: Path, found: dict[str, Any]) -> None:
    rungs = rungs_of(found, source)
    kinds = {rung.name.split()[0] for rung in rungs}
    quantized = _quantization(source) is not None
    wanted = ("quantized",) if quantized else MEASURED
    by_weights = bool(found.get("weights")) and not quantized  # held against their exact values, tensor by tensor
    if not by_weights and not kinds.intersection(wanted):
        raise MergeError(
            f"The report of {source} does not say how equal its weights are to base + adapter ({' or '.join(wanted)}): "
            "merge again with the parity check."
        )
    for rung in rungs:
        if rung.name.split()[0] in MEASURED:
            judge_rung(rung)


def _check_licences(
    version: AdapterVersion, base: BaseModelInfo, policy: LicencePolicy, forced: str | None
) -> Verdict | None:
    """By the version's own manifest, not by what the folder says of itself."""
    manifest = version.manifest
    if manifest is None:
        return None
    verdict = manifest.judge_licences(policy, base_licence=base.licence)
    if verdict.level == "block" and forced is None:
        raise MergeError(
            f"The licences of {version.adapter}@{version.version} forbid it: {'; '.join(verdict.lines())}. "
            "To use it all the same, say why: --force --reason TEXT"
        )
    return verdict


def _take(source: Path, folder: Path, report: Report, *, move: bool) -> None:
    if move:
        source.rename(folder)
        return
    folder.mkdir()
    files = [path for path in sorted(source.iterdir()) if path.is_file() and _is_kept(path)]
    for done, path in enumerate(files):
        report(f"copying {path.name}", done, len(files))
        shutil.copyfile(path, folder / path.name)  # a link would change with a file that is written in place


def _is_kept(path: Path) -> bool:
    return path.suffix in KEPT or path.name.upper().startswith(NOTICES)


def _describe(
    folder: Path,
    version: AdapterVersion,
    base: BaseModelInfo,
    found: Mapping[str, Any],
    licences: Verdict | None,
    report: Report,
) -> Arrived:
    """Reads every byte of what arrived, and compares it with what the merge had written down."""
    said = read_base(folder).fingerprint.weights_digest if (folder / INFO_FILE).is_file() else None
    name = f"{version.adapter}-{version.version}-merged"
    info = describe_base(folder, BaseSpec(name=name, model=name, licence=base.licence, folder=folder), report)
    digest = info.fingerprint.weights_digest
    if said is not None and said != digest:
        raise MergeError(
            f"The weights of {version.adapter}@{version.version} are not those that were merged: copy again."
        )
    write_base(folder, info)
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    scheme = str(found.get("scheme") or _quantization(folder) or found.get("dtype") or "unknown")
    return Arrived(digest, scheme, size_bytes, found, licences)


def _quantization(folder: Path) -> str | None:
    """What config.json says of it; None for weights as they are."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise MergeError(f"{folder} is no checkpoint: its config.json cannot be read.") from exc
    quantization = config.get("quantization_config")
    return str(quantization.get("format") or quantization.get("quant_method")) if quantization else None
