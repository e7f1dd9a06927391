"""Runs migrations on the connection, and inside the transaction, that `adapters.database` hands in."""

from alembic import context

from adapters.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
    compare_type=True,
)
context.run_migrations()
