"""The registry's tables. Rows never leave `adapters`; the frozen views of `adapters.records` do.

Times are Unix seconds. Adapters and versions are never deleted, only marked: a version's number is never used twice, and
whoever reads what changed since the last time sees that something went.
"""

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, ForeignKeyConstraint, Index, Integer, MetaData, Text, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_SERIAL = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up by itself only in an INTEGER key


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: JSON(none_as_null=True), list[Any]: JSON(none_as_null=True)}  # noqa: RUF012


class ChangeRow(Base):
    """One row. Every write of the registry starts by raising it, which also makes writers take turns."""

    __tablename__ = "change_counter"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(BigInteger)


_COUNTER = select(ChangeRow.value).scalar_subquery()  # stamps a row with the counter of its last write, by itself


class TenantRow(Base):
    __tablename__ = "tenants"
    name: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    cache_salt: Mapped[str]
    weight: Mapped[float]
    archived_at: Mapped[float | None]


class KeyRow(Base):
    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str | None] = mapped_column(ForeignKey("tenants.name"), index=True)
    name: Mapped[str]
    scopes: Mapped[list[Any]]
    hash: Mapped[str] = mapped_column(unique=True)
    hint: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    account: Mapped[str | None]  # None for operators' keys


class LimitRow(Base):
    """A row without any number is deleted: absent means unlimited, or the gateway's default for tenants."""

    __tablename__ = "limits"
    kind: Mapped[str] = mapped_column(primary_key=True)  # LimitKind
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)  # key id, adapter name, or empty for the tenant itself
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    max_in_flight: Mapped[int | None] = mapped_column(BigInteger)
    max_adapters: Mapped[int | None] = mapped_column(BigInteger)
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_running_jobs: Mapped[int | None] = mapped_column(BigInteger)
    max_queued_jobs: Mapped[int | None] = mapped_column(BigInteger)
    monthly_budget: Mapped[float | None]


class AdapterRow(Base):
    __tablename__ = "adapters"
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]
    production: Mapped[int | None]
    former: Mapped[list[Any]]  # earlier production versions, the latest last
    shared_with: Mapped[list[Any]]  # names of tenants
    changed: Mapped[int] = mapped_column(BigInteger, index=True, default=_COUNTER, onupdate=_COUNTER)


class VersionRow(Base):
    __tablename__ = "adapter_versions"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str]
    status: Mapped[str]
    created_at: Mapped[float]
    rank: Mapped[int]
    alpha: Mapped[float]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    base: Mapped[str] = mapped_column(default="")
    files: Mapped[dict[str, Any]]
    warnings: Mapped[list[Any]]
    faults: Mapped[list[Any]]
    probe: Mapped[dict[str, Any] | None]
    serving: Mapped[dict[str, Any] | None]  # the manifest's serving defaults where it sets any
    changed: Mapped[int] = mapped_column(BigInteger, index=True, default=_COUNTER, onupdate=_COUNTER)
    # Last and deferred: SQLite then skips the pages it overflows to when a snapshot reads the other columns.
    manifest: Mapped[str | None] = mapped_column(Text, deferred=True)
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "adapter"], ["adapters.tenant", "adapters.name"]),
        Index(
            "uq_adapter_versions_live_digest",
            "tenant",
            "adapter",
            "digest",
            "base",
            unique=True,
            sqlite_where=text("status != 'retired'"),
            postgresql_where=text("status != 'retired'"),
        ),
    )


class EvaluationRow(Base):
    """`adapters.evaluations.Evaluation`, whole. Only ever inserted."""

    __tablename__ = "adapter_evaluations"
    id: Mapped[int] = mapped_column(_SERIAL, primary_key=True, autoincrement=True)
    tenant: Mapped[str]
    adapter: Mapped[str]
    version: Mapped[int]
    created_at: Mapped[float]
    actor: Mapped[str]
    document: Mapped[dict[str, Any]]
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant", "adapter", "version"],
            ["adapter_versions.tenant", "adapter_versions.adapter", "adapter_versions.version"],
        ),
        Index("ix_adapter_evaluations_version", "tenant", "adapter", "version"),
    )


