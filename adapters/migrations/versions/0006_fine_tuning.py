"""Uploaded files; events, checkpoints, pauses and failures of fine-tuning jobs; names of their results; their limits."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    json = sa.JSON(none_as_null=True)
    serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "files",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("rows", sa.Integer(), nullable=True),
        sa.Column("form", sa.String(), nullable=True),
        sa.Column("stored", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_files_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_tenant", "files", ["tenant"])
    op.create_index("ix_files_digest", "files", ["digest"])
    op.add_column("jobs", sa.Column("base", sa.String(), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("pause_requested", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("failure", json, nullable=True))
    op.drop_column("jobs", "error")
    op.create_table(
        "job_events",
        sa.Column("id", serial, autoincrement=True, nullable=False),
        sa.Column("job", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", json, nullable=True),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_job_events_job"),
        sa.PrimaryKeyConstraint("id", name="pk_job_events"),
    )
    op.create_index("uq_job_events_key", "job_events", ["job", "key"], unique=True)
    op.create_index("ix_job_events_id", "job_events", ["job", "id"])
    op.create_table(
        "job_checkpoints",
        sa.Column("job", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("metrics", json, nullable=False),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_job_checkpoints_job"),
        sa.PrimaryKeyConstraint("job", "step", name="pk_job_checkpoints"),
        sa.UniqueConstraint("id", name="uq_job_checkpoints_id"),
    )
    op.create_table(
        "model_names",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "adapter", "version"],
            ["adapter_versions.tenant", "adapter_versions.adapter", "adapter_versions.version"],
            name="fk_model_names_tenant_adapter_version",
        ),
        sa.PrimaryKeyConstraint("name", name="pk_model_names"),
    )
    op.create_index("ix_model_names_changed", "model_names", ["changed"])
    op.create_index("ix_model_names_version", "model_names", ["tenant", "adapter", "version"])
    op.add_column("limits", sa.Column("max_running_jobs", sa.BigInteger(), nullable=True))
    op.add_column("limits", sa.Column("max_queued_jobs", sa.BigInteger(), nullable=True))
