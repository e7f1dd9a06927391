"""API keys: made from random bytes, stored only as a hash that is keyed with this installation's secret."""

import hashlib
import hmac
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "lk-"
HINT_CHARACTERS = 4  # enough to tell one's own keys apart, useless to guess one
SECRET_BYTES = 32


def new_plaintext() -> str:
    """A fresh key with 256 random bits. Its owner sees it once."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(plaintext: str, secret: bytes) -> str:
    """HMAC-SHA256 in hex: without the secret, a stolen database can neither be searched for a key nor given one."""
    return hmac.new(secret, plaintext.encode(), hashlib.sha256).hexdigest()


def load_secret(path: Path) -> bytes:
    """The installation's secret; made on first use, mode 0600. Two processes that make it at once get the same one."""
    with suppress(FileNotFoundError):
        return path.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(name, path)  # unlike a rename, a link never replaces what another process just made
    finally:
        Path(name).unlink()
    return path.read_bytes()
