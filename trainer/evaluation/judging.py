"""What the judging model thought of the adapter: pairs won against a rival, and grades; and whether people think alike."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from adapters.evaluations import JudgeCalibration
from adapters.manifest import EvaluationScore
from trainer.data.chat import Row, answer_of, prompt_of
from trainer.errors import DataError, EvaluationError, RowFault
from trainer.evaluation.compare import Evaluation, SubjectName
from trainer.evaluation.judge import Judge, JudgeConfig, Opinion, Pair, Spent, Verdict
from trainer.evaluation.statistics import Estimate, estimate, mean_of

WORTH: dict[Verdict, float] = {
    "second": 1.0,
    "tie": 0.5,
    "first": 0.0,
}  # of a pair whose second answer is the adapter's


@dataclass(frozen=True)
class Judgement:
    """opinions: the rival's answer first, the adapter's second. grades: None where the judge gave none."""

    config: JudgeConfig
    opinions: tuple[Opinion, ...]
    grades: dict[SubjectName, tuple[int | None, ...]]
    spent: Spent

    @property
    def win_rate(self) -> Estimate | None:
        """A tie is half a win."""
        return estimate(mean_of([WORTH[one.verdict] for one in self.opinions])) if self.opinions else None

    @property
    def position_flips(self) -> float:
        readable = [one for one in self.opinions if one.readable]
        return sum(one.flipped for one in readable) / len(readable) if readable else 0.0

    @property
    def unreadable(self) -> int:
        silent = sum(grade is None for grades in self.grades.values() for grade in grades)
        return sum(not one.readable for one in self.opinions) + silent

    def mean_grade(self, subject: SubjectName) -> Estimate | None:
        """Of 0 to 1, the worst and the best grade there is."""
        known = [(grade - 1) / (self.config.best - 1) for grade in self.grades.get(subject, ()) if grade is not None]
        return estimate(mean_of(known)) if known else None

    def scores(self, task: str) -> list[EvaluationScore]:
        found = [("judge_win_rate", "adapter", self.win_rate, len(self.opinions))]
        found += [("judge_grade", name, self.mean_grade(name), len(self.grades[name])) for name in self.grades]
        return [
            EvaluationScore.model_validate(
                {
                    "task": task,
                    "metric": metric,
                    "subject": subject,
                    "value": round(one.value, 4),
                    "rows": rows,
                    "low": round(one.low, 4),
                    "high": round(one.high, 4),
                }
            )
            for metric, subject, one, rows in found
            if one is not None
        ]

    def document(self) -> dict[str, Any]:
        return {
            "judge": self.config.model,
            "rival": self.config.rival,
            "rubric_sha256": self.config.rubric_sha256,
            "win_rate": asdict(self.win_rate) if self.win_rate else None,
            "position_flips": round(self.position_flips, 4),
            "unreadable": self.unreadable,
            "grades": {name: asdict(mean) for name in self.grades if (mean := self.mean_grade(name)) is not None},
            "spent": asdict(self.spent),
            "opinions": [one.verdict for one in self.opinions],
        }


async def judge_evaluation(
    judge: Judge, evaluation: Evaluation, advance: Callable[[], None] = lambda: None
) -> Judgement:
    """Raises EvaluationError where the rival was not asked."""
    config = judge.config
    rows, opinions = evaluation.rows, []
    if config.pairwise:
        if config.rival not in evaluation.judged:
            raise EvaluationError(f"The judge is to compare with {config.rival}, which was not asked. See --against.")
        theirs, own = evaluation.judged[config.rival], evaluation.judged["adapter"]
        pairs = [
            Pair(prompt_of(row), first.given, second.given, answer_of(row))
            for row, first, second in zip(rows, theirs, own, strict=True)
        ]
        opinions = await judge.compare(pairs, advance)
    grades: dict[SubjectName, tuple[int | None, ...]] = {}
    if config.pointwise:
        for name, judged in evaluation.judged.items():
            asked = [(prompt_of(row), one.given, answer_of(row)) for row, one in zip(rows, judged, strict=True)]
            grades[name] = tuple(await judge.grade(asked, advance))
    return Judgement(config, tuple(opinions), grades, judge.spent)


def requests_needed(config: JudgeConfig, evaluation: Evaluation) -> int:
    rows = len(evaluation.rows)
    return 2 * rows * config.pairwise + rows * len(evaluation.judged) * config.pointwise


@dataclass(frozen=True)
class Label:
    """A person's judgement: which of two answers is better, or whether one is good."""

    prompt: Row
    first: str
    second: str | None  # None: one answer by itself
    human: Literal["first", "second", "tie", "good", "bad"]
    wanted: str = ""


