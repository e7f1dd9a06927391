"""Several processes for one run: `lorikeet train` starts itself again under `accelerate launch`, one process a GPU.

Without GPUs the processes share the CPU (gloo), which is of use to try a configuration, not to be faster.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import TrainingError

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"  # what the launcher tells each process


def visible_gpus() -> int:
    """Asks torch: seconds, where it is not imported yet."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def is_launched() -> bool:
    return WORLD_SIZE in os.environ


def processes() -> int:
    """How many train together."""
    return int(os.environ.get(WORLD_SIZE, "1"))


def is_main_process() -> bool:
    return int(os.environ.get(RANK, "0")) == 0


def launch_command(arguments: Sequence[str], processes: int, *, gpus: int, port: int) -> list[str]:
    """Pure. arguments: those of `lorikeet`, such as train CONFIG. port: free on this machine, where they find each other."""
    if gpus:
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--num_machines", "1", "--num_processes", str(processes), "--main_process_port", str(port)]
    else:  # on a CPU accelerate's launcher wants MPI for more than one; its own means for GPUs needs none
        launcher = ["torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
        launcher += ["--master_port", str(port)]
    return [sys.executable, "-m", *launcher, "--module", "lorikeet", *arguments]


def launch(command: Sequence[str]) -> None:
    """Run it to its end; what ends us ends it. Raises TrainingError."""
    if importlib.util.find_spec("accelerate") is None:
        raise TrainingError("Several processes need the package accelerate: pip install 'lorikeet[trainer]'.")
    with subprocess.Popen(command, start_new_session=True) as launcher:
        try:
            code = launcher.wait()
        except BaseException:
            os.killpg(launcher.pid, signal.SIGTERM)
            raise
    if code:
        raise TrainingError(
            f"Training in several processes failed (exit code {code}); the reason is above. `lorikeet train --resume` "
            "goes on from the last checkpoint."
        )


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def own_arguments(config: str, overrides: Sequence[str], run: Path, adapter: Path | None, *, resume: bool) -> list[str]:
    """Pure: what the parent tells its processes, so that all mean the same run."""
    told = ["train", config, "--into", str(run)]  # torch's launcher takes --run for one of its own
    told += [part for override in overrides for part in ("--set", override)]
    told += ["--out", str(adapter)] if adapter is not None else []
    return told + (["--resume"] if resume else [])
