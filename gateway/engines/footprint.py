"""What an engine takes of this machine's memory, on the host and on its GPUs. Reads /proc: not for the event loop."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from gateway.engines import leftovers
from gateway.engines.detect import ask_driver

MIB = 1024 * 1024


@dataclass(frozen=True)
class Footprint:
    """Of all processes of an engine together."""

    rss_bytes: int
    pss_bytes: int  # what is shared with others counted in parts: the sum over everybody is what the machine has spent
    gpu_bytes: int | None  # None without a GPU

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)


def footprint(run_dir: Path, engine_id: str) -> Footprint | None:
    """None where no such engine runs from this folder."""
    record = leftovers.read_record(run_dir / f"{engine_id}.json")
    if record is None or record.session is None:
        return None
    processes = leftovers.processes_of(run_dir / f"{engine_id}.sock", record.session)
    rss = pss = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_full_info()
            rss, pss = rss + memory.rss, pss + memory.pss
    return Footprint(rss, pss, _gpu_bytes(process.pid for process in processes)) if processes else None


def _gpu_bytes(pids: Iterable[int]) -> int | None:
    answer = ask_driver("--query-compute-apps=pid,used_gpu_memory")
    if answer is None:
        return None
    used = used_mib(answer)
    return sum(used.get(pid, 0) for pid in pids) * MIB


def used_mib(table: str) -> Mapping[int, int]:
    """Process id -> MiB, of lines such as `4711, 1024`; a process on two cards has two."""
    found: dict[int, int] = {}
    for line in table.splitlines():
        pid, _, mib = line.partition(",")
        if pid.strip().isdigit() and mib.strip().isdigit():
            found[int(pid)] = found.get(int(pid), 0) + int(mib)
    return found
