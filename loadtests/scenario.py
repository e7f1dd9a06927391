"""What to send, how fast, and what must hold: a YAML file, checked whole before anything is sent."""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator

from loadtests.errors import ObjectiveError, ScenarioError
from loadtests.faults import Location, PlacedFaultsError, describe_faults, describe_yaml_error
from loadtests.loads import AnyLoad, Closed, Load, Poisson, Touch, TraceLoad
from loadtests.pages import parse_page
from loadtests.parts import Part
from loadtests.phases import Phase, expand_working_sets
from loadtests.popularity import AnyPopularity, Popularity, Uniform
from loadtests.prometheus import parse_series
from loadtests.record import METRICS
from loadtests.shapes import RequestShape
from loadtests.slo import parse_objective, parse_time_s

DEFAULT_KEY_ENV = "LORIKEET_API_KEY"


class Target(Part):
    url: str = Field("http://127.0.0.1:8080", pattern=r"^https?://", description="Server, without /v1.")
    timeout_s: float = Field(120.0, gt=0, description="A request that takes longer has failed.")


class Tenant(Part):
    name: str = Field(min_length=1, description="As the server calls it.")
    key_env: str | None = Field(
        None,
        description="Environment variable with the API key: LORIKEET_API_KEY, of several tenants LORIKEET_API_KEY_NAME.",
    )
    share: float = Field(
        1.0, ge=0, description="Weight of its traffic among the tenants; 0 for one that only events or neighbours use."
    )
    adapters: Literal["all"] | list[str] | None = Field(None, description="Its own list; else the scenario's.")


class Limit(Part):
    """A tenant's request limit, as the gateway was told: a token bucket."""

    requests_per_minute: float = Field(gt=0)
    burst: int = Field(gt=0, description="Requests that may come at once when none came before.")
    code: str = Field("rate_limit_exceeded", description="Of the error that this limit answers with, a 429.")


class Canary(Part):
    """A question whose right answer only this adapter gives."""

    adapter: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    expect: str = Field(min_length=1, description="Text that the answer must contain.")
    max_tokens: int = Field(64, gt=0, description="Output cap: room enough for that text. Asked at temperature 0.")
    tenant: str | None = Field(None, description="Only as this tenant; else as each that may ask the adapter.")


def _named(text: str) -> str:
    parse_series(text)  # raises ValueError
    return text


def _placed(text: str) -> str:
    parse_page(text)  # raises ValueError
    return text


class Scrape(Part):
    """A Prometheus page read during the run."""

    name: str = Field(min_length=1, description="Such as gateway or engine.")
    url: Annotated[str, AfterValidator(_placed)] = Field(
        description="http://…, or unix:/path/of.sock:/metrics, whose path may hold $VARIABLES of the environment."
    )
    key_env: str | None = Field(None, description="Environment variable with a key for it.")
    series: list[Annotated[str, AfterValidator(_named)]] = Field(
        min_length=1,
        description='name or name{label="value"}, each summed over the labels it does not name; or name.label, how many '
        "names the label lists.",
    )


class HealthLimits(Part):
    """Beyond these the generator was the bottleneck, and the run is void."""

    send_lag_p99_ms: float = Field(5.0, gt=0, description="Requests must leave this close to their intended start.")
    loop_lag_p99_ms: float = Field(5.0, gt=0, description="Answers must be noticed this soon.")
    objective_share: float = Field(0.02, gt=0, description="Send lag P99 as share of the tightest latency objective.")
    cpu_share: float = Field(0.7, gt=0, description="Of one core.")
    offered_share: float = Field(0.99, gt=0, le=1, description="Sent in time, of what was scheduled.")


def _fault_of(parse: Callable[[str], object], text: str) -> str | None:
    try:
        parse(text)
    except ObjectiveError as exc:
        return str(exc)
    return None


def _understood(text: str) -> str:
    if fault := _fault_of(parse_objective, text):
        raise ValueError(fault)
    return text


ObjectiveText = Annotated[str, AfterValidator(_understood)]


