import os
import subprocess
import sys

import pytest

from loadtests.priority import real_time

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="Linux only")


def may_run_in_real_time() -> bool:
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, *before)
    return True


def test_only_the_generator_itself_runs_before_all_others_and_only_for_a_while() -> None:
    if not may_run_in_real_time():
        pytest.skip("needs the right to it")
    ask = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
    with real_time():
        own = os.sched_getscheduler(0)
        child = int(subprocess.run(ask, capture_output=True, check=True, timeout=30).stdout)
    assert own == os.SCHED_RR | os.SCHED_RESET_ON_FORK
    assert child == os.SCHED_OTHER == os.sched_getscheduler(0)
