"""The registry's part that knows merged versions: their checkpoints, and which of them are to have an engine of their own.

A deployment is what is wanted, not what runs: every gateway that has the checkpoint's files sees to it, today and after its
next start. It belongs to a version, so aliases that move leave it alone.
"""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from adapters.database import reading
from adapters.errors import ConflictError, DeploymentNotFoundError, InvalidValueError
from adapters.models import DeploymentRow, MergedFormRow
from adapters.records import Deployment, MergedForm, VersionStatus
from adapters.rows import require_version
from adapters.tenancy import Tenancy


class Forms(Tenancy):
    """Merged forms of versions and their deployments; `adapters.registry.Registry` adds the versions."""

    def add_form(
        self,
        tenant: str,
        name: str,
        version: int,
        *,
        digest: str,
        scheme: str,
        size_bytes: int,
        report: Mapping[str, Any],
        licences: Mapping[str, Any] | None = None,
        forced: str | None = None,
        actor: str = "operator",
    ) -> MergedForm:
        """Note a checkpoint that was checked and whose files are in place; one that is known already stays as it is.

        Raises AdapterNotFoundError, VersionNotFoundError, ConflictError for a version that is not ready.
        """
        with self._writing() as session:
            _, row = require_version(session, tenant, name, version)
            if row.status != VersionStatus.READY:
                raise ConflictError(f"'{name}@{version}' is {row.status}; only a ready version has a merged form.")
            known = session.get(MergedFormRow, (tenant, name, version, digest))
            if known is not None:
                return _form(known)
            added = MergedFormRow(
                tenant=tenant,
                adapter=name,
                version=version,
                digest=digest,
                scheme=scheme,
                size_bytes=size_bytes,
                report=dict(report),
                licences=dict(licences) if licences is not None else None,
                forced=forced,
                created_at=self._clock(),
                actor=actor,
            )
            session.add(added)
            because = {"forced": forced} if forced is not None else {}
            subject = f"{name}@{version}"
            self._audit(session, actor, "form.add", tenant, subject, digest=digest, scheme=scheme, **because)
            return _form(added)

    def forms(self, tenant: str, name: str, version: int) -> list[MergedForm]:
        """The newest first. Raises AdapterNotFoundError, VersionNotFoundError."""
        query = sa.select(MergedFormRow).where(
            MergedFormRow.tenant == tenant, MergedFormRow.adapter == name, MergedFormRow.version == version
        )
        with reading(self._engine) as session:
            require_version(session, tenant, name, version)
            return [_form(row) for row in session.scalars(query.order_by(MergedFormRow.created_at.desc()))]

    def remove_form(self, form: MergedForm, *, actor: str = "operator") -> None:
        """Forget a checkpoint; its files are the caller's business. Raises ConflictError while it is deployed."""
        with self._writing() as session:
            require_not_deployed(session, form.tenant, form.adapter, form.version, digest=form.digest)
            row = session.get(MergedFormRow, (form.tenant, form.adapter, form.version, form.digest))
            if row is not None:
                session.delete(row)
                subject = f"{form.adapter}@{form.version}"
                self._audit(session, actor, "form.remove", form.tenant, subject, digest=form.digest)

    def deploy(
        self,
        tenant: str,
        name: str,
        version: int,
        *,
        digest: str,
        share: float = 1.0,
        profile: Mapping[str, Any] | None = None,
        actor: str = "operator",
    ) -> Deployment:
        """Want an engine of its own for a merged form; of one that is wanted already only the share changes.

        Raises AdapterNotFoundError, VersionNotFoundError, InvalidValueError for a share outside 0 to 1, and ConflictError for
        a version that is not ready, a form that is not known, and an engine that serves another form or has another profile.
        """
        if not 0 <= share <= 1:
            raise InvalidValueError(f"A share is a number from 0 to 1, and {share:g} is none.")
        with self._writing() as session:
            _, owner = require_version(session, tenant, name, version)
            if owner.status != VersionStatus.READY:
                raise ConflictError(f"'{name}@{version}' is {owner.status}; only a ready version can be deployed.")
            form = session.get(MergedFormRow, (tenant, name, version, digest))
            if form is None:
                raise ConflictError(f"'{name}@{version}' has no merged form {digest[:12]}.")
            row = session.get(DeploymentRow, (tenant, name, version))
            subject = f"{name}@{version}"
            if row is None:
                row = DeploymentRow(
                    tenant=tenant,
                    adapter=name,
                    version=version,
                    digest=digest,
                    share=share,
                    profile=dict(profile) if profile is not None else None,
                    created_at=self._clock(),
                    actor=actor,
                )
                session.add(row)
                self._audit(session, actor, "version.deploy", tenant, subject, digest=digest, share=share)
            elif row.digest != digest or (profile is not None and dict(profile) != row.profile):
                raise ConflictError(
                    f"'{subject}' has an engine of its own already, for another form or with another profile. Take it down "
                    f"first: lorikeet undeploy {subject}"
                )
            elif row.share != share:
                self._audit(session, actor, "version.share", tenant, subject, before=row.share, share=share)
                row.share = share
            return _deployment(row, form.scheme)

    def undeploy(self, tenant: str, name: str, version: int, *, actor: str = "operator") -> None:
        """Want its engine no longer. Raises DeploymentNotFoundError."""
        with self._writing() as session:
            row = session.get(DeploymentRow, (tenant, name, version))
            if row is None:
                raise DeploymentNotFoundError(name, version)
            session.delete(row)
            self._audit(session, actor, "version.undeploy", tenant, f"{name}@{version}", digest=row.digest)


def require_not_deployed(
    session: Session, tenant: str, name: str, version: int | None = None, *, digest: str | None = None
) -> None:
    """None: whichever version, whichever form. Raises ConflictError that names the engine to take down first."""
    query = sa.select(DeploymentRow.version).where(DeploymentRow.tenant == tenant, DeploymentRow.adapter == name)
    if version is not None:
        query = query.where(DeploymentRow.version == version)
    if digest is not None:
        query = query.where(DeploymentRow.digest == digest)
    found = session.scalars(query.order_by(DeploymentRow.version)).first()
    if found is not None:
        raise ConflictError(
            f"'{name}@{found}' has an engine of its own. Take it down first: lorikeet undeploy {name}@{found}"
        )


def forget_forms(session: Session, tenant: str, name: str, version: int) -> None:
    """Of a version that is retired."""
    session.execute(
        sa.delete(MergedFormRow).where(
            MergedFormRow.tenant == tenant, MergedFormRow.adapter == name, MergedFormRow.version == version
        )
    )


def read_deployments(session: Session) -> list[Deployment]:
    same = [
        getattr(DeploymentRow, column) == getattr(MergedFormRow, column)
        for column in ("tenant", "adapter", "version", "digest")
    ]
    query = sa.select(DeploymentRow, MergedFormRow.scheme).join(MergedFormRow, sa.and_(*same))
    return [_deployment(row, scheme) for row, scheme in session.execute(query)]


def _form(row: MergedFormRow) -> MergedForm:
    return MergedForm(
        row.tenant,
        row.adapter,
        row.version,
        row.digest,
        row.scheme,
        row.size_bytes,
        row.report,
        row.licences,
        row.forced,
        row.created_at,
        row.actor,
    )


def _deployment(row: DeploymentRow, scheme: str) -> Deployment:
    return Deployment(
        row.tenant,
        row.adapter,
        row.version,
        row.digest,
        scheme,
        row.share,
        row.profile,
        row.created_at,
        row.actor,
    )
