"""Limits of tenants, keys and adapters; archived tenants; the account a key belongs to, which outlives its rotation."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "limits",
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("max_in_flight", sa.BigInteger(), nullable=True),
        sa.Column("max_adapters", sa.BigInteger(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("monthly_budget", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_limits_tenant"),
        sa.PrimaryKeyConstraint("kind", "tenant", "subject", name="pk_limits"),
    )
    op.execute(
        "INSERT INTO limits (kind, tenant, subject, max_in_flight) "
        "SELECT 'tenant', name, '', max_in_flight FROM tenants WHERE max_in_flight IS NOT NULL"
    )
    op.drop_column("tenants", "max_in_flight")
    op.add_column("tenants", sa.Column("archived_at", sa.Double(), nullable=True))
    op.add_column("api_keys", sa.Column("account", sa.String(), nullable=True))
    op.execute("UPDATE api_keys SET account = 'svc_acct_' || substr(id, 5) WHERE tenant IS NOT NULL")
