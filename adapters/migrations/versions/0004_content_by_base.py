"""The same content may be a version for each of several bases."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    live = sa.text("status != 'retired'")
    op.drop_index("uq_adapter_versions_live_digest", "adapter_versions")
    op.create_index(
        "uq_adapter_versions_live_digest",
        "adapter_versions",
        ["tenant", "adapter", "digest", "base"],
        unique=True,
        sqlite_where=live,
        postgresql_where=live,
    )
