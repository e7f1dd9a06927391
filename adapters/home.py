"""The data folder: where everything Lorikeet keeps on one machine has its place."""

import os
from dataclasses import dataclass
from pathlib import Path


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
    def secret(self) -> Path:
        """Random bytes that key the hash of every API key; mode 0600."""
        return self.root / "secret"

    @property
    def operator_key(self) -> Path:
        """The operator's own API key for commands on this machine; mode 0600."""
        return self.root / "operator-key"

    def create(self) -> "Home":
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.models, self.blobs, self.quarantine, self.versions, self.run, self.logs):
            folder.mkdir(exist_ok=True)
        return self


def home() -> Home:
    """The data folder the environment names."""
    return Home(Path(os.environ.get("LORIKEET_HOME") or Path.home() / ".lorikeet").expanduser().absolute())
