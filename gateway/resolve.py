"""What `model` means for a caller: one version of an adapter, or the base model. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from adapters.errors import AdapterNotFoundError
from adapters.names import Reference, parse_reference, parse_tuned_name
from adapters.registry import AdapterRecord, AdapterVersion, Snapshot, VersionStatus

MERGED, ADAPTER = "merged", "adapter"  # forms of a version: on an engine of its own, or hot-swapped beside others


@dataclass(frozen=True)
class Target:
    """Resolved once per request and kept to its last byte."""

    requested: str  # as the caller wrote it; answers carry it back
    label: str  # what the x-lorikeet-adapter header says: `support@2`, `support@2#merged`, or the base model's name
    version: AdapterVersion | None  # None: the base model itself
    form: str | None = None  # MERGED or ADAPTER where the caller insists on one

    @property
    def engine_name(self) -> str | None:
        return self.version.engine_name if self.version else None


def resolve(model: str, *, tenant: str, snapshot: Snapshot, base: str, base_names: Iterable[str]) -> Target:
    """`support` (production), `support@3` (pinned), `acme/support` (own, or shared by acme), the base's own name, or the name
    of a fine-tuning job's result; each adapter's also with `#merged` or `#adapter`, for the one of its two forms.

    base: weights digest of the base that is served; versions made for another one do not exist here.
    Raises AdapterNotFoundError for anything else: a foreign adapter cannot be told from one that does not exist.
    """
    if model in base_names:
        return Target(model, model, None)
    name, mark, form = model.partition("#")
    reference = parse_reference(name) or tuned_reference(name, snapshot)
    if reference is None or (mark and form not in (MERGED, ADAPTER)):
        raise AdapterNotFoundError(model)
    owner = reference.tenant or tenant
    record = snapshot.adapters.get((owner, reference.name))
    if record is None or not visible(record, tenant):
        raise AdapterNotFoundError(model)
    number = reference.version or record.production
    version = snapshot.versions.get((owner, reference.name, number)) if number is not None else None
    if version is None or not servable(version, base):
        raise AdapterNotFoundError(model)
    shown = reference.name if owner == tenant else f"{owner}/{reference.name}"
    return Target(model, f"{shown}@{version.version}{mark}{form}", version, form or None)


def tuned_reference(model: str, snapshot: Snapshot) -> Reference | None:
    """What `ft:…` means, whoever asks; None where no version is called so."""
    named = snapshot.names.get(model) if parse_tuned_name(model) is not None else None
    return Reference(named.adapter, named.tenant, named.version) if named is not None else None


def visible(record: AdapterRecord, tenant: str) -> bool:
    return record.tenant == tenant or tenant in record.shared_with


def servable(version: AdapterVersion, base: str) -> bool:
    return version.status is VersionStatus.READY and version.fits(base)


def production_versions(snapshot: Snapshot, base: str) -> list[AdapterVersion]:
    """Versions that some alias points at, newest first: what engines should hold."""
    versions = [
        snapshot.versions.get((record.tenant, record.name, record.production))
        for record in snapshot.adapters.values()
        if record.production is not None
    ]
    ready = [version for version in versions if version is not None and servable(version, base)]
    return sorted(ready, key=lambda version: version.created_at, reverse=True)
