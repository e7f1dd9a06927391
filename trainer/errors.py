"""Everything the trainer can refuse or fail at.

TrainerError
├── ConfigError          a configuration file or a --set that cannot be used
├── DataError            rows that cannot be trained on; names file and line of each
├── LicenceError         terms that do not allow what is to be built
├── FetchError           a data set that could not be downloaded or read from its package
├── TemplateError        the chat template cannot be masked without changing what it renders
├── TrainingError        a run that cannot start or be resumed
└── EvaluationError      a served model could not be scored
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 5  # a broken converter breaks every row; the first few tell why


class TrainerError(Exception):
    """Root of the tree. The message tells what is wrong, where, and what to do."""


class ConfigError(TrainerError):
    pass


@dataclass(frozen=True)
class RowFault:
    line: int  # counted from 1
    message: str


class DataError(TrainerError):
    """Rows that cannot be used. `faults` holds all of them, the message the first few."""

    def __init__(self, path: Path, faults: Sequence[RowFault]) -> None:
        self.path = path
        self.faults = tuple(faults)
        lines = [f"{path}:{fault.line}: {fault.message}" for fault in self.faults[:SHOWN]]
        if len(self.faults) > SHOWN:
            lines.append(f"… and {len(self.faults) - SHOWN} more faulty rows")
        super().__init__("\n".join(lines))


class LicenceError(TrainerError):
    pass


class FetchError(TrainerError):
    pass


class TemplateError(TrainerError):
    pass


class TrainingError(TrainerError):
    pass


class EvaluationError(TrainerError):
    pass
