"""Alembic migrations of the registry's database, run by `adapters.database.open_database`."""
