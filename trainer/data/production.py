"""What production looks like: a given distribution of classes, or rows of it, read like any others."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.data.account import Lengths, lengths
from trainer.data.balance import shares
from trainer.data.chunks import chunks_of
from trainer.data.origins import find_origins
from trainer.data.recipe import BuildConfig, SourceConfig
from trainer.data.refine import Refining, refining
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Production:
    """lengths: None where only a distribution of classes was given."""

    classes: Mapping[str, float]
    lengths: Lengths | None


def read_production(config: BuildConfig, *, relative_to: Path) -> Production | None:
    """None where the configuration compares with nothing. Raises ConfigError, DataError."""
    if config.balance is None:
        return None
    if isinstance(config.balance.production, dict):
        return Production(shares(config.balance.production), None)
    source = SourceConfig(name="production", path=config.balance.production)
    off = config.privacy.model_copy(update={"action": "off"})
    alone = config.model_copy(update={"sources": (source,), "evaluation": (), "general": None, "privacy": off})
    refine = refining(Refining(alone, (frozenset(),), ()))
    classes: Counter[str] = Counter()
    chars: list[int] = []
    for origin in find_origins(alone, relative_to=relative_to, fetch=lambda name: relative_to):
        for chunk in chunks_of(0, origin, piece_chars=config.length.max_chars):
            done = refine(chunk)
            classes.update(label for label in done.labels if label is not None)
            chars += done.columns["chars"].tolist()
    if not classes:
        raise ConfigError(f"balance.production: no row of {config.balance.production} has a class.")
    return Production(shares(classes), lengths(chars))
