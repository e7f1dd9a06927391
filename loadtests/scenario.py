"""What to send, how fast, and what must hold: a YAML file, checked whole before anything is sent."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from loadtests.errors import ObjectiveError, ScenarioError
from loadtests.slo import parse_objective

DEFAULT_KEY_ENV = "LORIKEET_API_KEY"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Poisson(_Part):
    """Open loop, as independent users make it: exponential gaps, whatever the server does."""

    kind: Literal["poisson"] = "poisson"
    rate_per_s: float = Field(gt=0, description="Mean arrivals per second.")


class Constant(_Part):
    """Open loop with exactly equal gaps."""

    kind: Literal["constant"]
    rate_per_s: float = Field(gt=0, description="Arrivals per second.")


class Closed(_Part):
    """Closed loop: each of `concurrency` callers waits for its answer before it asks again.

    A stalled server is then simply asked less, so its stall hardly shows: use an open loop to judge latency.
    """

    kind: Literal["closed"]
    concurrency: int = Field(gt=0, description="Callers that are never idle.")
    think_s: float = Field(0.0, ge=0, description="Pause of a caller between answer and next request.")


Load = Annotated[Poisson | Constant | Closed, Field(discriminator="kind")]


class Zipf(_Part):
    """Share of the adapter at rank k proportional to k ** -exponent."""

    kind: Literal["zipf"]
    exponent: float = Field(1.0, ge=0)


class Uniform(_Part):
    kind: Literal["uniform"]


Popularity = Annotated[Zipf | Uniform, Field(discriminator="kind")]


class BuiltinPrompts(_Part):
    """A small list of everyday questions that comes along."""

    kind: Literal["builtin"] = "builtin"


class FilePrompts(_Part):
    """One prompt a line: plain text, or JSON objects with `prompt` (.jsonl)."""

    kind: Literal["file"]
    path: Path = Field(description="Relative to the scenario file.")


class SyntheticPrompts(_Part):
    """Random common words. A word is roughly one token and a third."""

    kind: Literal["synthetic"]
    words: int = Field(gt=0, le=100_000, description="Words in every prompt.")


Prompts = Annotated[BuiltinPrompts | FilePrompts | SyntheticPrompts, Field(discriminator="kind")]


class RequestShape(_Part):
    prompts: Prompts = BuiltinPrompts()
    max_tokens: int = Field(64, gt=0, description="Output cap of each request.")
    temperature: float = Field(0.0, ge=0)
    streaming_share: float = Field(1.0, ge=0, le=1, description="Share of requests that stream; others give no TTFT.")
    nonce: bool = Field(True, description="Begin each prompt with its own mark, so that no prefix cache helps.")
    extra: dict[str, Any] = Field(default_factory=dict, description="Further fields of the request body.")


class Target(_Part):
    url: str = Field("http://127.0.0.1:8080", pattern=r"^https?://", description="Server, without /v1.")
    timeout_s: float = Field(120.0, gt=0, description="A request that takes longer has failed.")


class Tenant(_Part):
    name: str = Field(min_length=1)
    key_env: str | None = Field(
        None,
        description="Environment variable with the API key: LORIKEET_API_KEY, of several tenants LORIKEET_API_KEY_NAME.",
    )
    share: float = Field(1.0, gt=0, description="Weight of its traffic among the tenants.")
    adapters: Literal["all"] | list[str] | None = Field(None, description="Its own list; else the scenario's.")


class Phase(_Part):
    name: str = Field(min_length=1, pattern=r"^[a-z0-9_-]+$")
    duration_s: float = Field(gt=0)
    measured: bool = Field(True, description="False for warm-up: recorded, but in no statistic and no objective.")
    load: Load | None = Field(None, description="Instead of the scenario's load.")


class HealthLimits(_Part):
    """Beyond these the generator was the bottleneck, and the run is void."""

    send_lag_p99_ms: float = Field(5.0, gt=0, description="Requests must leave this close to their intended start.")
    loop_lag_p99_ms: float = Field(5.0, gt=0, description="Answers must be noticed this soon.")
    objective_share: float = Field(0.02, gt=0, description="Send lag P99 as share of the tightest latency objective.")
    cpu_share: float = Field(0.7, gt=0, description="Of one core.")
    offered_share: float = Field(0.99, gt=0, le=1, description="Sent in time, of what was scheduled.")


def _understood(text: str) -> str:
    try:
        parse_objective(text)
    except ObjectiveError as exc:
        raise ValueError(str(exc)) from exc
    return text


ObjectiveText = Annotated[str, AfterValidator(_understood)]


class Scenario(_Part):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    seed: int = Field(1, ge=0, description="The same seed gives the same requests at the same instants.")
    target: Target = Target()
    tenants: list[Tenant] = Field(default_factory=lambda: [Tenant(name="default")], min_length=1)
    keys: dict[str, SecretStr] = Field(default_factory=dict, exclude=True, description="Tenant to API key.")
    adapters: Literal["all"] | list[str] = Field("all", description="Model names, or all that the key may see.")
    popularity: Popularity = Uniform(kind="uniform")
    requests: RequestShape = RequestShape()
    load: Load
    phases: list[Phase] = Field(min_length=1)
    drain_s: float = Field(60.0, ge=0, description="Wait for answers after the last phase; later ones are cut off.")
    objectives: list[ObjectiveText] = Field(default_factory=list, description="Such as: p95(ttft) < 400 ms per adapter")
    sample_floor: int = Field(300, gt=0, description="Groups with fewer answers are undecided, not green.")
    health: HealthLimits = HealthLimits()

    @model_validator(mode="after")
    def _names_agree(self) -> "Scenario":
        for kind, names in (("tenants", [t.name for t in self.tenants]), ("phases", [p.name for p in self.phases])):
            if len(set(names)) < len(names):
                raise ValueError(f"{kind}: each needs a name of its own")
        if unknown := sorted(self.keys.keys() - {tenant.name for tenant in self.tenants}):
            raise ValueError(f"keys: no such tenant: {', '.join(unknown)}")
        if not any(phase.measured for phase in self.phases):
            raise ValueError("phases: at least one must be measured")
        for names_of, adapters in (("adapters", self.adapters), *((t.name, t.adapters) for t in self.tenants)):
            if adapters == []:
                raise ValueError(f"{names_of}: an empty list of adapters; name some, or write `all`")
        return self

    def key_variable(self, tenant: Tenant) -> str:
        """Where the tenant's key is looked for. Several tenants never share one unless they say so."""
        own = re.sub(r"[^A-Z0-9]", "_", f"{DEFAULT_KEY_ENV}_{tenant.name.upper()}")
        return tenant.key_env or (DEFAULT_KEY_ENV if len(self.tenants) == 1 else own)

    def load_of(self, phase: Phase) -> Poisson | Constant | Closed:
        return phase.load or self.load


