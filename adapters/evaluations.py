"""What was measured of a version after its upload: scores, a person's reading, and whether the judge may be believed.

Attached over the API, so that what is judged is what is served; only ever added, never changed.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from adapters.manifest import EvaluationScore

MOST_SCORES = 400  # a few tasks, metrics and subjects; and the whole stays a small JSON body

Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SheetSignature(_Frozen):
    """That a person has read a sheet of answers."""

    rows: int = Field(ge=0, description="Answers on the sheet.")
    good: int = Field(ge=0)
    bad: int = Field(ge=0)
    signed_by: Name
    signed_at: int = Field(description="Unix seconds.")
    sheet_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the answers that were read.")

    @property
    def marked(self) -> int:
        return self.good + self.bad


class JudgeCalibration(_Frozen):
    """How far a model that judges agrees with people, on answers both have judged."""

    judge: Name
    labels: int = Field(ge=0, description="Judgements compared.")
    agreement: Share
    kappa: float = Field(ge=-1, le=1, description="Cohen's: agreement beyond chance.")
    position_flips: Share = Field(description="Share of pairs whose verdict changes when the answers change places.")
    rubric_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the judge's instructions.")


class Evaluation(_Frozen):
    """One evaluation of one version."""

    model: Name = Field(description="As it was asked, such as support@2.")
    digest: str | None = Field(None, description="Content digest of the version; refused for another's.")
    scores: list[EvaluationScore] = Field(default_factory=list, max_length=MOST_SCORES)
    sheet: SheetSignature | None = None
    judge: JudgeCalibration | None = None
    report_sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="Of the JSON report it is taken from."
    )


@dataclass(frozen=True)
class AttachedEvaluation:
    """An evaluation as the registry keeps it."""

    id: int
    version: int
    created_at: float
    actor: str
    evaluation: Evaluation
