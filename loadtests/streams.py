"""Streams of requests: a phase's own, and its neighbour's. Each is one load over some tenants and their adapters. Pure."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadtests.arrivals import arrivals_s
from loadtests.audience import Chooser, Models, reach
from loadtests.loads import AnyLoad, Closed, Touch, TraceLoad
from loadtests.phases import Phase
from loadtests.popularity import AnyPopularity, WeightFiles, Zipf
from loadtests.scenario import Scenario
from loadtests.seeds import generator
from loadtests.traces import TraceRow


@dataclass(frozen=True)
class Slot:
    """What the load itself says about a request; the rest is drawn."""

    offset_s: float | None  # from the phase's start; a closed loop has none
    target: tuple[str, str] | None = None  # tenant and adapter
    visit: str = ""
    row: TraceRow | None = None


@dataclass(frozen=True)
class Stream:
    name: str  # seeds its requests and begins their ids
    phase: Phase
    load: AnyLoad
    tenants: Mapping[str, float]  # to their shares
    adapters: Mapping[str, Sequence[str]]  # of each tenant, in the order of their ranks
    popularity: AnyPopularity
    rotate_s: float | None


def streams_of(scenario: Scenario, phase: Phase, models: Models) -> list[Stream]:
    """The phase's own stream, then its neighbour's, which may ask all of its tenant's adapters.

    Raises ValueError when the phase wants adapters that are not there.
    """
    load, popularity, rotate_s = scenario.load_of(phase), scenario.popularity_of(phase), scenario.rotate_s_of(phase)
    shares = {tenant.name: tenant.share for tenant in scenario.tenants if tenant.share}
    adapters = reach(phase, {tenant: models[tenant] for tenant in shares})
    tenants = {name: share for name, share in shares.items() if name in adapters}
    if isinstance(load, TraceLoad):
        own = Stream(phase.name, phase, load, tenants, adapters, Zipf(kind="zipf", exponent=load.sessions), None)
    else:
        own = Stream(phase.name, phase, load, tenants, adapters, popularity, rotate_s)
    if phase.neighbour is None:
        return [own]
    other = phase.neighbour.tenant
    name = f"{phase.name}+{other}"  # no phase's own name holds a +
    return [own, Stream(name, phase, phase.neighbour.load, {other: 1.0}, models, popularity, rotate_s)]


def chooser_of(stream: Stream, files: WeightFiles) -> Chooser:
    """Raises ValueError when a weights file leaves a tenant nothing to ask."""
    return Chooser(stream.tenants, stream.adapters, stream.popularity, files=files, rotate_s=stream.rotate_s)


def planned_slots(stream: Stream, seed: int, rows: Sequence[TraceRow], files: WeightFiles) -> Iterable[Slot]:
    """The slots of an open loop, by their instants; of a closed one none: its instants are the server's.

    rows: the trace's, where the stream replays one.
    """
    match stream.load:
        case Closed():
            return ()
        case Touch():
            return touches(stream, stream.load)
        case TraceLoad():
            return _recorded(rows, seed, chooser_of(stream, files))
        case rate:
            instants = arrivals_s(rate, stream.phase.duration_s, generator(seed, "arrivals", stream.name))
            return [Slot(float(at_s)) for at_s in instants]


def closed_slots() -> Iterator[Slot]:
    """Without end: a closed loop takes as many as it can ask."""
    return itertools.repeat(Slot(None))


def touches(stream: Stream, load: Touch) -> list[Slot]:
    """Raises ValueError when the phase is too short for them."""
    targets = [(tenant, adapter) for tenant in stream.tenants for adapter in stream.adapters[tenant]]
    visits = [(target, visit) for target in targets for visit in ("first", "again")]
    visits += [(target, "after_eviction") for target in targets]
    needed_s = len(visits) * load.gap_s
    if needed_s > stream.phase.duration_s + 1e-9:
        raise ValueError(
            f"{len(visits)} requests {load.gap_s:g} s apart take {needed_s:g} s; duration_s is "
            f"{stream.phase.duration_s:g}"
        )
    return [Slot(number * load.gap_s, target, visit) for number, (target, visit) in enumerate(visits)]


def _recorded(rows: Sequence[TraceRow], seed: int, chooser: Chooser) -> Iterator[Slot]:
    """A session keeps its tenant and adapter, in every phase."""
    for number, row in enumerate(rows):
        tenant_draw, adapter_draw = generator(seed, "session", row.session or f"row {number}").random(2)
        yield Slot(row.at_s, chooser.choose(tenant_draw, adapter_draw, 0.0), row=row)
