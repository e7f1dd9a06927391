"""Does the program in an answer pass its tests? Runs it in a process of its own, fenced in as far as the system lets.

This is a fence against accidents and idle mischief, no jail for an enemy: on a machine that matters, evaluate code in a
container. Off unless a configuration says `run_code: true`.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path

FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
MAX_FILE_BYTES = 1 << 20
MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Fence:
    """What a program may use."""

    timeout_s: float = 5.0
    memory_bytes: int = 512 << 20
    processes: int = 2  # at once, of ours


def program_in(answer: str) -> str:
    """The fenced blocks of an answer, or all of it where there are none."""
    blocks = FENCED.findall(answer)
    return "\n".join(blocks) if blocks else answer


def passes(answer: str, tests: str, fence: Fence) -> bool:
    """Whether the program with the tests after it ends well and in time."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-code-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(f"{program_in(answer)}\n\n{tests}\n", encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [*no_network(), sys.executable, "-I", "-S", str(path)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _limit(fence),
        )
        try:
            return process.wait(fence.timeout_s) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def pass_at_1(answers: list[str], tests: list[str], fence: Fence) -> list[float]:
    """1 for each first answer whose program passes (Chen et al. 2021, with one sample and greedy)."""
    with ThreadPoolExecutor(fence.processes) as pool:
        return [float(passed) for passed in pool.map(passes, answers, tests, repeat(fence))]


@cache
def no_network() -> tuple[str, ...]:
    """A command that takes the network away from what follows it; empty where this system does not let us."""
    command = ("unshare", "--net", "--map-root-user")
    if shutil.which(command[0]) is None:
        return ()
    tried = subprocess.run([*command, "true"], check=False, capture_output=True, timeout=10)
    return command if tried.returncode == 0 else ()


def _limit(fence: Fence) -> None:
    seconds = int(fence.timeout_s) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, fence.memory_bytes),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """With everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