class Scenario(Part):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    seed: int = Field(1, ge=0, description="The same seed gives the same requests at the same instants.")
    target: Target = Target()
    tenants: list[Tenant] = Field(default_factory=lambda: [Tenant(name="default")], min_length=1)
    keys: dict[str, SecretStr] = Field(default_factory=dict, exclude=True, description="Tenant to API key.")
    limits: dict[str, Limit] = Field(default_factory=dict, description="Tenant to the limit an audit checks.")
    adapters: Literal["all"] | list[str] = Field("all", description="Model names, or all that the key may see.")
    popularity: Popularity = Uniform()
    rotate_s: float | None = Field(
        None, gt=0, description="In open loops, each adapter takes the rank of the one before it every so often."
    )
    requests: RequestShape = RequestShape()
    canaries: list[Canary] = Field(default_factory=list)
    canary_share: float = Field(
        0.0, ge=0, le=1, description="Of the requests to an adapter with canaries, this share asks one instead."
    )
    load: Load = Field(Poisson(rate_per_s=1.0), description="By default one Poisson arrival a second.")
    phases: list[Phase] = Field(min_length=1)
    drain_s: float = Field(60.0, ge=0, description="Wait for answers after the last phase; later ones are cut off.")
    shards: int = Field(1, gt=0, le=256, description="Processes that send; more than one where one core is too little.")
    scrape: list[Scrape] = Field(default_factory=list)
    objectives: list[ObjectiveText] = Field(default_factory=list, description="Such as: p95(ttft) < 400 ms per adapter")
    goodput: dict[str, str] = Field(
        default_factory=dict,
        description="A good request stays below all these, such as {ttft: 400 ms}; else below the latency objectives.",
    )
    sample_floor: int = Field(300, gt=0, description="Groups with fewer answers are undecided, not green.")
    price_per_hour: float | None = Field(None, gt=0, description="Of the servers, for the cost of a good request.")
    health: HealthLimits = HealthLimits()

    @model_validator(mode="after")
    def _checked_and_expanded(self) -> "Scenario":
        if faults := list(self._faults()):
            raise PlacedFaultsError(faults)
        object.__setattr__(self, "phases", expand_working_sets(self.phases))
        return self

    def _faults(self) -> Iterator[tuple[Location, str]]:
        """Faults that only show between fields, each with its location."""
        tenants = [tenant.name for tenant in self.tenants]
        phases = [(number, part) for number, whole in enumerate(self.phases) for part in expand_working_sets([whole])]
        yield from _taken("tenants", list(enumerate(tenants)))
        yield from _taken("phases", [(number, phase.name) for number, phase in phases])
        for kind, named in (("keys", self.keys), ("limits", self.limits)):
            for name in named:
                if name not in tenants:
                    yield (kind, name), f"no such tenant: {name}"
        if not any(tenant.share for tenant in self.tenants):
            yield ("tenants",), "at least one needs a share above 0"
        if not any(phase.measured for phase in self.phases):
            yield ("phases",), "at least one must be measured"
        own: list[tuple[Location, object]] = [
            (("tenants", i, "adapters"), t.adapters) for i, t in enumerate(self.tenants)
        ]
        for location, adapters in [(("adapters",), self.adapters), *own]:
            if adapters == []:
                yield location, "an empty list of adapters; name some, or write `all`"
        for number, canary in enumerate(self.canaries):
            if canary.tenant is not None and canary.tenant not in tenants:
                yield ("canaries", number, "tenant"), f"no such tenant: {canary.tenant}"
        if self.canary_share and not self.canaries:
            yield ("canary_share",), "there are no canaries"
        for metric, limit in self.goodput.items():
            if metric not in METRICS:
                yield ("goodput", metric), f"no such metric; there are {', '.join(METRICS)}"
            elif fault := _fault_of(parse_time_s, limit):
                yield ("goodput", metric), fault
        for number, text in enumerate(self.objectives):
            pattern = parse_objective(text).phases
            if not any(fnmatchcase(phase.name, pattern) for _, phase in phases if phase.measured):
                yield ("objectives", number), f"no measured phase is called {pattern}"
        for number, phase in enumerate(self.phases):
            for place, message in self._phase_faults(phase, set(tenants)):
                yield ("phases", number, *place), message

    def _phase_faults(self, phase: Phase, tenants: set[str]) -> Iterator[tuple[Location, str]]:
        load = self.load_of(phase)
        if phase.working_set and phase.adapters:
            yield ("adapters",), "either adapters or working_set, which sets them"
        if phase.neighbour and phase.neighbour.tenant not in tenants:
            yield ("neighbour", "tenant"), f"no such tenant: {phase.neighbour.tenant}"
        if phase.audit and not self.limits:
            yield ("audit",), "needs `limits` of the scenario to audit against"
        if isinstance(load, TraceLoad | Touch):
            for field in ("popularity", "rotate_s"):
                if getattr(phase, field):
                    yield (field,), f"a {load.kind} load has its own order of adapters"
        if isinstance(load, Closed) and phase.rotate_s:
            yield ("rotate_s",), "needs an open loop: a closed one plans no instants"
        for number, event in enumerate(phase.events):
            if event.at_s >= phase.duration_s:
                yield ("events", number, "at_s"), f"the phase ends at {phase.duration_s:g} s"
            if event.request and event.request.tenant not in tenants:
                yield ("events", number, "request", "tenant"), f"no such tenant: {event.request.tenant}"

    def key_variable(self, tenant: Tenant) -> str:
        """Where the tenant's key is looked for. Several tenants never share one unless they say so."""
        own = re.sub(r"[^A-Z0-9]", "_", f"{DEFAULT_KEY_ENV}_{tenant.name.upper()}")
        return tenant.key_env or (DEFAULT_KEY_ENV if len(self.tenants) == 1 else own)

    def load_of(self, phase: Phase) -> AnyLoad:
        return phase.load or self.load

    def popularity_of(self, phase: Phase) -> AnyPopularity:
        return phase.popularity or self.popularity

    def rotate_s_of(self, phase: Phase) -> float | None:
        return phase.rotate_s or self.rotate_s


def _taken(kind: str, names: Sequence[tuple[int, str]]) -> Iterator[tuple[Location, str]]:
    """names: of each part, its place in the list and its name."""
    seen: set[str] = set()
    for number, name in names:
        if name in seen:
            yield (kind, number, "name"), f"another one is called {name}"
        seen.add(name)


def load_scenario(path: Path) -> Scenario:
    """Raises ScenarioError naming every fault with its line and field."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise ScenarioError(str(path), [f"cannot be read: {exc}"]) from exc
    except yaml.YAMLError as exc:
        raise ScenarioError(str(path), [describe_yaml_error(exc)]) from exc
    except ValueError as exc:  # a date such as 2026-13-45
        raise ScenarioError(str(path), [f"not YAML: {exc}"]) from exc
    if not isinstance(content, dict):
        raise ScenarioError(str(path), ["expected a mapping at the top (name, phases, …)"])
    try:
        return Scenario.model_validate(content, context={"folder": path.parent})
    except ValidationError as exc:
        raise ScenarioError(str(path), describe_faults(root, exc)) from exc
