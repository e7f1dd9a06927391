"""The data sets Lorikeet knows by name (configs/data/*.yaml), and where a fetched one lies."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.wording import one_line
from trainer.errors import ConfigError, FetchError

CATALOG = Path(__file__).parents[2] / "configs" / "data"
CARD_FILE = "card.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetSpec(_Frozen):
    """One data set inside a package. Either a published split (train and eval files) or one file, split by seed."""

    name: str
    title: str
    task: Literal["classification", "json", "probe"]
    licence: str = Field(description="The terms of the data, as far as its package tells them.")
    package: str
    version: str
    train: str = Field(description="Path of the training file inside the package.")
    eval: str | None = Field(None, description="Path of the published test file; none: split by seed.")
    converter: str
    options: dict[str, Any] = Field(default_factory=dict)
    eval_rows: int = Field(200, gt=0, description="Rows held out where the package publishes no split.")
    seed: int = 0


class FileCard(_Frozen):
    rows: int
    sha256: str


class DatasetCard(_Frozen):
    """What was fetched: source, terms, digests. Written beside the rows."""

    name: str
    title: str
    task: str
    licence: str
    source: str
    package_sha256: str
    train: FileCard
    eval: FileCard
    dropped: dict[str, int]
    spec: DatasetSpec


def known_datasets() -> list[str]:
    return sorted(path.stem for path in CATALOG.glob("*.yaml"))


def load_dataset_spec(name: str) -> DatasetSpec:
    """Raises ConfigError."""
    path = CATALOG / f"{name}.yaml"
    if name not in known_datasets():
        raise ConfigError(f"There is no data set '{name}'. Known: {', '.join(known_datasets())}.")
    try:
        return DatasetSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as exc:
        raise ConfigError(f"{path}: {one_line(exc)}") from exc


def read_card(folder: Path) -> DatasetCard | None:
    """The card of a fetched data set, None where none is complete there. Raises FetchError."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    try:
        return DatasetCard.model_validate_json(path.read_bytes())
    except ValidationError as exc:
        raise FetchError(f"{path} cannot be read: {one_line(exc)}. Fetch again with --force.") from exc
