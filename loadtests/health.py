"""Is the generator itself the bottleneck? Then its figures are its own, not the server's, and the run is void.

Both sides are watched: how late requests leave (send lag), and how late the event loop notices anything (loop lag), which
is how late answers are seen. Tools that watch only the first were wrong by a third without a warning.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests.alarm import Alarm, Clock
from loadtests.record import Health, PhaseWindow, Record
from loadtests.scenario import HealthLimits
from loadtests.stats import percentile_of

SCHEDULER_FACTS = Path("/proc/self/schedstat")  # of the main thread, which runs the event loop
BEAT_S = 0.05  # each costs up to 0.1 ms of processor time; a stall shows in as many beats as it swallowed


def cpu_wait_s() -> float:
    """How long this process was ready to run while others had the CPU (Linux; else 0): explains most void runs."""
    try:
        return int(SCHEDULER_FACTS.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


@dataclass
class Pulse:
    """Loop lag and CPU time over a run."""

    at_s: list[float] = field(default_factory=list)  # when each beat was due
    lag_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    async def beat(self, clock: Clock) -> None:
        """Runs until cancelled."""
        with Alarm(clock) as alarm:

            def wait() -> None:
                due_s = clock() + BEAT_S
                alarm.call_at(due_s, lambda: beat(due_s))

            def beat(due_s: float) -> None:
                self.note(due_s, clock(), time.process_time())
                wait()

            wait()
            await asyncio.Event().wait()

    def extend(self, later: "Pulse") -> None:
        self.at_s += later.at_s
        self.lag_s += later.lag_s
        self.cpu_s += later.cpu_s

    def note(self, due_s: float, now_s: float, cpu_s: float) -> None:
        """A stall is noted once for each beat it swallowed, or a second's stall would be one value among thousands."""
        while True:
            self.at_s.append(due_s)
            self.lag_s.append(max(0.0, now_s - due_s))
            self.cpu_s.append(cpu_s)
            due_s += BEAT_S
            if due_s > now_s:
                return


def assess(
    records: Sequence[Record],
    pulses: Sequence[Pulse],
    windows: Sequence[PhaseWindow],
    *,
    scheduled: int | None,
    limits: HealthLimits,
    tightest_s: float | None,
) -> Health:
    """Pure. pulses: of each process that sent; the worst of them counts, each against one core.

    scheduled: requests planned in measured open-loop phases, None where one is a closed loop.
    tightest_s: the smallest limit any latency objective sets.
    """
    measured = [window for window in windows if window.measured]
    ends = {window.name: window.end_s for window in measured}
    sent = [record for record in records if record.phase in ends and record.sent_s is not None]
    lag_limit_s = limits.send_lag_p99_ms / 1000
    lag_reason = "health.send_lag_p99_ms"
    if tightest_s is not None and tightest_s * limits.objective_share < lag_limit_s:
        lag_limit_s = tightest_s * limits.objective_share
        lag_reason = f"{limits.objective_share:.0%} of the tightest objective"
    send_lag_s = _p99([record.lag_s or 0.0 for record in sent])
    loop_lag_s = max(_loop_lag_p99_s(pulse, measured) for pulse in pulses)
    cpu_share = max(_cpu_share(pulse, measured) for pulse in pulses)
    planned = [record for record in sent if record.turn < 2]  # the further turns of a conversation are not scheduled
    offered = sum((record.sent_s or 0.0) <= ends[record.phase] + lag_limit_s for record in planned)
    faults = []
    if send_lag_s > lag_limit_s:
        faults.append(f"send lag P99 {send_lag_s * 1e3:.1f} ms, allowed {lag_limit_s * 1e3:g} ms ({lag_reason})")
    if loop_lag_s > limits.loop_lag_p99_ms / 1000:
        faults.append(f"loop lag P99 {loop_lag_s * 1e3:.1f} ms, allowed {limits.loop_lag_p99_ms:g} ms")
    if cpu_share > limits.cpu_share:
        faults.append(f"client used {cpu_share:.0%} of a core, allowed {limits.cpu_share:.0%}")
    if scheduled is not None and offered < limits.offered_share * scheduled:
        faults.append(f"sent {offered} of {scheduled} scheduled requests in time, needed {limits.offered_share:.0%}")
    return Health(
        send_lag_s, loop_lag_s, cpu_share, offered, offered if scheduled is None else scheduled, tuple(faults)
    )


def cpu_s(pulses: Sequence[Pulse]) -> float:
    """Processor time of all processes over the whole run."""
    return sum(pulse.cpu_s[-1] - pulse.cpu_s[0] for pulse in pulses if pulse.cpu_s)


def _within(pulse: Pulse, window: PhaseWindow) -> NDArray[np.bool_]:
    at_s = np.array(pulse.at_s)
    return np.asarray((at_s >= window.start_s) & (at_s < window.end_s))


def _loop_lag_p99_s(pulse: Pulse, measured: Sequence[PhaseWindow]) -> float:
    lag_s = np.array(pulse.lag_s)
    return _p99([float(lag) for window in measured for lag in lag_s[_within(pulse, window)]])


def _cpu_share(pulse: Pulse, measured: Sequence[PhaseWindow]) -> float:
    used_s, wall_s = 0.0, 0.0
    for window in measured:
        within = np.flatnonzero(_within(pulse, window))
        if len(within) > 1:
            used_s += pulse.cpu_s[within[-1]] - pulse.cpu_s[within[0]]
            wall_s += pulse.at_s[within[-1]] - pulse.at_s[within[0]]
    return used_s / wall_s if wall_s else 0.0


def _p99(values: Sequence[float]) -> float:
    return percentile_of(values, 99) if values else 0.0
