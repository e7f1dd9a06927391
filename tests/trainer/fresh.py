"""Processes that need not import torch: forked from one that has, and has done nothing else."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainer.methods.trainers", "peft", "transformers.models.llama.modeling_llama"])


class Fresh:
    """`python -m MODULE ARGUMENTS…` as a process of its own. It has its standard input for as long as it is not closed here."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        log: Path,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """log: what it prints is added there."""
        theirs, self.stdin = CONTEXT.Pipe(duplex=False)
        self.log = log
        self._process = CONTEXT.Process(
            target=_become, args=(module, list(arguments), theirs, log, folder or Path.cwd(), dict(environment or {}))
        )
        self._process.start()
        theirs.close()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float | None = None) -> int:
        self._process.join(timeout_s)
        code = self._process.exitcode
        assert code is not None, f"still running after {timeout_s} s: {self.said()}"
        return code

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")[-3000:]


def _become(
    module: str, arguments: list[str], stdin: Connection, log: Path, folder: Path, environment: dict[str, str]
) -> None:
    import torch

    os.dup2(stdin.fileno(), 0)
    stdin.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
