"""What every part of a scenario shares: unknown fields are faults, and files lie beside the scenario."""

from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_json(value: Any) -> Any:
    """What the server will read: YAML also knows dates, and numbers as keys."""
    try:
        return orjson.loads(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS))
    except TypeError as exc:
        raise ValueError(f"cannot be sent as JSON: {exc}") from exc


JsonData = Annotated[Any, AfterValidator(_as_json)]


def _beside_the_scenario(path: Path, info: ValidationInfo) -> Path:
    if not info.context:  # made by a program, or read back from records: taken as it is
        return path
    path = info.context["folder"] / path
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


# A relative path counts from the folder of the scenario file. The file must exist when the scenario is loaded.
ExistingFile = Annotated[Path, AfterValidator(_beside_the_scenario)]
