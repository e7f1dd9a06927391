"""Look things up in this machine's registry, for commands: a stored version by what people call it, the only tenant."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.blobs import BlobStore, materialise
from adapters.database import open_database
from adapters.errors import AdapterNotFoundError, ConflictError, VersionNotFoundError
from adapters.home import home
from adapters.names import parse_reference
from adapters.records import AdapterVersion, VersionStatus
from adapters.registry import Registry


def stored_adapter(reference: str, into: Path) -> Path:
    """The version's files, in a folder. Without a version the production one is meant; without a tenant the only owner.

    Raises AdapterNotFoundError, VersionNotFoundError, and ConflictError when several tenants own the name or the version is
    quarantined.
    """
    with reading_registry() as registry:
        if registry is None:
            raise AdapterNotFoundError(reference)
        version = find_version(registry, reference)
    store = BlobStore.open(os.environ.get("LORIKEET_BLOB_URL") or home().blobs)
    return materialise(store, version.files, into)


def only_tenant() -> str | None:
    """The tenant a command on this machine means when it names none: the only one, else None."""
    with reading_registry() as registry:
        tenants = registry.tenants() if registry is not None else []
    return tenants[0].name if len(tenants) == 1 else None


@contextmanager
def reading_registry() -> Iterator[Registry | None]:
    """This machine's registry; None where there is none yet, for a look-up must not create a database."""
    url = os.environ.get("LORIKEET_DATABASE_URL") or f"sqlite:///{home().database}"
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        yield None
        return
    engine = open_database(url)
    try:
        yield Registry(engine, secret=b"")
    finally:
        engine.dispose()


def find_version(registry: Registry, text: str) -> AdapterVersion:
    reference = parse_reference(text)
    if reference is None:
        raise AdapterNotFoundError(text)
    owners = [
        record for record in registry.adapters(reference.tenant) if record.name == reference.name
    ]  # a list of every adapter is fine for a command
    if not owners:
        raise AdapterNotFoundError(text)
    if len(owners) > 1:
        names = ", ".join(f"{record.tenant}/{record.name}" for record in owners)
        raise ConflictError(f"Several tenants own '{reference.name}': say which one: {names}.")
    (record,) = owners
    number = reference.version or record.production
    if number is None:
        raise VersionNotFoundError(f"{record.tenant}/{record.name}", 1)
    version = registry.version(record.tenant, record.name, number)
    if version.status is VersionStatus.QUARANTINED:
        raise ConflictError(f"'{text}' is quarantined: its files are still being checked. Try again in a moment.")
    return version
