"""Lines on disk: what was appended is there after a kill, what was torn is not, and no two gateways share a file."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.spool import Spool, claim_spools


def all_lines(spool: Spool) -> list[bytes]:
    """Read and dropped."""
    found: list[bytes] = []
    while not spool.empty:
        lines, size_bytes = spool.head()
        found += lines
        spool.drop(size_bytes)
    return found


def test_what_was_appended_is_there_for_the_next_process(tmp_path: Path) -> None:
    (first,) = claim_spools(tmp_path)
    first.append([b"one", b"two"])
    first.close()
    (second,) = claim_spools(tmp_path)
    assert second.head() == ([b"one", b"two"], 8)
    second.close()


def test_a_line_torn_by_a_kill_is_gone_and_the_next_one_whole(tmp_path: Path) -> None:
    (tmp_path / "spool-0.jsonl").write_bytes(b"whole\n" + b"to" * 700_000)
    (spool,) = claim_spools(tmp_path)
    assert (tmp_path / "spool-0.jsonl").read_bytes() == b"whole\n"
    spool.append([b"next"])
    assert all_lines(spool) == [b"whole", b"next"]
    spool.close()


def test_what_was_dropped_does_not_come_back_once_all_is(tmp_path: Path) -> None:
    (spool,) = claim_spools(tmp_path)
    spool.append([b"one"])
    assert all_lines(spool) == [b"one"]
    spool.close()
    (again,) = claim_spools(tmp_path)
    assert again.empty
    assert (tmp_path / "spool-0.jsonl").stat().st_size == 0
    again.close()


def test_each_gateway_has_its_own_and_takes_over_what_a_killed_one_left(tmp_path: Path) -> None:
    (first,) = claim_spools(tmp_path)
    (second,) = claim_spools(tmp_path)
    first.append([b"first"])
    second.append([b"second"])
    first.close()
    second.close()
    third = claim_spools(tmp_path)
    assert [all_lines(spool) for spool in third] == [[b"first"], [b"second"]]
    for spool in third:
        spool.close()


def test_a_process_that_lives_keeps_its_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gateway.spool import claim_spools\n"
        "(spool,) = claim_spools(Path(sys.argv[1])); spool.append([b'its own']); print('claimed', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (mine,) = claim_spools(tmp_path)
        assert mine.empty
        child.kill()
    (left,) = claim_spools(tmp_path)
    assert all_lines(left) == [b"its own"]
    left.close()
    mine.close()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """`/dev/full` refuses every byte."""
    (spool,) = claim_spools(tmp_path)
    spool.append([b"before"])
    spool.close()
    full = Spool(os.open("/dev/full", os.O_RDWR))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        full.append([b"more"])
    assert full.empty
    full.close()


@given(
    st.lists(st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")), max_size=5), max_size=8),
    st.data(),
)
def test_lines_come_out_in_order_whatever_is_dropped_between(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[bytes]], data: st.DataObject
) -> None:
    (spool,) = claim_spools(tmp_path_factory.mktemp("spool"))
    out: list[bytes] = []
    for batch in batches:
        spool.append(batch)
        if data.draw(st.booleans()):
            lines, size_bytes = spool.head()
            out += lines
            spool.drop(size_bytes)
    assert out + all_lines(spool) == [line for batch in batches for line in batch]
    spool.close()
