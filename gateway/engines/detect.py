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
    """What the driver's own tool reports; None where there is no driver or no card. Runs a process: not for the loop."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    sizes = [int(line) for line in asked.stdout.split() if line.isdigit()]
    return max(sizes) if asked.returncode == 0 and sizes else None
