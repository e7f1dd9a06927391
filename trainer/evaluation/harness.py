"""Tasks of lm-evaluation-harness on local data, answered by a served model through its chat interface.

The harness runs in a process of its own, so that it may live in another environment: its pins do not go with ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.data.chat import Row, answer_of, prompt_of
from trainer.errors import EvaluationError
from trainer.evaluation.compare import SubjectName
from trainer.evaluation.probes import Figure, ProbeResult, figure

MISSING = (
    "lm-evaluation-harness is not installed for {python}. Install it, best in an environment of its own "
    "(pip install 'lm-eval[api]'), and name that one's Python with --harness-python."
)
# How an answer is read -> the harness's filter. The last capital letter A to E, or the last number.
FILTERS = {"letter": r"\b([A-E])\b", "number": r"(-?\d[\d,]*(?:\.\d+)?)"}
PICK = {"letter": 0, "number": -1}


@dataclass(frozen=True)
class HarnessTask:
    """One task: questions with short answers."""

    name: str
    rows: Sequence[Row]
    match: str  # letter or number
    max_tokens: int


def task_document(task: HarnessTask, data: Path) -> dict[str, Any]:
    """The harness's own description of a generating task over a local file."""
    return {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": task.max_tokens, "do_sample": False, "temperature": 0},
        "filter_list": [
            {
                "name": "read",
                "filter": [
                    {
                        "function": "regex",
                        "regex_pattern": FILTERS[task.match],
                        "group_select": PICK[task.match],
                        "fallback": "",
                    },
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [","],
            }
        ],
        "metadata": {"version": 1},
    }


def run_harness(
    tasks: Sequence[HarnessTask],
    *,
    url: str,
    key: str,
    model: str,
    tenant: str | None,
    concurrency: int,
    python: str = sys.executable,
) -> dict[str, list[bool]]:
    """Right or wrong, row by row, of each task. Raises EvaluationError with the harness's last words."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-harness-") as scratch:  # private: its settings hold the key
        folder = Path(scratch)
        for task in tasks:
            data = folder / f"{task.name}.jsonl"
            data.write_text("".join(_line(row) for row in task.rows), encoding="utf-8")
            (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(task_document(task, data)), encoding="utf-8")
        headers = {"Authorization": f"Bearer {key}"} | ({"OpenAI-Project": tenant} if tenant else {})
        settings = {
            "model": "local-chat-completions",
            "model_args": {
                "base_url": f"{url.rstrip('/')}/v1/chat/completions",
                "model": model,
                "num_concurrent": concurrency,
                "header": headers,
            },
            "tasks": [task.name for task in tasks],
            "include_path": str(folder),
            "apply_chat_template": True,
            "log_samples": True,
            "output_path": str(folder / "out"),
        }
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
        done = subprocess.run(
            [python, "-m", "lm_eval", "run", "--config", str(folder / "settings.yaml")],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if "No module named lm_eval" in done.stderr:
            raise EvaluationError(MISSING.format(python=python))
        if done.returncode:
            raise EvaluationError(f"lm-evaluation-harness failed: {' '.join(done.stderr.splitlines()[-3:])[-500:]}")
        return {task.name: _samples(folder / "out", task) for task in tasks}


def as_probe(name: str, right: Mapping[SubjectName, Sequence[bool]]) -> ProbeResult:
    figures: tuple[Figure, ...] = (figure("exact_match", right),)
    return ProbeResult(f"harness-{name}", "forgetting", figures, ())


def _line(row: Row) -> str:
    return json.dumps({"question": prompt_of(row)[-1]["content"], "answer": answer_of(row)}, ensure_ascii=False) + "\n"


def _samples(out: Path, task: HarnessTask) -> list[bool]:
    found = sorted(out.rglob(f"samples_{task.name}_*.jsonl"))
    if not found:
        raise EvaluationError(f"lm-evaluation-harness left no answers of {task.name}.")
    samples = [json.loads(line) for line in found[-1].read_text(encoding="utf-8").splitlines()]
    return [bool(sample["exact_match"]) for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]