def load_scenario(path: Path) -> Scenario:
    """Raises ScenarioError naming every fault with its line and field."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise ScenarioError(str(path), [f"cannot be read: {exc}"]) from exc
    except yaml.YAMLError as exc:
        raise ScenarioError(str(path), [_broken(exc)]) from exc
    if not isinstance(content, dict):
        raise ScenarioError(str(path), ["expected a mapping at the top (name, load, phases, …)"])
    try:
        scenario = Scenario.model_validate(content)
    except ValidationError as exc:
        raise ScenarioError(str(path), [_fault(root, error) for error in exc.errors()]) from exc
    prompts = scenario.requests.prompts
    if isinstance(prompts, FilePrompts) and not prompts.path.is_absolute():
        prompts = prompts.model_copy(update={"path": path.parent / prompts.path})
        requests = scenario.requests.model_copy(update={"prompts": prompts})
        scenario = scenario.model_copy(update={"requests": requests})
    return scenario


def _broken(exc: yaml.YAMLError) -> str:
    if isinstance(exc, yaml.MarkedYAMLError) and exc.problem_mark is not None:
        return f"line {exc.problem_mark.line + 1}: not YAML: {exc.problem or exc.context}"
    return f"not YAML: {' '.join(str(exc).split())}"


def _fault(root: yaml.Node | None, error: Any) -> str:
    keys, line = _place(root, error["loc"])
    field = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"line {line}: {field}: {message}" if field else f"line {line}: {message}"


def _place(root: yaml.Node | None, location: Iterable[str | int]) -> tuple[list[str | int], int]:
    """Follow pydantic's location into the YAML tree, past the union tags it puts in; the keys and the line found."""
    node = root
    keys: list[str | int] = []
    line = 1 if root is None else root.start_mark.line + 1
    steps = list(location)
    for position, step in enumerate(steps):
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == step), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
            elif position < len(steps) - 1:
                continue  # the tag of a union ("poisson"), or a union's branch
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        elif position:
            continue
        keys.append(step)
    return keys, line