class AuditRow(Base):
    """Only ever inserted. No foreign key: the record outlives what it speaks of."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(_SERIAL, primary_key=True, autoincrement=True)
    time: Mapped[float]
    actor: Mapped[str]
    action: Mapped[str]
    tenant: Mapped[str | None] = mapped_column(index=True)
    subject: Mapped[str]
    details: Mapped[dict[str, Any]]


class ModelNameRow(Base):
    """A name that means one version for good, beside `adapter@version`: what a fine-tuning job's result is called."""

    __tablename__ = "model_names"
    name: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    adapter: Mapped[str]
    version: Mapped[int]
    step: Mapped[int | None]  # of a checkpoint, which is called by name alone and never goes into production by itself
    created_at: Mapped[float]
    changed: Mapped[int] = mapped_column(BigInteger, index=True, default=_COUNTER, onupdate=_COUNTER)
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant", "adapter", "version"],
            ["adapter_versions.tenant", "adapter_versions.adapter", "adapter_versions.version"],
        ),
        Index("ix_model_names_version", "tenant", "adapter", "version"),
    )


class FileRow(Base):
    """What a tenant has uploaded to train on. Deleted with its bytes; the audit log remembers it."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    rows: Mapped[int | None]
    form: Mapped[str | None]
    stored: Mapped[bool]  # False until its bytes are all there


class JobRow(Base):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    kind: Mapped[str]
    base: Mapped[str] = mapped_column(default="")
    spec: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    worker: Mapped[str | None]
    lease_until: Mapped[float | None]
    attempts: Mapped[int]
    progress: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None]
    failure: Mapped[dict[str, Any] | None]
    cancel_requested: Mapped[bool]
    pause_requested: Mapped[bool]


class JobEventRow(Base):
    """Only ever inserted. key: tells a repetition, of a worker that does over what another had done, from news."""

    __tablename__ = "job_events"
    id: Mapped[int] = mapped_column(_SERIAL, primary_key=True, autoincrement=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    key: Mapped[str]
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    __table_args__ = (Index("uq_job_events_key", "job", "key", unique=True), Index("ix_job_events_id", "job", "id"))


class JobCheckpointRow(Base):
    __tablename__ = "job_checkpoints"
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    model: Mapped[str]
    metrics: Mapped[dict[str, Any]]


class UsageRow(Base):
    """One generation request: `adapters.ledger.Entry`, field by field. Deleted when it is older than the gateway keeps."""

    __tablename__ = "usage"
    request_id: Mapped[str] = mapped_column(primary_key=True)
    received_ms: Mapped[int] = mapped_column(BigInteger, index=True)
    route: Mapped[str]
    tenant: Mapped[str]
    key_id: Mapped[str]
    model: Mapped[str]
    version: Mapped[int | None]
    requested: Mapped[str]
    replica: Mapped[str | None]
    stream: Mapped[bool]
    outcome: Mapped[str]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    estimated: Mapped[bool]
    input_cost: Mapped[float]
    cached_cost: Mapped[float]
    output_cost: Mapped[float]
    queued_s: Mapped[float | None]
    admitted_s: Mapped[float | None]
    loaded_s: Mapped[float | None]
    sent_s: Mapped[float | None]
    first_s: Mapped[float | None]
    last_s: Mapped[float | None]
    ended_s: Mapped[float | None]


class UsageHourRow(Base):
    """Totals of the requests of one hour that reached an engine. Kept for good."""

    __tablename__ = "usage_hours"
    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012  rows lie in their key's order: sums read a range
    hour: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)  # Unix seconds it began at
    tenant: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    input_cost: Mapped[float]
    cached_cost: Mapped[float]
    output_cost: Mapped[float]


class MergedFormRow(Base):
    """A version folded into its base, as a checkpoint of its own. Deleted with its files; the audit log remembers it."""

    __tablename__ = "merged_forms"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(primary_key=True)  # of the checkpoint's weights
    scheme: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    report: Mapped[dict[str, Any]]
    licences: Mapped[dict[str, Any] | None]
    forced: Mapped[str | None]
    created_at: Mapped[float]
    actor: Mapped[str]
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant", "adapter", "version"],
            ["adapter_versions.tenant", "adapter_versions.adapter", "adapter_versions.version"],
        ),
    )


class DeploymentRow(Base):
    """What is wanted: an engine of its own for one merged form of a version. Deleted when it is wanted no longer."""

    __tablename__ = "deployments"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    adapter: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str]
    share: Mapped[float]
    profile: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]
    actor: Mapped[str]
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant", "adapter", "version", "digest"],
            ["merged_forms.tenant", "merged_forms.adapter", "merged_forms.version", "merged_forms.digest"],
        ),
    )
