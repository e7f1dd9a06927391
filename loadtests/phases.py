"""Phases of a run: which load goes to which adapters for how long, and what else happens meanwhile."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from loadtests.loads import Load, RateLoad
from loadtests.parts import ExistingFile, JsonData, Part
from loadtests.popularity import Popularity


class EventRequest(Part):
    """An HTTP request to the server, such as an upload or a moved alias."""

    model_config = ConfigDict(populate_by_name=True)

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    path: str = Field(pattern=r"^/")
    tenant: str = Field(description="Whose key it carries.")
    body: JsonData = Field(None, alias="json", description="JSON body.")
    files: dict[str, ExistingFile] = Field(default_factory=dict, description="Form fields to files, sent as multipart.")

    @model_validator(mode="after")
    def _one_body(self) -> "EventRequest":
        if self.body is not None and self.files:
            raise ValueError("either json or files")
        return self


class Event(Part):
    """Something done to the server during a phase. Its start, end and error are marked on the time axis."""

    at_s: float = Field(ge=0, description="From the phase's start.")
    name: str = Field(min_length=1)
    every_s: float | None = Field(None, gt=0, description="Again and again, until the phase ends.")
    run: list[str] | None = Field(None, min_length=1, description="A command and its arguments; no shell.")
    request: EventRequest | None = None

    @model_validator(mode="after")
    def _one_deed(self) -> "Event":
        if (self.run is None) == (self.request is None):
            raise ValueError("needs either run or request")
        return self


class Neighbour(Part):
    """One tenant's extra traffic on top of the phase's own, over all of its adapters."""

    tenant: str
    load: RateLoad


_Chosen = Annotated[
    Annotated[int, Field(gt=0), Tag("number")] | Annotated[list[str], Field(min_length=1), Tag("names")],
    Discriminator(lambda value: "names" if isinstance(value, list) else "number"),
]


class Phase(Part):
    name: str = Field(min_length=1, pattern=r"^[a-z0-9_-]+$")
    duration_s: float = Field(gt=0)
    measured: bool = Field(True, description="False for warm-up: recorded, but in no statistic and no objective.")
    load: Load | None = Field(None, description="Instead of the scenario's load.")
    popularity: Popularity | None = Field(None, description="Instead of the scenario's popularity.")
    rotate_s: float | None = Field(None, gt=0, description="Instead of the scenario's rotate_s.")
    adapters: _Chosen | None = Field(
        None, description="Only so many from the top of each tenant's list, or only these of it, most popular first."
    )
    working_set: list[Annotated[int, Field(gt=0)]] | None = Field(
        None, min_length=1, description="One phase per size, NAME-SIZE, over that many adapters."
    )
    neighbour: Neighbour | None = None
    events: list[Event] = Field(default_factory=list)
    audit: bool = Field(False, description="Check each refusal of this phase against `limits`.")


def expand_working_sets(phases: Sequence[Phase]) -> list[Phase]:
    """Each phase with a working_set as one phase per size, in the order given."""
    expanded: list[Phase] = []
    for phase in phases:
        if phase.working_set is None:
            expanded.append(phase)
        for size in phase.working_set or ():
            update = {"name": f"{phase.name}-{size}", "adapters": size, "working_set": None}
            expanded.append(phase.model_copy(update=update))
    return expanded
