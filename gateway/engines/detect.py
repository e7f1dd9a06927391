"""Which engine profile fits this machine, when the operator names none."""

import shutil
import subprocess

LARGE_MIB = 70_000  # an 80 GB card reports about 81,000 MiB


def profile_for(gpu_mib: int | None) -> str:
    """gpu_mib: memory of the largest GPU, None without one."""
    if gpu_mib is None:
        return "cpu"
    return "gpu-80gb" if gpu_mib >= LARGE_MIB else "gpu-24gb"


def largest_gpu_mib() -> int | None:
    """None where there is no driver or no card. Runs a process: not for the loop."""
    sizes = [int(line) for line in (ask_driver("--query-gpu=memory.total") or "").split() if line.isdigit()]
    return max(sizes, default=None)


def ask_driver(query: str) -> str | None:
    """What the driver's own tool answers, a line each, values by commas; None where there is no such tool or it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return asked.stdout if asked.returncode == 0 else None