def read_labels(path: Path) -> list[Label]:
    """JSONL with `messages`, `human` and either `first` and `second` (first, second, tie) or `given` (good, bad).

    A marked sheet is such a file too: its `verdict` is taken for `human`, rows without one are left out. Raises DataError.
    """
    labels: list[Label] = []
    faults: list[RowFault] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(path, [RowFault(0, f"cannot be read: {exc}")]) from exc
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            human = row.get("human") or row.get("verdict")
            if human is None and "given" in row:
                continue
            pair = "second" in row
            if human not in (("first", "second", "tie") if pair else ("good", "bad")):
                faults.append(RowFault(number, f"'{human}' is no judgement of {'a pair' if pair else 'an answer'}"))
                continue
            first, second = (row["first"], row["second"]) if pair else (row["given"], None)
            labels.append(Label(row["messages"], first, second, human, row.get("wanted") or ""))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            faults.append(RowFault(number, f"no judgement: {exc}"))
    if faults or not labels:
        raise DataError(path, faults or [RowFault(0, "holds no judgements")])
    return labels


async def calibrate(
    judge: Judge, labels: Sequence[Label], advance: Callable[[], None] = lambda: None
) -> tuple[JudgeCalibration, list[tuple[str, str]]]:
    """How far judge and people agree, and each (person's, judge's) judgement. Raises EvaluationError."""
    pairs = [
        (label, Pair(label.prompt, label.first, label.second, label.wanted))
        for label in labels
        if label.second is not None
    ]
    single = [label for label in labels if label.second is None]
    opinions = await judge.compare([pair for _, pair in pairs], advance)
    grades = await judge.grade([(label.prompt, label.first, label.wanted) for label in single], advance)
    middle = (1 + judge.config.best) / 2
    compared: list[tuple[str, str]] = [
        (label.human, opinion.verdict) for (label, _), opinion in zip(pairs, opinions, strict=True)
    ]
    compared += [
        (label.human, "unreadable" if grade is None else "good" if grade > middle else "bad")
        for label, grade in zip(single, grades, strict=True)
    ]
    agreement, kappa = agree(compared)
    readable = [one for one in opinions if one.readable]
    flips = sum(one.flipped for one in readable) / len(readable) if readable else 0.0
    calibration = JudgeCalibration(
        judge=judge.config.model,
        labels=len(compared),
        agreement=round(agreement, 4),
        kappa=round(kappa, 4),
        position_flips=round(flips, 4),
        rubric_sha256=judge.config.rubric_sha256,
    )
    return calibration, compared


def agree(compared: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """(share alike, Cohen's kappa). Where both always say the same single thing nothing is shown: kappa is 0."""
    people, judged = [one for one, _ in compared], [other for _, other in compared]
    agreement = sum(one == other for one, other in compared) / len(compared)
    if len({*people, *judged}) < 2:
        return agreement, 0.0
    from sklearn.metrics import cohen_kappa_score

    return agreement, float(cohen_kappa_score(people, judged))


def fitting(calibration: JudgeCalibration, config: JudgeConfig) -> JudgeCalibration:
    """Raises EvaluationError where the calibration is of another judge or another rubric."""
    if (calibration.judge, calibration.rubric_sha256) != (config.model, config.rubric_sha256):
        raise EvaluationError(
            f"The calibration is of {calibration.judge} with another rubric or model than {config.model} has now. "
            "Calibrate again: lorikeet eval calibrate"
        )
    return calibration
