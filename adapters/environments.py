"""Environments of their own for tools whose pins conflict with ours: made by the command that needs one, whole or not at all.

A tool is a file of pinned requirements and scripts, both in `adapters/tools/`. Its environment lies under
LORIKEET_HOME/tools, named by the digest of the pins and of this Python, so changed pins make another one. A script there
imports nothing of ours; it tells how far it is in lines that begin with PROGRESS, and everything else it prints is shown
only when it fails.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from adapters.base import Report, silent
from adapters.errors import ToolError

FILES = Path(__file__).parent / "tools"
PROGRESS = "@lorikeet "
LAST_LINES = 12  # of what a failed tool said; its error stands at the end
READY_FILE = "lorikeet-ready"

Step = tuple[str, int, int]  # what, done, total; total 0 where it is not known


@dataclass(frozen=True)
class Tool:
    """A name, and beside it in `adapters/tools/` the file `<name>.txt` with everything it needs, pinned."""

    name: str

    @property
    def pins(self) -> str:
        return (FILES / f"{self.name}.txt").read_text(encoding="utf-8")

    @property
    def packages(self) -> list[str]:
        """Requirements, without comments."""
        return [line for line in self.pins.splitlines() if line and not line.startswith("#")]

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{sys.version}\n{self.pins}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Environment:
    """A tool's own Python with what it needs."""

    tool: Tool
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(
        self,
        script: str,
        arguments: Sequence[str],
        report: Report = silent,
        *,
        step_of: Callable[[str], Step | None] | None = None,
    ) -> None:
        """Run a script of `adapters/tools/` to its end. step_of: reads progress out of what a library prints (default: tqdm).

        The script ends with this call, however it ends. Raises ToolError with the last lines it printed.
        """
        command = [str(self.python), "-I", "-u", str(FILES / script), *arguments]

        def read(line: str) -> Step | None:
            if line.startswith(PROGRESS):
                step, done, total = json.loads(line.removeprefix(PROGRESS))
                return step, done, total
            return (step_of or tqdm_step)(line)

        _run(f"{self.tool.name} ({script})", command, report, read)


def make_environment(tool: Tool, tools: Path, report: Report = silent) -> Environment:
    """The tool's environment under `tools`, made unless it is there. Two who ask at once get one between them.

    Raises ToolError when Python has no venv, or pip cannot install the pins.
    """
    environment = Environment(tool, tools / f"{tool.name}-{tool.digest}")
    if (environment.folder / READY_FILE).is_file():
        return environment
    tools.mkdir(parents=True, exist_ok=True)
    report(f"waiting for {tool.name}", 0, 0)
    with _locked(tools / f".{tool.name}.lock"):
        if (environment.folder / READY_FILE).is_file():
            return environment
        for left in tools.glob(f".{tool.name}-*"):  # of one that was killed; nobody else has the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{tool.name}-", dir=tools) as temporary:
            made = Environment(tool, Path(temporary) / "venv")
            _install(made, report)
            (made.folder / READY_FILE).touch()
            if environment.folder.exists():
                shutil.rmtree(environment.folder)
            # Scripts in bin/ keep the temporary folder's name; nothing is called by them, python itself does not care.
            made.folder.rename(environment.folder)
    return environment


def tqdm_step(line: str) -> Step | None:
    """A progress bar of tqdm: "Writing:  45%|####" is ("Writing", 45, 100)."""
    found = re.match(r"(.{1,80}?):\s+(\d+)%\|", line)
    return (found[1].strip(), int(found[2]), 100) if found else None


def _install(environment: Environment, report: Report) -> None:
    name, total = environment.tool.name, len(environment.tool.packages)
    report(f"making an environment for {name}", 0, total)
    what = f"The environment for {name}"
    _run(what, [sys.executable, "-m", "venv", "--clear", str(environment.folder)], silent, lambda line: None)
    command = [str(environment.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--no-compile", "--progress-bar", "off", "-r", str(FILES / f"{name}.txt")]
    found = 0

    def step(line: str) -> Step | None:
        nonlocal found
        if line.startswith("Installing collected packages"):
            return f"{name}: installing {total} packages", total, total
        if collected := re.match(r"Collecting ([\w.-]+)", line):
            found += 1
            return f"{name}: fetching {collected[1]}", min(found, total), total
        return None

    _run(what, command, report, step)


def _run(what: str, command: Sequence[str], report: Report, step_of: Callable[[str], Step | None]) -> None:
    last: deque[str] = deque(maxlen=LAST_LINES)
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}  # its bars are read
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tempfile.gettempdir(),
        env=environment,
    ) as process:
        try:
            for line in _lines(process.stdout):
                step = step_of(line)
                if step is not None:
                    report(*step)
                elif line:
                    last.append(line)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code:
        said = "\n".join(last)
        raise ToolError(f"{what} ended with {'signal ' if code < 0 else 'code '}{abs(code)}:\n{said}")


def _lines(stream: IO[bytes] | None) -> Iterator[str]:
    """Lines as they come; a progress bar's carriage return ends one as well."""
    rest = b""
    while stream is not None and (piece := os.read(stream.fileno(), 1 << 16)):
        *whole, rest = re.split(rb"[\r\n]", rest + piece)
        for line in whole:
            yield line.decode("utf-8", errors="replace").rstrip()
    if rest:
        yield rest.decode("utf-8", errors="replace").rstrip()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for whoever has it. The system frees it when its holder ends, however that happens."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
