"""Keys and the secret they are hashed with."""

import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapters.api_keys import hash_key, load_secret, new_plaintext


def test_a_key_is_long_random_and_safe_in_urls() -> None:
    keys = {new_plaintext() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"lk-[A-Za-z0-9_-]{32,}", key) for key in keys)


def test_the_hash_depends_on_the_secret() -> None:
    assert hash_key("lk-a", b"one") != hash_key("lk-a", b"two")
    assert hash_key("lk-a", b"one") == hash_key("lk-a", b"one")


def test_the_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "home" / "secret"
    secret = load_secret(path)
    assert len(secret) == 32
    assert load_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_two_who_make_the_secret_at_once_get_the_same_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(load_secret, [tmp_path / "secret"] * 32))
    assert len(set(secrets)) == 1
