import asyncio
from dataclasses import dataclass, field

from loadtests.patience import Patience
from tests.loadtests.server import until


@dataclass
class Waiting:
    log: list[str]
    name: str
    finished: bool = False
    added_s: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    def give_up(self) -> None:
        assert asyncio.get_running_loop().time() >= self.added_s + 0.05
        self.finished = True
        self.log.append(self.name)


async def test_who_is_not_finished_in_time_gives_up_in_turn() -> None:
    log: list[str] = []
    patience = Patience(0.05)
    first, done, last = (Waiting(log, name) for name in ("first", "done", "last"))
    patience.add(first)
    patience.add(done)
    done.finished = True
    await asyncio.sleep(0.03)
    patience.add(last)
    await until(lambda: log == ["first", "last"])
    again = Waiting(log, "again")
    patience.add(again)
    await until(lambda: again.finished)


async def test_once_closed_nobody_gives_up() -> None:
    log: list[str] = []
    patience = Patience(0.02)
    patience.add(Waiting(log, "one"))
    patience.close()
    await asyncio.sleep(0.1)
    assert not log
