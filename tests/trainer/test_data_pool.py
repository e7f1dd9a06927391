"""Work in several processes: in order, few items ahead, and gone with the process that asked for it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from trainer.data.pool import AHEAD, in_order

OWNER = """
import time
from tests.trainer.test_data_pool import sleeping
from trainer.data.pool import in_order
if __name__ == "__main__":
    for _ in in_order(sleeping, 60, iter([0, 0]), processes=2):
        pass
"""


def adding(number: int) -> Callable[[int], int]:
    return lambda item: item + number


def sleeping(seconds: int) -> Callable[[int], None]:
    return lambda item: time.sleep(seconds)


def failing(what: str) -> Callable[[int], None]:
    def fail(item: int) -> None:
        raise ValueError(what)

    return fail


@pytest.mark.slow
def test_results_come_in_the_order_of_the_items_and_few_are_taken_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    for item, result in in_order(adding, 7, items(), processes=2):
        assert result == item + 7
        assert len(taken) <= item + 2 * AHEAD + 1
    assert taken == list(range(50))


@pytest.mark.slow
def test_an_error_reaches_the_owner() -> None:
    with pytest.raises(ValueError, match="broken"):
        list(in_order(failing, "broken", iter(range(9)), processes=2))


@pytest.mark.slow
def test_processes_end_when_their_owner_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER]) as owner:
        process = psutil.Process(owner.pid)
        while len(process.children()) < 3:  # two, and the tracker of their resources
            time.sleep(0.1)
        children = process.children()
        time.sleep(1)
        owner.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
