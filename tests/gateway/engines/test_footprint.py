import subprocess
import sys
from pathlib import Path

from gateway.engines.footprint import footprint, used_mib
from gateway.engines.leftovers import Record, write_record


def test_the_drivers_table_is_read_by_process() -> None:
    assert used_mib("4711, 1024\n4712, 10\n4711, 6\n[N/A], 3\n\n") == {4711: 1030, 4712: 10}


def test_an_engines_memory_is_that_of_its_processes(tmp_path: Path) -> None:
    assert footprint(tmp_path, "engine-0") is None
    process = subprocess.Popen(
        [sys.executable, "-c", "held = bytearray(64 << 20); print(len(held), flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        write_record(tmp_path / "engine-0.json", Record.mine().with_engine(process.pid))
        found = footprint(tmp_path, "engine-0")
    finally:
        process.communicate(b"\n")
    assert found is not None
    assert 64 << 20 < found.pss_bytes <= found.rss_bytes < 256 << 20
    assert footprint(tmp_path, "engine-0") is None
