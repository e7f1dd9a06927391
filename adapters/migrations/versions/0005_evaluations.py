"""Evaluations attached to versions."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "adapter_evaluations",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("document", sa.JSON(none_as_null=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "adapter", "version"],
            ["adapter_versions.tenant", "adapter_versions.adapter", "adapter_versions.version"],
            name="fk_adapter_evaluations_tenant",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_adapter_evaluations"),
    )
    op.create_index(
        "ix_adapter_evaluations_version", "adapter_evaluations", ["tenant", "adapter", "version"], unique=False
    )
