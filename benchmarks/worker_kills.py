"""A fine-tuning job left alone, and the same job with its worker killed ten times: is anything lost, doubled or different?

    python -m benchmarks.worker_kills

Both jobs train the default base model for real, with the same rows and seed, through the whole API: a gateway with registry,
validation and probes, `lorikeet worker` as a process, the training as its child. Only the engine behind the gateway is the
stand-in of the tests, for nothing here depends on what it answers. Kills (SIGKILL to the worker) fall at points drawn from a
seed: some while a worker starts, the others some moments after a step that was drawn. Compared are the files of every version
(final and checkpoints) by digest, the events by key and content, the checkpoints, the results file and the number of versions.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from adapters.database import open_database
from adapters.home import Home, home
from adapters.jobs import Jobs
from adapters.peft_format import WEIGHTS_FILE
from adapters.registry import Registry, VersionStatus, load_secret
from benchmarks.common import save
from gateway.services import base_folder
from gateway.settings import Settings
from scripts.fine_tune import rows

ROWS = 24  # a tenth of them held out: six steps an epoch
LEASE_S = 4.0
STARTING_SHARE = 0.3  # of the kills: while a worker starts
STARTING_S, AFTER_STEP_S = 10.0, 1.5  # longest delay of either kind
PATIENCE_S = 1800.0
RECIPES = """
default: {goldens: 0, batch_rows: 4}
bases: {}
"""  # without goldens: the stand-in could not answer them as the real engine does

console = Console(highlight=False)


@dataclass(frozen=True)
class Kill:
    """after_step: None kills while the worker starts, delay_s after it was started; else delay_s after that step was told."""

    after_step: int | None
    delay_s: float


def plan_kills(seed: int, count: int, steps: int) -> list[Kill]:
    """In the order of the job's steps; those of starting workers in between."""
    drawn = random.Random(seed)  # noqa: S311
    at = sorted(drawn.randrange(1, steps) for _ in range(count))
    return [
        Kill(None, drawn.uniform(0, STARTING_S))
        if drawn.random() < STARTING_SHARE
        else Kill(step, drawn.uniform(0, AFTER_STEP_S))
        for step in at
    ]


class Machine:
    """A data folder with a gateway on it, and workers that are started and killed."""

    def __init__(self, root: Path, base: Path) -> None:
        self.home = Home(root).create()
        self.base = base
        (root / "recipes.yaml").write_text(RECIPES)
        self.gateway = subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.echo_process", str(root), str(base)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.gateway.stdout is not None  # noqa: S101 - it was asked for
        self.url = self.gateway.stdout.readline().strip()
        self.database = open_database(f"sqlite:///{self.home.database}")
        self.registry = Registry(self.database, secret=load_secret(self.home.secret))
        self.jobs = Jobs(self.database)
        self.registry.create_tenant("acme")
        while not httpx.get(f"{self.url}/readyz", timeout=PATIENCE_S).is_success:
            time.sleep(0.1)
        time.sleep(2 * Settings().refresh_s)  # by then it has read of the tenant

    def close(self) -> None:
        self.database.dispose()
        self.gateway.terminate()
        self.gateway.wait(60)

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        headers = {"authorization": f"Bearer {self.home.operator_key.read_text().strip()}", "openai-project": "acme"}
        answer = httpx.request(method, self.url + path, headers=headers, timeout=60, **arguments)
        answer.raise_for_status()
        return answer

    def job(self, epochs: int, seed: int) -> str:
        some = b"".join(rows().splitlines(keepends=True)[:ROWS])
        sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", some)}}
        file = self.ask("POST", "/v1/files", **sent).json()
        asked = {
            "model": self.ask("GET", "/v1/models").json()["data"][0]["id"],
            "training_file": file["id"],
            "seed": seed,
            "hyperparameters": {"n_epochs": epochs, "batch_size": 4, "learning_rate_multiplier": 4},
        }
        return str(self.ask("POST", "/v1/fine_tuning/jobs", json=asked).json()["id"])

    def worker(self) -> "subprocess.Popen[bytes]":
        command = ["worker", "--once", "--gateway", self.url, "--base", str(self.base), "--engine-profile", "test"]
        command += ["--recipes", str(self.home.root / "recipes.yaml")]
        timing = ["--lease-s", str(LEASE_S), "--poll-s", "0.2", "--max-attempts", "20"]
        with (self.home.root / "worker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lorikeet", *command, *timing],
                env=os.environ | {"LORIKEET_HOME": str(self.home.root)},
                stdout=log,
                stderr=log,
            )

    def step(self, job: str) -> int:
        return int(self.jobs.job(job).progress.get("step", 0))


