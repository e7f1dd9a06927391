"""The registry: tenants, keys, adapters, versions and their aliases, each change audited in its own transaction.

Synchronous and safe to use from several threads and processes; on an event loop call it through `asyncio.to_thread`.
Every write starts by raising the change counter, which makes writers take turns: two never take the same version number,
and a reader that sees counter n sees every change up to n.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters import audit
from adapters.alias import Alias
from adapters.api_keys import load_secret
from adapters.database import open_database, reading
from adapters.errors import ConflictError, Fault, VersionNotFoundError
from adapters.evaluations import AttachedEvaluation, Evaluation
from adapters.forms import Forms, forget_forms, require_not_deployed
from adapters.manifest import Manifest, parse_manifest
from adapters.models import AdapterRow, EvaluationRow, ModelNameRow, VersionRow
from adapters.names import TunedName, check_name
from adapters.promotion import Decision, Evidence, PromotionPolicy, decide_promotion
from adapters.records import (
    NO_LIMITS,
    AdapterRecord,
    AdapterVersion,
    ApiKey,
    AuditEntry,
    AuditFilter,
    Deployment,
    LimitKind,
    Limits,
    LimitSubject,
    MergedForm,
    ModelName,
    Scope,
    Snapshot,
    Tenant,
    VersionStatus,
)
from adapters.rows import (
    adapter_record,
    alias_of,
    all_versions,
    find_reserved,
    forget_limits,
    live_versions,
    placeholder_digest,
    require_adapter,
    require_adapter_room,
    require_byte_room,
    require_tenant,
    require_version,
    store_alias,
    tenant_limits,
    version_record,
)
from adapters.snapshots import read_counter, read_snapshot

__all__ = [
    "AdapterRecord",
    "AdapterVersion",
    "ApiKey",
    "AuditEntry",
    "AuditFilter",
    "Deployment",
    "LimitKind",
    "LimitSubject",
    "Limits",
    "MergedForm",
    "ModelName",
    "Registry",
    "Scope",
    "Snapshot",
    "Tenant",
    "VersionStatus",
    "load_secret",
    "open_database",
]

_V = VersionStatus
NEXT_STATUS: Mapping[VersionStatus, frozenset[VersionStatus]] = {
    _V.QUARANTINED: frozenset(),  # until `add_version` gives it content
    _V.VALIDATED: frozenset({_V.PROBING, _V.READY, _V.REFUSED}),
    _V.PROBING: frozenset({_V.VALIDATED, _V.READY, _V.REFUSED}),  # back to validated when the prober was interrupted
    _V.READY: frozenset(),  # until it is deleted
    _V.REFUSED: frozenset({_V.PROBING}),  # probed again
    _V.RETIRED: frozenset(),
}


class Registry(Forms):
    """Everything Lorikeet knows about who may use which adapter version."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        secret: bytes,
        default_limits: Limits = NO_LIMITS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """secret: keys the hash of API keys; see `load_secret`. default_limits: of tenants. clock: Unix seconds."""
        super().__init__(engine, secret=secret, default_limits=default_limits, clock=clock)
        self._snapshot_lock = threading.Lock()
        self._last_snapshot: Snapshot | None = None

    # Versions

    def reserve_version(self, tenant: str, name: str) -> AdapterVersion:
        """A quarantined version: a number and no content, to be seen while the content is checked.

        `add_version` makes it a validated one; `release_version` takes it back. Neither coming nor going is audited:
        `version.add` is the act.
        """
        check_name(name)
        with self._writing() as session:
            require_tenant(session, tenant)
            return self._version(self._reserve(session, tenant, name))

    def release_version(self, reserved: AdapterVersion) -> None:
        """Take a quarantined version back, and its name if nothing else has it; the next one may have its number.

        Does nothing when it is quarantined no longer.
        """
        with self._writing() as session:
            row = find_reserved(session, reserved)
            if row is not None:
                self._release(session, row)

    def add_version(
        self,
        tenant: str,
        name: str,
        *,
        digest: str,
        size_bytes: int,
        base: str = "",
        rank: int,
        alpha: float,
        files: Mapping[str, str],
        manifest: Manifest | None = None,
        warnings: Sequence[str] = (),
        reserved: AdapterVersion | None = None,
        model_name: TunedName | None = None,
        actor: str = "operator",
    ) -> tuple[AdapterVersion, bool]:
        """The new version, validated, and True; or the one with the same content under this name, and False.

        reserved: the quarantined version that becomes the new one, or goes where there is one with this content. Raises
        ConflictError when it went meanwhile. model_name: another name of the version; one that is taken stays where it is,
        and what it means is returned, whatever the content.
        """
        check_name(name)
        with self._writing() as session:
            require_tenant(session, tenant)
            same = self._named(session, model_name) or session.scalar(
                live_versions(tenant, name).where(VersionRow.digest == digest, VersionRow.base == base)
            )
            row = find_reserved(session, reserved) if reserved is not None else None
            if same is not None:
                if row is not None:
                    self._release(session, row)
                self._name(session, same, model_name)
                return self._version(same), False
            if row is None:
                if reserved is not None:
                    raise ConflictError(
                        f"'{name}@{reserved.version}' was deleted while it was being checked, or that took too long. "
                        "Upload it again."
                    )
                row = self._reserve(session, tenant, name)
            require_byte_room(session, tenant, size_bytes, self._tenant_limits(session, tenant).max_stored_bytes)
            serving = manifest.serving.model_dump(exclude_defaults=True) if manifest else {}
            row.status = VersionStatus.VALIDATED.value
            row.digest, row.size_bytes, row.base = digest, size_bytes, base
            row.rank, row.alpha = rank, float(alpha)
            row.files, row.warnings = dict(files), list(warnings)
            row.serving = serving or None
            row.manifest = manifest.model_dump_json() if manifest else None
            self._name(session, row, model_name)
            self._audit(session, actor, "version.add", tenant, f"{name}@{row.version}", digest=digest)
            return self._version(row), True

    def set_status(
        self,
        tenant: str,
        name: str,
        version: int,
        status: VersionStatus,
        *,
        faults: Sequence[Fault] = (),
        probe: Mapping[str, Any] | None = None,
        actor: str = "gateway",
    ) -> AdapterVersion:
        """Move a version along its way; setting the status it has only records the probe.

        The first ready version of a name goes into production here, unless it is a checkpoint. Raises ConflictError for a step
        not in NEXT_STATUS.
        """
        with self._writing() as session:
            adapter, row = require_version(session, tenant, name, version)
            if status != row.status and status not in NEXT_STATUS[VersionStatus(row.status)]:
                raise ConflictError(f"'{name}@{version}' is {row.status} and cannot become {status}.")
            row.status = status.value
            row.faults = [fault.as_dict() for fault in faults]
            if probe is not None:
                row.probe = dict(probe)
            self._audit(session, actor, f"version.{status}", tenant, f"{name}@{version}", faults=len(faults))
            if status is VersionStatus.READY and adapter.production is None and not self._checkpoint(session, row):
                self._move(session, adapter, alias_of(adapter).promoted(version), actor, "version.promote")
            return self._version(row)

    def delete_version(self, tenant: str, name: str, version: int, *, actor: str = "operator") -> AdapterVersion:
        """Retire a version, and return it as it was last. The last one takes the adapter with it.

        Raises ConflictError for the production version while another one could take its place, and for one that has an engine
        of its own.
        """
        with self._writing() as session:
            adapter, row = require_version(session, tenant, name, version)
            require_not_deployed(session, tenant, name, version)
            others = [other for other in session.scalars(live_versions(tenant, name)) if other is not row]
            ready = [
                other.version
                for other in others
                if other.status == VersionStatus.READY and not self._checkpoint(session, other)
            ]
            if adapter.production == version and ready:
                raise ConflictError(
                    f"'{name}@{version}' is in production. Promote another version first, such as {name}@{max(ready)}, "
                    "or delete the whole adapter."
                )
            row.status = VersionStatus.RETIRED.value
            forget_forms(session, tenant, name, version)
            store_alias(adapter, alias_of(adapter).without(version))
            self._audit(session, actor, "version.delete", tenant, f"{name}@{version}")
            if not others:
                self._retire(session, adapter, actor)
            return self._version(row)

    def version(self, tenant: str, name: str, version: int, *, include_retired: bool = False) -> AdapterVersion:
        """Raises AdapterNotFoundError, VersionNotFoundError."""
        with reading(self._engine) as session:
            if include_retired:
                row = session.scalar(all_versions(tenant, name).where(VersionRow.version == version))
                if row is None:
                    raise VersionNotFoundError(name, version)
                return self._version(row)
            return self._version(require_version(session, tenant, name, version)[1])

    def versions(self, tenant: str, name: str, *, include_retired: bool = False) -> list[AdapterVersion]:
        """Every version of one adapter, the oldest first. Raises AdapterNotFoundError."""
        query = all_versions(tenant, name) if include_retired else live_versions(tenant, name)
        with reading(self._engine) as session:
            if not include_retired:
                require_adapter(session, tenant, name)
            return [self._version(row) for row in session.scalars(query.order_by(VersionRow.version))]

    # Evaluations

    def add_evaluation(
        self, tenant: str, name: str, version: int, evaluation: Evaluation, *, actor: str = "operator"
    ) -> AttachedEvaluation:
        """Attach what was measured of a version; nothing of it is ever changed or removed.

        Raises AdapterNotFoundError, VersionNotFoundError, and ConflictError where the content was another's.
        """
        with self._writing() as session:
            _, row = require_version(session, tenant, name, version)
            if evaluation.digest is not None and evaluation.digest != row.digest:
                raise ConflictError(
                    f"The evaluation is of content {evaluation.digest[:12]}, but '{name}@{version}' is {row.digest[:12]}."
                )
            added = EvaluationRow(
                tenant=tenant,
                adapter=name,
                version=version,
                created_at=self._clock(),
                actor=actor,
                document=evaluation.model_dump(mode="json", exclude_none=True),
            )
            session.add(added)
            session.flush()
            self._audit(
                session,
                actor,
                "version.evaluate",
                tenant,
                f"{name}@{version}",
                evaluation=added.id,
                scores=len(evaluation.scores),
                sheet=evaluation.sheet is not None,
            )
            return _attached_evaluation(added)

    def evaluations(self, tenant: str, name: str, version: int | None = None) -> list[AttachedEvaluation]:
        """Of one version or of all, the oldest first. Raises AdapterNotFoundError, VersionNotFoundError."""
        with reading(self._engine) as session:
            if version is None:
                require_adapter(session, tenant, name)
            else:
                require_version(session, tenant, name, version)
            return _attached(session, tenant, name, version)

    # Adapters and their aliases

    def promote(
        self,
        tenant: str,
        name: str,
        version: int,
        *,
        policy: PromotionPolicy | None = None,
        forced: str | None = None,
        actor: str = "operator",
    ) -> AdapterRecord:
        """Let a ready version answer to the name, if the policy allows it; either decision is recorded.

        forced: why it is to be promoted whatever the policy says; recorded with what spoke against it.
        Raises ConflictError when the version is not ready, GateRefusedError with the policy's reasons.
        """
        with self._writing() as session:
            adapter, row = require_version(session, tenant, name, version)
            if row.status != VersionStatus.READY:
                raise ConflictError(f"'{name}@{version}' is {row.status}; only a ready version can be promoted.")
            decision = self._decide(session, adapter, row, policy)
            if decision.allowed or forced is not None:
                alias = alias_of(adapter).promoted(version)
                because: dict[str, Any] = {}
                if not decision.allowed:
                    because = {"forced": forced, "against": list(decision.reasons)}
                self._move(session, adapter, alias, actor, "version.promote", passed=decision.passed, **because)
            else:
                reasons = list(decision.reasons)
                self._audit(session, actor, "version.promote.refused", tenant, f"{name}@{version}", reasons=reasons)
            record = adapter_record(adapter)
        if forced is None:
            decision.require()
        return record

    def decide(self, tenant: str, name: str, version: int, policy: PromotionPolicy) -> Decision:
        """What the gate would say now. Nothing is recorded. Raises AdapterNotFoundError, VersionNotFoundError."""
        with reading(self._engine) as session:
            return self._decide(session, *require_version(session, tenant, name, version), policy)

    def _decide(
        self, session: Session, adapter: AdapterRow, row: VersionRow, policy: PromotionPolicy | None
    ) -> Decision:
        if policy is None:
            return Decision(True, ())
        before = session.get(VersionRow, (row.tenant, row.adapter, adapter.production))
        predecessor = self._evidence(session, before, policy).scores if before and before is not row else ()
        return decide_promotion(self._evidence(session, row, policy), policy, predecessor=predecessor)

    def _evidence(self, session: Session, row: VersionRow, policy: PromotionPolicy) -> Evidence:
        manifest = parse_manifest(row.manifest) if row.manifest else None
        own = Evidence()
        if manifest is not None:
            own = Evidence(tuple(manifest.scores), manifest.judge_licences(policy.licence))
        return own.joined(one.evaluation for one in _attached(session, row.tenant, row.adapter, row.version))

    def rollback(self, tenant: str, name: str, *, actor: str = "operator") -> AdapterRecord:
        """Back to the production version before. Raises ConflictError when there is none."""
        with self._writing() as session:
            adapter = require_adapter(session, tenant, name)
            self._move(session, adapter, alias_of(adapter).rolled_back(), actor, "version.rollback")
            return adapter_record(adapter)

    def share(self, tenant: str, name: str, with_tenant: str, *, actor: str = "operator") -> AdapterRecord:
        """Let another tenant use the adapter as `tenant/name`. Sharing twice is sharing once."""
        with self._writing() as session:
            adapter = require_adapter(session, tenant, name)
            require_tenant(session, with_tenant)
            if with_tenant == tenant:
                raise ConflictError(f"'{name}' belongs to '{tenant}' already.")
            if with_tenant not in adapter.shared_with:
                adapter.shared_with = sorted({*adapter.shared_with, with_tenant})
                self._audit(session, actor, "adapter.share", tenant, name, shared_with=with_tenant)
            return adapter_record(adapter)

    def unshare(self, tenant: str, name: str, with_tenant: str, *, actor: str = "operator") -> AdapterRecord:
        with self._writing() as session:
            adapter = require_adapter(session, tenant, name)
            if with_tenant in adapter.shared_with:
                adapter.shared_with = [other for other in adapter.shared_with if other != with_tenant]
                self._audit(session, actor, "adapter.unshare", tenant, name, shared_with=with_tenant)
            return adapter_record(adapter)

    def delete_adapter(self, tenant: str, name: str, *, actor: str = "operator") -> list[AdapterVersion]:
        """Retire every version and free the name; numbers go on where they stopped if it is used again.

        Returns what was retired. Raises AdapterNotFoundError, ConflictError while a version has an engine of its own.
        """
        with self._writing() as session:
            adapter = require_adapter(session, tenant, name)
            require_not_deployed(session, tenant, name)
            retired = self._retire(session, adapter, actor)
            return [self._version(row) for row in retired]

    def adapter(self, tenant: str, name: str) -> AdapterRecord:
        """Raises AdapterNotFoundError."""
        with reading(self._engine) as session:
            adapter = require_adapter(session, tenant, name)
            return adapter_record(adapter)

    def adapters(self, tenant: str | None = None) -> list[AdapterRecord]:
        """What one tenant owns, or everything, by name."""
        query = sa.select(AdapterRow).where(AdapterRow.deleted_at.is_(None))
        if tenant is not None:
            query = query.where(AdapterRow.tenant == tenant)
        with reading(self._engine) as session:
            return [adapter_record(row) for row in session.scalars(query.order_by(AdapterRow.tenant, AdapterRow.name))]

    # What happened, and what is

    def audit(
        self, limit: int = 100, tenant: str | None = None, *, where: AuditFilter | None = None
    ) -> list[AuditEntry]:
        """The newest first. tenant: only its entries, whatever `where` says of tenants."""
        where = where or AuditFilter()
        if tenant is not None:
            where = replace(where, tenants=[tenant])
        with reading(self._engine) as session:
            return audit.latest(session, limit, where)

    def unnamed_files(self, digests: Iterable[str]) -> set[str]:
        """Those of these files' digests that no version names, an archived tenant's neither: what it stored stays."""
        asked = set(digests)
        if not asked:
            return asked
        files = sa.cast(VersionRow.files, sa.Text)
        naming = sa.select(VersionRow.files).where(
            VersionRow.status != VersionStatus.RETIRED.value, sa.or_(*(files.contains(digest) for digest in asked))
        )
        with reading(self._engine) as session:
            return asked.difference(*(found.values() for found in session.scalars(naming)))

    def change_counter(self) -> int:
        """Differs from a snapshot's counter when the snapshot is out of date. One tiny query."""
        with reading(self._engine) as session:
            return read_counter(session)

    def snapshot(self) -> Snapshot:
        """Everything that is not deleted, from one moment. After the first, reads only what changed since the last."""
        with self._snapshot_lock, reading(self._engine) as session:
            self._last_snapshot = read_snapshot(session, self._manifest, self._last_snapshot)
            return self._last_snapshot

    # Parts of the methods above

    def _move(
        self,
        session: Session,
        adapter: AdapterRow,
        alias: Alias,
        actor: str,
        action: str,
        *,
        passed: Sequence[str] = (),
        **details: Any,
    ) -> None:
        """passed: what the gate found in its favour. details: what else the audit log is to keep."""
        before = adapter.production
        if alias.production != before:
            store_alias(adapter, alias)
            subject = f"{adapter.name}@{alias.production}"
            self._audit(session, actor, action, adapter.tenant, subject, before=before, passed=list(passed), **details)

    def _reserve(self, session: Session, tenant: str, name: str) -> VersionRow:
        """The row of the next version, quarantined, with its name alive. Raises RoomError."""
        now = self._clock()
        adapter = session.get(AdapterRow, (tenant, name))
        if adapter is None or adapter.deleted_at is not None:
            require_adapter_room(session, tenant, self._tenant_limits(session, tenant).max_adapters)
        if adapter is None:
            session.add(AdapterRow(tenant=tenant, name=name, created_at=now, former=[], shared_with=[]))
        elif adapter.deleted_at is not None:  # the name lives again; its numbers go on
            adapter.created_at, adapter.deleted_at = now, None
        newest = session.scalar(all_versions(tenant, name).with_only_columns(sa.func.max(VersionRow.version)))
        return session.merge(  # onto the row of a released version where there is one
            VersionRow(
                tenant=tenant,
                adapter=name,
                version=(newest or 0) + 1,
                digest=placeholder_digest(),
                status=VersionStatus.QUARANTINED.value,
                created_at=now,
                rank=0,
                alpha=0.0,
                size_bytes=0,
                base="",
                files={},
                warnings=[],
                faults=[],
            )
        )

    def _release(self, session: Session, row: VersionRow) -> None:
        row.status = VersionStatus.RETIRED.value
        if session.scalar(live_versions(row.tenant, row.adapter).limit(1)) is None:
            self._free_name(session, require_adapter(session, row.tenant, row.adapter))

    def _named(self, session: Session, model_name: TunedName | None) -> VersionRow | None:
        """The live version that has the name already."""
        found = session.get(ModelNameRow, str(model_name)) if model_name is not None else None
        row = session.get(VersionRow, (found.tenant, found.adapter, found.version)) if found is not None else None
        return row if row is not None and row.status != VersionStatus.RETIRED else None

    def _name(self, session: Session, row: VersionRow, model_name: TunedName | None) -> None:
        if model_name is None:
            return
        session.flush()
        session.merge(
            ModelNameRow(
                name=str(model_name),
                tenant=row.tenant,
                adapter=row.adapter,
                version=row.version,
                step=model_name.step,
                created_at=self._clock(),
            )
        )

    def _checkpoint(self, session: Session, row: VersionRow) -> bool:
        """Whether the version is known by names of checkpoints only. They never go into production by themselves."""
        steps = session.scalars(
            sa.select(ModelNameRow.step).where(
                ModelNameRow.tenant == row.tenant,
                ModelNameRow.adapter == row.adapter,
                ModelNameRow.version == row.version,
            )
        ).all()
        return bool(steps) and None not in steps

    def _retire(self, session: Session, adapter: AdapterRow, actor: str) -> list[VersionRow]:
        retired = list(session.scalars(live_versions(adapter.tenant, adapter.name)))
        for row in retired:
            row.status = VersionStatus.RETIRED.value
            forget_forms(session, row.tenant, row.adapter, row.version)
        self._free_name(session, adapter)
        self._audit(session, actor, "adapter.delete", adapter.tenant, adapter.name)
        return retired

    def _tenant_limits(self, session: Session, tenant: str) -> Limits:
        return tenant_limits(session, tenant, self._default_limits)

    def _free_name(self, session: Session, adapter: AdapterRow) -> None:
        adapter.shared_with = []
        store_alias(adapter, Alias())
        adapter.deleted_at = self._clock()
        forget_limits(session, LimitSubject(LimitKind.ADAPTER, adapter.tenant, adapter.name))

    def _version(self, row: VersionRow) -> AdapterVersion:
        return version_record(row, self._manifest)

    def _manifest(self, tenant: str, adapter: str, version: int) -> Manifest | None:
        query = sa.select(VersionRow.manifest).where(
            VersionRow.tenant == tenant, VersionRow.adapter == adapter, VersionRow.version == version
        )
        with reading(self._engine) as session:
            raw = session.scalar(query)
        return parse_manifest(raw) if raw is not None else None


def _attached(session: Session, tenant: str, name: str, version: int | None) -> list[AttachedEvaluation]:
    query = sa.select(EvaluationRow).where(EvaluationRow.tenant == tenant, EvaluationRow.adapter == name)
    if version is not None:
        query = query.where(EvaluationRow.version == version)
    return [_attached_evaluation(row) for row in session.scalars(query.order_by(EvaluationRow.id))]


def _attached_evaluation(row: EvaluationRow) -> AttachedEvaluation:
    return AttachedEvaluation(row.id, row.version, row.created_at, row.actor, Evaluation.model_validate(row.document))
