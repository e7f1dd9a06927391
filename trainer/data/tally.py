"""What is counted while rows are refined, one chunk after the other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.data.agreement import Pair
from trainer.data.refine import Refined

MOST_CLASSES = 1000


@dataclass
class Tally:
    """Sums over chunks."""

    read: Counter[int] = field(default_factory=Counter)  # by source
    pieces: int = 0
    normalised: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (step, reason without its numbers)
    personal: Counter[str] = field(default_factory=Counter)
    personal_rows: int = 0
    contaminated: Counter[str] = field(default_factory=Counter)
    agreed: Counter[tuple[Pair, Pair]] = field(default_factory=Counter)
    classes: dict[str, int] = field(default_factory=dict)  # name -> number in the column `label`, from 1 on
    unclassed: int = 0

    def add(self, done: Refined) -> None:
        self.read[done.source] += done.read
        self.pieces += done.pieces
        self.normalised += done.normalised
        self.reasons += done.reasons
        self.personal += done.personal
        self.personal_rows += done.personal_rows
        self.contaminated += done.contaminated
        self.agreed += done.agreed

    def class_numbers(self, labels: Sequence[str | None]) -> NDArray[np.uint16]:
        """A number for each label, 0 for none and for those beyond MOST_CLASSES."""
        numbers = np.zeros(len(labels), dtype=np.uint16)
        for place, label in enumerate(labels):
            if label is not None and (label in self.classes or len(self.classes) < MOST_CLASSES):
                numbers[place] = self.classes.setdefault(label, len(self.classes) + 1)
        self.unclassed += int((numbers == 0).sum())
        return numbers

    @property
    def rows(self) -> int:
        """Rows that came to the first step."""
        return sum(self.read.values()) + self.pieces

    def most_common(self) -> str:
        """Why nothing is left, for an error."""
        if not self.reasons:
            return "holds no rows"
        (step, reason), count = self.reasons.most_common(1)[0]
        return f"nothing is left of {self.rows} rows; {count} fell at the step '{step}': {reason}"
