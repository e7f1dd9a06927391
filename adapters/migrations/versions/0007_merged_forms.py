"""Versions folded into their base, and the engines of their own that serve them."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    json = sa.JSON(none_as_null=True)
    op.create_table(
        "merged_forms",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("scheme", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("report", json, nullable=False),
        sa.Column("licences", json, nullable=True),
        sa.Column("forced", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "adapter", "version"],
            ["adapter_versions.tenant", "adapter_versions.adapter", "adapter_versions.version"],
            name="fk_merged_forms_tenant_adapter_version",
        ),
        sa.PrimaryKeyConstraint("tenant", "adapter", "version", "digest", name="pk_merged_forms"),
    )
    op.create_table(
        "deployments",
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("profile", json, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "adapter", "version", "digest"],
            ["merged_forms.tenant", "merged_forms.adapter", "merged_forms.version", "merged_forms.digest"],
            name="fk_deployments_tenant_adapter_version_digest",
        ),
        sa.PrimaryKeyConstraint("tenant", "adapter", "version", name="pk_deployments"),
    )
