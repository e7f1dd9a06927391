"""What a job has measured, step by step, as its checkpoints and its results file tell it."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The journal's name -> OpenAI's in a results file, and of a checkpoint's metrics.
COLUMNS = {
    "train_loss": "train_loss",
    "train_mean_token_accuracy": "train_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
CHECKPOINT_NAMES = {"valid_loss": "full_valid_loss", "valid_mean_token_accuracy": "full_valid_mean_token_accuracy"}


class Measured:
    """Grows as the journal is read; reading it again changes nothing."""

    def __init__(self) -> None:
        self._by_step: dict[int, dict[str, float]] = {}

    def take(self, data: Mapping[str, Any]) -> None:
        """data: of a journal entry about a step."""
        self._by_step.setdefault(data["step"], {}).update({name: data[name] for name in COLUMNS if name in data})

    def at(self, step: int) -> dict[str, float]:
        """What was last measured up to a step, as a checkpoint's metrics. Evaluations are of the whole file."""
        found: dict[str, float] = {"step": step}
        for before in sorted(self._by_step):
            if before <= step:
                found |= self._by_step[before]
        return found | {whole: found[name] for name, whole in CHECKPOINT_NAMES.items() if name in found}

    def write(self, path: Path) -> None:
        """CSV, a row for each step."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *COLUMNS.values()])
            for step in sorted(self._by_step):
                writer.writerow([step, *(self._by_step[step].get(name, "") for name in COLUMNS)])
