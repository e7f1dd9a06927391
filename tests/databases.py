"""A SQLite file with our schema, migrated once for the process: a copy takes a thousandth of what the migrations take."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from adapters.database import open_database


@functools.cache
def migrated_file() -> Path:
    """To be copied, not opened."""
    folder = Path(tempfile.mkdtemp(prefix="lorikeet-schema-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "migrated.db"
    open_database(str(path)).dispose()
    return path
