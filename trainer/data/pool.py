"""The same work on many items in several processes, results in the order of the items, few of them held at a time."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Given = TypeVar("Given")

AHEAD = 3  # items each process has waiting: enough to be busy, few enough to hold

_work: Callable[[Any], Any] | None = None  # of this process, where it is one of a pool


def _start(make: Callable[[Any], Callable[[Any], Any]], given: Any) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = make(given)


def _end_with_parent() -> None:
    """A killed owner closes no queue, and its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(item: Any) -> Any:
    assert _work is not None  # noqa: S101 - _start has run in this process
    return _work(item)


def in_order(
    make: Callable[[Given], Callable[[Item], Result]], given: Given, items: Iterable[Item], *, processes: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result. `make` builds the work in each process from `given`, once; 1: in this process."""
    if processes == 1:
        work = make(given)
        for item in items:
            yield item, work(item)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of a progress bar
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(make, given)) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(_do, item)))
                if len(waiting) >= AHEAD * processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # what it was at would be thrown away
            raise
