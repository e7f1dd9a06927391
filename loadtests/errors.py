"""Everything that can keep a load test from being run or read, as one tree.

LoadTestError
├── ScenarioError     a scenario file that cannot be run; carries every fault with its place
├── ObjectiveError    an objective that cannot be understood
├── TargetError       the server to measure cannot be reached, or refuses the key
│   └── NoModelsError     it answers, but does not list its models
└── RecordError       the records of an earlier run cannot be read

A measured failure (an error answer, a broken stream, a missed objective) is a result, not an error.
"""

from collections.abc import Sequence


class LoadTestError(Exception):
    """Root of the tree. The message says what is wrong, where, and what to do."""


class ScenarioError(LoadTestError):
    """A scenario that cannot be run. `faults` holds every fault found, each with its place."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "".join(f"\n  {fault}" for fault in self.faults)
        super().__init__(f"{source} is not a scenario that can be run:{lines}")


class ObjectiveError(LoadTestError):
    pass


class TargetError(LoadTestError):
    pass


class NoModelsError(TargetError):
    pass


class RecordError(LoadTestError):
    pass
