"""Trains like `trainer.job` does, but in no time and without a model: twelve steps, a checkpoint every fourth.

A file `wait-at` in the folder holds it at the step that stands there until the file is gone.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from tests.factories import make_adapter
from trainer.job import FAILED, STOPPED, end_with_the_worker, tell
from trainer.journal import Journal

STEPS, EVERY = 12, 4


def main(folder: Path) -> int:
    spec = json.loads((folder / "job.json").read_text())
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=end_with_the_worker, daemon=True).start()
    journal = Journal(folder)
    tell(journal, "phase:validating", "phase", {"phase": "validating"})
    if "unlearnable" in (folder / "training_file.jsonl").read_text():
        wrong = {"code": "invalid_training_file", "message": "Line 2: no", "param": "training_file", "line": 2}
        tell(journal, "failed", "failed", wrong)
        return FAILED
    tell(journal, "settled", "settled", {"hyperparameters": {"n_epochs": 3, "batch_size": 1}, "rows": 3})
    tell(journal, "phase:training", "phase", {"phase": "training"})
    done = max([int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")], default=0)
    if done:
        tell(journal, f"checkpoint:{done}", "checkpoint", {"step": done})
    for step in range(done + 1, STEPS + 1):
        while (hold := folder / "wait-at").is_file() and int(hold.read_text()) == step:
            time.sleep(0.01)
        facts = {"step": step, "total_steps": STEPS}
        tell(journal, f"step:{step}", "step", facts | {"train_loss": 10 - step / 2, "train_mean_token_accuracy": 0.5})
        if step % EVERY == 0:
            tell(journal, f"evaluated:{step}", "evaluated", facts | {"valid_loss": 11 - step / 2})
            make_adapter(folder / f"checkpoint-{step}", Path(spec["base"]), seed=step)
            tell(journal, f"checkpoint:{step}", "checkpoint", {"step": step})
            if stop.is_set():
                return STOPPED
    make_adapter(folder / "adapter", Path(spec["base"]), seed=int(spec["id"][-6:], 16))
    tell(journal, "finished", "finished", {"metrics": {"eval_loss": 5.0}, "trained_tokens": 123})
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main(Path(sys.argv[1])))
