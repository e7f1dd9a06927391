"""What the registry hands out: frozen views of its rows, safe to keep in memory and to pass between threads."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

from adapters.errors import Fault
from adapters.manifest import Manifest, ServingDefaults
from adapters.names import engine_name

NO_SERVING_DEFAULTS = ServingDefaults()
DEDICATED = "merged-"  # begins the id of an engine that serves one merged version, and no other engine's


class Scope(StrEnum):
    """What a key may do. `admin` is for operators: tenants, keys, every tenant's adapters."""

    INFERENCE = "inference"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    JOBS = "jobs"
    CHAT_TEMPLATE = "chat-template"  # bring templates, which are programs that the engine runs
    ADMIN = "admin"


class VersionStatus(StrEnum):
    """Where a version is between its upload and its end. Only `ready` ones may answer requests."""

    QUARANTINED = "quarantined"  # its content is still being checked: a number, and nothing else is known
    VALIDATED = "validated"  # every offline check passed
    PROBING = "probing"  # an engine is trying it
    READY = "ready"
    REFUSED = "refused"  # the probe found faults
    RETIRED = "retired"  # deleted; the row stays, so that the number of what was once validated is never given again


@dataclass(frozen=True)
class Tenant:
    name: str
    created_at: float  # Unix seconds, like every time in this module
    cache_salt: str = field(repr=False)  # secret; keeps tenants' prefix caches apart
    weight: float  # share of a busy engine, relative to other tenants
    archived_at: float | None = None  # its keys stopped then, and its name is never given again


