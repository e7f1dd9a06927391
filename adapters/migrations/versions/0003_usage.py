"""The ledger of generation requests and its totals by the hour."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("received_ms", sa.BigInteger(), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("requested", sa.String(), nullable=False),
        sa.Column("replica", sa.String(), nullable=True),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("estimated", sa.Boolean(), nullable=False),
        sa.Column("input_cost", sa.Double(), nullable=False),
        sa.Column("cached_cost", sa.Double(), nullable=False),
        sa.Column("output_cost", sa.Double(), nullable=False),
        sa.Column("queued_s", sa.Double(), nullable=True),
        sa.Column("admitted_s", sa.Double(), nullable=True),
        sa.Column("loaded_s", sa.Double(), nullable=True),
        sa.Column("sent_s", sa.Double(), nullable=True),
        sa.Column("first_s", sa.Double(), nullable=True),
        sa.Column("last_s", sa.Double(), nullable=True),
        sa.Column("ended_s", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage"),
    )
    op.create_index("ix_usage_received_ms", "usage", ["received_ms"], unique=False)
    op.create_table(
        "usage_hours",
        sa.Column("hour", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("input_cost", sa.Double(), nullable=False),
        sa.Column("cached_cost", sa.Double(), nullable=False),
        sa.Column("output_cost", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "tenant", "key_id", "model", name="pk_usage_hours"),
        sqlite_with_rowid=False,
    )