def run(root: Path, base: Path, kills: list[Kill], *, epochs: int, seed: int) -> dict[str, Any]:
    """One job to its end. What it left, for comparison."""
    began = time.monotonic()
    machine = Machine(root, base)
    try:
        job = machine.job(epochs, seed)
        done_kills = []
        for kill in kills:
            worker = machine.worker()
            if kill.after_step is not None:
                while machine.step(job) < kill.after_step and worker.poll() is None:
                    time.sleep(0.02)
            ends_s = time.monotonic() + kill.delay_s
            while time.monotonic() < ends_s and worker.poll() is None:
                time.sleep(0.005)
            alive = worker.poll() is None
            at = machine.step(job)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            status = machine.jobs.job(job).status.value
            done_kills.append({"after_step": kill.after_step, "at_step": at, "alive": alive, "status": status})
            console.print(f"  killed at step {at} ({'starting' if kill.after_step is None else 'training'})")
            time.sleep(LEASE_S)
        ends_s = time.monotonic() + PATIENCE_S
        while not machine.jobs.job(job).finished_at and time.monotonic() < ends_s:
            machine.worker().wait(PATIENCE_S)
            time.sleep(LEASE_S / 4)
        return left_behind(machine, job) | {"kills": done_kills, "seconds": round(time.monotonic() - began, 1)}
    finally:
        machine.close()


def left_behind(machine: Machine, job_id: str) -> dict[str, Any]:
    job = machine.jobs.job(job_id)
    events = machine.jobs.events(job_id, limit=10_000)
    told = {event.key: [event.message, event.data] for event in events if event.key != "created"}
    mine = job_id.removeprefix("ftjob-")[:8]
    snapshot = machine.registry.snapshot()
    weights = {
        name.name.replace(mine, "JOB"): snapshot.versions[name.tenant, name.adapter, name.version].files[WEIGHTS_FILE]
        for name in snapshot.names.values()
    }
    results = (job.result or {}).get("files") or []
    return {
        "status": job.status.value,
        "failure": vars(job.failure) if job.failure else None,
        "events": {key: _without(mine, value) for key, value in sorted(told.items())},
        "events_told": len(events),
        "checkpoints": [[one.step, one.metrics] for one in machine.jobs.checkpoints(job_id, limit=1000)],
        "weights": weights,
        "versions": sum(one.status is not VersionStatus.RETIRED for one in snapshot.versions.values()),
        "results": [machine.ask("GET", f"/v1/files/{file}/content").text for file in results],
    }


def _without(mine: str, value: Any) -> Any:
    message, data = value
    return [message.replace(mine, "JOB"), data]


def compare(whole: dict[str, Any], broken: dict[str, Any]) -> dict[str, bool]:
    return {
        "both succeeded": whole["status"] == broken["status"] == "succeeded",
        "every kill hit a live worker": all(kill["alive"] for kill in broken["kills"]),
        "weights of every version equal": whole["weights"] == broken["weights"] and bool(whole["weights"]),
        "as many versions": whole["versions"] == broken["versions"] == len(whole["weights"]),
        "events equal": whole["events"] == broken["events"],
        "no event twice": len(broken["events"]) + 1 == broken["events_told"] == whole["events_told"],
        "checkpoints equal": whole["checkpoints"] == broken["checkpoints"],
        "one equal results file": whole["results"] == broken["results"] and len(broken["results"]) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8, help="of six steps each; as many checkpoints")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--base", type=Path, help="prepared base model; default: the configured one")
    given = parser.parse_args()
    base = given.base or base_folder(Settings())
    root = home().root / "worker-kills"
    shutil.rmtree(root, ignore_errors=True)
    console.print("Undisturbed")
    whole = run(root / "whole", base, [], epochs=given.epochs, seed=given.seed)
    steps = sum(key.startswith("step:") for key in whole["events"])
    console.print(f"  {whole['status']} after {steps} steps, {whole['seconds']} s\nKilled {given.kills} times")
    kills = plan_kills(given.seed, given.kills, steps)
    broken = run(root / "killed", base, kills, epochs=given.epochs, seed=given.seed)
    verdicts = compare(whole, broken)
    for what, holds in verdicts.items():
        console.print(f"  {'yes' if holds else '[red]NO[/red]':3} {what}")
    path = save(
        "worker_kills",
        {
            "command": f"python -m benchmarks.worker_kills --kills {given.kills} --epochs {given.epochs} --seed {given.seed}",
            "engine": "stand-in (echo); the training is real",
            "base": base.name,
            "steps": steps,
            "verdicts": verdicts,
            "whole": whole,
            "killed": broken,
        },
    )
    console.print(f"Raw: {path.relative_to(Path.cwd())}" if path.is_relative_to(Path.cwd()) else str(path))
    if all(verdicts.values()):
        shutil.rmtree(root, ignore_errors=True)
    else:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
