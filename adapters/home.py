"""The data folder: where everything Lorikeet keeps on one machine has its place."""

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Home:
    """Paths under LORIKEET_HOME (default ~/.lorikeet). Making one touches no disk; `create` does."""

    root: Path

    @property
    def models(self) -> Path:
        """Prepared base models, a folder each."""
        return self.root / "models"

    @property
    def database(self) -> Path:
        return self.root / "lorikeet.db"

    @property
    def blobs(self) -> Path:
        """Content-addressed adapter files."""
        return self.root / "blobs"

    @property
    def quarantine(self) -> Path:
        """Uploads that have not been validated yet, a folder each."""
        return self.root / "quarantine"

    @property
    def versions(self) -> Path:
        """One immutable folder per adapter version, as the engine reads it."""
        return self.root / "versions"

    @property
    def merged(self) -> Path:
        """One immutable folder per merged form of a version, as an engine of its own reads it."""
        return self.root / "merged"

    @property
    def tools(self) -> Path:
        """Environments of their own for tools whose pins conflict with ours; made again where they are missing."""
        return self.root / "tools"

    @property
    def runs(self) -> Path:
        """Training runs."""
        return self.root / "runs"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def run(self) -> Path:
        """Sockets, process ids: nothing in here outlives the processes."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def usage(self) -> Path:
        """Ledger rows on their way into the database."""
        return self.root / "usage"

    @property
    def secret(self) -> Path:
        """Random bytes that key the hash of every API key; mode 0600."""
        return self.root / "secret"

    @property
    def operator_key(self) -> Path:
        """The operator's own API key for commands on this machine; mode 0600."""
        return self.root / "operator-key"

    def operator_key_for(self, url: str) -> str | None:
        """The operator's key, for a gateway on this machine; None elsewhere, where it is worth nothing and must not go, and
        where no gateway has written one or the file is not ours to read.
        """
        if not _is_loopback(urlsplit(url).hostname or ""):
            return None
        try:
            return self.operator_key.read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def create(self) -> "Home":
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.models, self.blobs, self.quarantine, self.versions, self.run, self.logs):
            folder.mkdir(exist_ok=True)
        return self


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def home() -> Home:
    """The data folder the environment names."""
    return Home(Path(os.environ.get("LORIKEET_HOME") or Path.home() / ".lorikeet").expanduser().absolute())
