"""The whole run, computed before the first request: who asks which adapter what, and when.

The content of a request is a pure function of (seed, phase, number), never of how the server behaved. So two runs of
one scenario are paired request by request, a closed loop asks the same questions in the same order, and a schedule can
be cut into shards.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loadtests.arrivals import arrivals_s
from loadtests.loads import AnyRate
from loadtests.phases import Phase
from loadtests.popularity import pick, shares
from loadtests.prompts import PromptSource
from loadtests.record import PhaseWindow
from loadtests.scenario import Scenario
from loadtests.shapes import longest

# Streams of random numbers that must not meet: one for instants, one for contents.
_ARRIVALS, _CONTENT = 0, 1


@dataclass(frozen=True)
class Planned:
    """A request as intended."""

    id: str  # phase and number: pairs it with the same request of another run
    phase: str
    at_s: float | None  # intended start, from the beginning of the run; a closed loop has none
    tenant: str
    adapter: str
    stream: bool
    max_tokens: int
    prompt: str
    mark: str = ""  # the nonce in the prompt: no other answer may hold it
    visit: str = ""  # in a touch phase: first, again or after_eviction
    follow_ups: tuple[str, ...] = ()  # what the user says next, each after the answer before
    think_s: float = 0.0  # pause before each of them
    cancel_after_s: float | None = None  # the client leaves so long after it sent the request
    read_pause_s: float = 0.0  # after each read, of a client that reads slowly
    expect: str = ""  # of a canary: text that the answer must contain


class Workload:
    """Gives each request of each phase its content."""

    def __init__(self, scenario: Scenario, models: Mapping[str, Sequence[str]], prompts: PromptSource) -> None:
        """models: of each tenant, what it may ask for, most popular first."""
        self.scenario = scenario
        self.models = {tenant: tuple(names) for tenant, names in models.items()}
        self._prompts = prompts
        weights = np.array([tenant.share for tenant in scenario.tenants])
        self._tenants = np.cumsum(weights / weights.sum())
        self._adapters = {t: np.cumsum(shares(scenario.popularity, names)) for t, names in self.models.items()}

    def request(self, phase: int, number: int, at_s: float | None) -> Planned:
        shape = self.scenario.requests
        rng = np.random.default_rng((self.scenario.seed, _CONTENT, phase, number))
        tenant_draw, adapter_draw, stream_draw = rng.random(3)
        tenant = self.scenario.tenants[pick(self._tenants, tenant_draw)].name
        adapter = self.models[tenant][pick(self._adapters[tenant], adapter_draw)]
        prompt = self._prompts.draw(rng)
        name = self.scenario.phases[phase].name
        mark = ""
        if shape.nonce:
            mark = hashlib.sha256(f"{self.scenario.seed}/{name}/{number}".encode()).hexdigest()[:8]
            prompt = f"[{mark}] {prompt}"
        stream = bool(stream_draw < shape.streaming_share)
        return Planned(f"{name}-{number}", name, at_s, tenant, adapter, stream, longest(shape.max_tokens), prompt, mark)

    def requests(self, phase: int) -> Iterator[Planned]:
        """The endless sequence a closed loop takes from."""
        return (self.request(phase, number, None) for number in itertools.count())


def windows(phases: Sequence[Phase]) -> list[PhaseWindow]:
    """Each phase on the run's one time axis, one after the other."""
    ends = list(itertools.accumulate(phase.duration_s for phase in phases))
    starts = [0.0, *ends[:-1]]
    return [PhaseWindow(p.name, p.measured, start, end) for p, start, end in zip(phases, starts, ends, strict=True)]


def plan_phase(workload: Workload, phase: int) -> list[Planned]:
    """Every request of an open-loop phase, by intended start. A closed loop plans none: its instants are the server's."""
    scenario = workload.scenario
    load = scenario.load_of(scenario.phases[phase])
    if not isinstance(load, AnyRate):
        return []
    start_s = windows(scenario.phases)[phase].start_s
    rng = np.random.default_rng((scenario.seed, _ARRIVALS, phase))
    instants = arrivals_s(load, scenario.phases[phase].duration_s, rng)
    return [workload.request(phase, number, start_s + float(at_s)) for number, at_s in enumerate(instants)]


def plan_schedule(workload: Workload) -> list[list[Planned]]:
    """The planned requests of each phase."""
    return [plan_phase(workload, phase) for phase in range(len(workload.scenario.phases))]


def save_schedule(path: Path, schedule: Sequence[Sequence[Planned]]) -> None:
    """One JSON line a request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for planned in itertools.chain.from_iterable(schedule):
            file.write(json.dumps(asdict(planned), ensure_ascii=False) + "\n")
