"""The whole run, computed before the first request: who asks which adapter what, and when.

The content of a request depends on the scenario's seed, its phase's name and its number there, never on how the server
behaved, nor on the phases beside it. So two runs of one scenario are paired request by request, a closed loop asks the
same questions in the same order, and a schedule can be cut into shards. Only marks, shared prefixes and the blocks of
traces are new in each run, and as long as before: else an engine would have the prompts of the run before in its cache.
"""

import hashlib
import heapq
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loadtests.errors import ScenarioError
from loadtests.inputs import Inputs
from loadtests.loads import Touch
from loadtests.phases import Phase
from loadtests.prompts import random_words, text_of
from loadtests.record import PhaseWindow
from loadtests.scenario import Canary, Scenario
from loadtests.seeds import generator
from loadtests.shapes import length_at
from loadtests.streams import Slot, Stream, chooser_of, closed_slots, planned_slots, streams_of, touches


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


class _Draws(NamedTuple):
    """Uniform draws in [0, 1), one for each choice: a share that is changed leaves the other choices alone."""

    tenant: float
    adapter: float
    stream: float
    max_tokens: float
    prefix: float
    cancel: float
    slow: float
    canary: float
    which_canary: float


class Workload:
    """Gives each request of each phase its instant and its content."""

    def __init__(
        self, scenario: Scenario, models: Mapping[str, Sequence[str]], inputs: Inputs, *, salt: str = ""
    ) -> None:
        """models: of each tenant, what it may ask for, most popular first. salt: of the run, in all that a cache could know.

        Raises ScenarioError when phases or canaries want adapters that are not there.
        """
        self.scenario = scenario
        self.models = {tenant: tuple(names) for tenant, names in models.items()}
        self._inputs = inputs
        self._salt = salt if scenario.requests.nonce else ""
        self._canaries: defaultdict[tuple[str, str], list[Canary]] = defaultdict(list)  # by tenant and adapter
        for canary in scenario.canaries:
            for tenant in self.models if canary.tenant is None else [canary.tenant]:
                if canary.adapter in self.models[tenant]:
                    self._canaries[tenant, canary.adapter].append(canary)
        prefix = scenario.requests.shared_prefix
        self._prefix = random_words(prefix.words, generator(scenario.seed, "prefix", self._salt)) if prefix else ""
        self._streams = self._checked_streams()

    def requests(self, phase: int) -> Iterator[Planned]:
        """The endless sequence a closed loop takes from."""
        return self._fill(self._streams[phase][0], closed_slots(), 0.0)

    def plan(self, phase: int, start_s: float) -> list[Planned]:
        """Every request of a phase with an instant of its own, by that instant; the phase begins at start_s."""
        seed, files = self.scenario.seed, self._inputs.weights
        rows = self._inputs.traces.get(self.scenario.phases[phase].name, ())
        planned = [self._fill(s, planned_slots(s, seed, rows, files), start_s) for s in self._streams[phase]]
        return list(heapq.merge(*planned, key=lambda request: request.at_s or 0.0))

    def _checked_streams(self) -> list[list[Stream]]:
        streams, faults = [], []
        for phase in self.scenario.phases:
            try:
                found = streams_of(self.scenario, phase, self.models)
                for stream in found:
                    chooser_of(stream, self._inputs.weights)
                    if isinstance(stream.load, Touch):
                        touches(stream, stream.load)
            except ValueError as exc:
                faults.append(f"phase {phase.name}: {exc}")
            else:
                streams.append(found)
        asked = list(itertools.chain.from_iterable(self._canaries.values()))
        faults += [
            f"canaries: {canary.tenant or 'no tenant'} {'may not' if canary.tenant else 'may'} ask {canary.adapter}"
            for canary in self.scenario.canaries
            if canary not in asked
        ]
        if faults:
            raise ScenarioError(self.scenario.name, faults)
        return streams

    def _fill(self, stream: Stream, slots: Iterable[Slot], start_s: float) -> Iterator[Planned]:
        shape = self.scenario.requests
        chooser = chooser_of(stream, self._inputs.weights)
        for number, slot in enumerate(slots):
            rng = generator(self.scenario.seed, "content", stream.name, number)
            draws = _Draws(*rng.random(len(_Draws._fields)).tolist())
            tenant, adapter = slot.target or chooser.choose(draws.tenant, draws.adapter, slot.offset_s or 0.0)
            planned = Planned(
                id=f"{stream.name}-{number}",
                phase=stream.phase.name,
                at_s=None if slot.offset_s is None else start_s + slot.offset_s,
                tenant=tenant,
                adapter=adapter,
                stream=draws.stream < shape.streaming_share,
                max_tokens=0,
                prompt="",
                visit=slot.visit,
            )
            if canary := self._canary(tenant, adapter, draws):
                yield replace(planned, prompt=canary.prompt, max_tokens=canary.max_tokens, expect=canary.expect)
            else:
                yield self._asked(planned, slot, draws, rng)

    def _canary(self, tenant: str, adapter: str, draws: _Draws) -> Canary | None:
        canaries = self._canaries.get((tenant, adapter))
        if not canaries or draws.canary >= self.scenario.canary_share:
            return None
        return canaries[int(draws.which_canary * len(canaries))]

    def _asked(self, planned: Planned, slot: Slot, draws: _Draws, rng: np.random.Generator) -> Planned:
        """With its prompt, its length and its manners. A touch has no manners: it is there to be answered and timed."""
        shape, seed, follow_ups = self.scenario.requests, self.scenario.seed, []
        common = ""  # what other prompts begin with too
        if slot.row is not None:
            (common, prompt), max_tokens = text_of(slot.row, rng, seed, self._salt), max(slot.row.output_tokens, 1)
        else:
            prompt, max_tokens = self._inputs.prompts.draw(rng), length_at(shape.max_tokens, draws.max_tokens)
            if shape.turns and not slot.visit:
                follow_ups = [self._inputs.prompts.draw(rng) for _ in range(1, shape.turns.count)]
            if shape.shared_prefix and draws.prefix < shape.shared_prefix.share:
                common = self._prefix
        mark = hashlib.sha256(f"{self._salt}/{seed}/{planned.id}".encode()).hexdigest()[:8] if shape.nonce else ""
        parts = (common, f"[{mark}]" if mark else "", prompt)
        leaves = shape.cancel and not slot.visit and draws.cancel < shape.cancel.share
        slow = shape.slow_readers and not slot.visit and draws.slow < shape.slow_readers.share
        return replace(
            planned,
            prompt=" ".join(part for part in parts if part),
            max_tokens=max_tokens,
            mark=mark,
            follow_ups=tuple(follow_ups),
            think_s=shape.turns.think_s if shape.turns and follow_ups else 0.0,
            cancel_after_s=shape.cancel.after_s if shape.cancel and leaves else None,
            read_pause_s=shape.slow_readers.pause_s if shape.slow_readers and slow else 0.0,
        )


def windows(phases: Sequence[Phase]) -> list[PhaseWindow]:
    """Each phase on the run's one time axis, one after the other."""
    ends = list(itertools.accumulate(phase.duration_s for phase in phases))
    starts = [0.0, *ends[:-1]]
    return [PhaseWindow(p.name, p.measured, start, end) for p, start, end in zip(phases, starts, ends, strict=True)]


def plan_phase(workload: Workload, phase: int) -> list[Planned]:
    """Every request of a phase that has an instant, by that instant. Of a closed loop that is only its neighbour's."""
    return workload.plan(phase, windows(workload.scenario.phases)[phase].start_s)


def plan_schedule(workload: Workload) -> list[list[Planned]]:
    """The planned requests of each phase."""
    return [plan_phase(workload, phase) for phase in range(len(workload.scenario.phases))]


def save_schedule(path: Path, schedule: Sequence[Sequence[Planned]]) -> None:
    """One JSON line a request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for planned in itertools.chain.from_iterable(schedule):
            file.write(json.dumps(asdict(planned), ensure_ascii=False) + "\n")
