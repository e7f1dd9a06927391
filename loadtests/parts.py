"""What every part of a scenario shares: unknown fields are faults, and files lie beside the scenario."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _beside_the_scenario(path: Path, info: ValidationInfo) -> Path:
    if not info.context:  # made by a program, or read back from records: taken as it is
        return path
    path = info.context["folder"] / path
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


# A relative path counts from the folder of the scenario file. The file must exist when the scenario is loaded.
ExistingFile = Annotated[Path, AfterValidator(_beside_the_scenario)]
