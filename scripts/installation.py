"""A Lorikeet of its own for a script: a data folder, a port, its tenants' keys, and the command line as a user would run it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from adapters.home import home

ROOT = Path(__file__).resolve().parent.parent
LORIKEET = [str(Path(sys.executable).with_name("lorikeet"))]
TENANT_SCOPES = ("inference", "adapters:read", "adapters:write")


def empty_root(name: str) -> Path:
    """An empty folder under the data folder, which shares the latter's prepared models, fetched data sets and tools."""
    root = home().create().root / name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for shared in (home().models, home().datasets, home().tools):
        shared.mkdir(exist_ok=True)
        (root / shared.name).symlink_to(shared)
    return root


@dataclass
class Installation:
    """What runs under `root`, on `port`. keys: of each tenant."""

    root: Path
    port: int
    console: Console
    keys: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # further environment of every command

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, tenant: str | None = None) -> dict[str, str]:
        strange = tuple(
            name for name in os.environ if name.startswith(("LORIKEET_", "OPENAI_")) and name != "LORIKEET_ENGINE"
        )
        kept = {name: value for name, value in os.environ.items() if name not in strange}
        own = {"LORIKEET_HOME": str(self.root), "LORIKEET_PORT": str(self.port), "LORIKEET_URL": self.url}
        own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return kept | own | self.settings | ({"LORIKEET_API_KEY": self.keys[tenant]} if tenant else {})

    def show(self, *arguments: str, tenant: str | None = None, ok: Sequence[int] = (0,)) -> int:
        """Run a command as a user would, its output on the screen. Any other exit code ends the script."""
        self.console.print(f"[dim]$ lorikeet {' '.join(arguments)}[/]")
        done = subprocess.run([*LORIKEET, *arguments], env=self.environment(tenant), cwd=ROOT, check=False)
        if done.returncode not in ok:
            raise SystemExit(f"lorikeet {arguments[0]} ended with exit code {done.returncode}.")
        return done.returncode

    def ask(self, *arguments: str, tenant: str | None = None) -> Any:
        """Run a command and read the JSON it prints; its progress stays on the screen."""
        self.console.print(f"[dim]$ lorikeet {' '.join(arguments)}[/]")
        command = [*LORIKEET, *arguments, "--json"]
        done = subprocess.run(command, env=self.environment(tenant), cwd=ROOT, stdout=subprocess.PIPE, check=False)
        if not done.stdout:
            raise SystemExit(f"lorikeet {arguments[0]} ended with exit code {done.returncode}.")
        return json.loads(done.stdout)

    def add_tenant(self, name: str) -> None:
        """A tenant with a key for its own adapters."""
        self.ask("tenants", "create", name)
        scopes = [part for scope in TENANT_SCOPES for part in ("--scope", scope)]
        self.keys[name] = self.ask("keys", "create", "--tenant", name, *scopes)["key"]

    @contextmanager
    def stopped_at_the_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.root.exists():
                down = [*LORIKEET, "down", "--json"]
                subprocess.run(down, env=self.environment(), stdout=subprocess.DEVNULL, check=False)