@dataclass(frozen=True)
class ApiKey:
    """A key without the key: only its hash is stored."""

    id: str
    tenant: str | None  # None: an operator's key
    name: str
    scopes: frozenset[Scope]
    hint: str  # the last four characters
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    account: str | None = None  # the service account it belongs to: the same for the keys it is rotated into

    def valid_at(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class LimitKind(StrEnum):
    """What a limit is set on."""

    TENANT = "tenant"
    KEY = "key"
    ADAPTER = "adapter"


class LimitSubject(NamedTuple):
    """One tenant, one of its keys, or one of its adapters (whoever calls it)."""

    kind: LimitKind
    tenant: str
    name: str = ""  # key id or adapter name; empty for the tenant itself

    def __str__(self) -> str:
        return {
            LimitKind.TENANT: f"tenant {self.tenant}",
            LimitKind.KEY: f"API key {self.name}",
            LimitKind.ADAPTER: f"adapter {self.tenant}/{self.name}",
        }[self.kind]


@dataclass(frozen=True)
class Limits:
    """What one subject may use. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and output together
    max_in_flight: int | None = None  # requests open at once
    max_adapters: int | None = None  # tenants only
    max_stored_bytes: int | None = None  # tenants only
    max_running_jobs: int | None = None  # tenants only
    max_queued_jobs: int | None = None  # tenants only
    monthly_budget: float | None = None  # tenants and keys; in the currency of the gateway's prices, per calendar month

    def or_else(self, defaults: "Limits") -> "Limits":
        """These, with `defaults` where they say nothing."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        return replace(defaults, **own)


NO_LIMITS = Limits()
LIMITS_OF = {  # which of them a subject can have
    LimitKind.TENANT: frozenset(one.name for one in fields(Limits)),
    LimitKind.KEY: frozenset({"requests_per_minute", "tokens_per_minute", "max_in_flight", "monthly_budget"}),
    LimitKind.ADAPTER: frozenset({"requests_per_minute", "tokens_per_minute", "max_in_flight"}),
}


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable upload. Once it is validated, only status, faults and probe ever change."""

    tenant: str
    adapter: str
    version: int
    digest: str  # hex sha256 of the content; a placeholder while quarantined
    status: VersionStatus
    created_at: float
    rank: int
    alpha: float
    size_bytes: int
    files: Mapping[str, str]  # file name -> hex sha256 of its bytes in the blob store
    base: str = ""  # weights digest of the base it was validated for; it answers beside no other. Empty: not recorded
    serving: ServingDefaults = NO_SERVING_DEFAULTS
    warnings: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    probe: Mapping[str, Any] | None = None
    manifest_source: Manifest | Callable[[], Manifest | None] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def manifest(self) -> Manifest | None:
        """Read on first use: goldens make manifests large, and the registry's snapshot holds every version.

        The first use reads the database; on the event loop use `serving`, which is always here.
        """
        return self.manifest_source() if callable(self.manifest_source) else self.manifest_source

    def fits(self, base: str) -> bool:
        """Whether it may answer beside the base with this weights digest."""
        return self.base in ("", base)

    @property
    def engine_name(self) -> str:
        return engine_name(self.tenant, self.adapter, self.version, self.digest)


@dataclass(frozen=True)
class ModelName:
    """A name beside `adapter@version` that means one version for good."""

    name: str
    tenant: str
    adapter: str
    version: int
    step: int | None  # of a checkpoint: called by name alone, not listed among the models


@dataclass(frozen=True)
class AdapterRecord:
    """A name a tenant owns, and which of its versions answers to it."""

    tenant: str
    name: str
    created_at: float
    production: int | None  # always a ready version
    previous: int | None  # where a rollback goes
    shared_with: frozenset[str]  # tenants that may use it besides its owner


@dataclass(frozen=True)
class MergedForm:
    """A version folded into its base: a checkpoint that an engine of its own can serve."""

    tenant: str
    adapter: str
    version: int
    digest: str  # hex sha256 of the checkpoint's weights
    scheme: str  # the dtype its weights are saved in, or how they are quantized
    size_bytes: int
    report: Mapping[str, Any] = field(repr=False)  # of the merge: lineage, and how equal it is to base + adapter
    licences: Mapping[str, Any] | None = field(repr=False)  # the verdict; None: the version brought no manifest
    forced: str | None  # why it was taken in although its licences say no
    created_at: float
    actor: str

    @property
    def folder(self) -> str:
        """Its folder below the data folder's `merged`: used once and never for another."""
        return engine_name(self.tenant, self.adapter, self.version, self.digest)


@dataclass(frozen=True)
class Deployment:
    """What is wanted: an engine of its own for one merged form of a version."""

    tenant: str
    adapter: str
    version: int
    digest: str  # of the form
    scheme: str
    share: float  # of the version's requests, 0 to 1; the rest is answered by base + adapter
    profile: Mapping[str, Any] | None  # of its engine; None: what the gateway derives from its own
    created_at: float
    actor: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.tenant, self.adapter, self.version

    @property
    def folder(self) -> str:
        return engine_name(self.tenant, self.adapter, self.version, self.digest)

    @property
    def engine_id(self) -> str:
        """Short, for it is part of a socket's path, and the same whenever the version is deployed."""
        key = f"{self.tenant}/{self.adapter}@{self.version}"
        return f"{DEDICATED}{hashlib.sha256(key.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class AuditEntry:
    """One administrative act, written in the transaction of the act itself."""

    id: int
    time: float
    actor: str
    action: str  # such as version.promote
    tenant: str | None
    subject: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class AuditFilter:
    """Which entries are asked for. Empty and None ask for all."""

    tenants: Sequence[str] = ()
    actors: Sequence[str] = ()
    actions: Sequence[str] = ()
    subjects: Sequence[str] = ()
    since: float | None = None
    until: float | None = None  # not itself
    older_than: int | None = None  # an entry's id
    newer_than: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """The whole registry at one moment, for readers that may not wait for a database. Deleted things are absent."""

    counter: int
    tenants: Mapping[str, Tenant]  # archived ones are absent, with their keys
    keys: Mapping[str, ApiKey]  # by hash of the plaintext; revoked ones are absent, expired ones are not
    adapters: Mapping[tuple[str, str], AdapterRecord]
    versions: Mapping[tuple[str, str, int], AdapterVersion]
    limits: Mapping[LimitSubject, Limits] = field(default_factory=dict)
    names: Mapping[str, "ModelName"] = field(default_factory=dict)  # of fine-tuning jobs' results
    deployments: Mapping[tuple[str, str, int], Deployment] = field(default_factory=dict)
