"""One fine-tuning job in a worker's hands: its folder, its child, what is told of it, and its way to the gateway."""

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from adapters.blobs import BlobStore, materialise
from adapters.errors import ConflictError, DatabaseError, NotFoundError
from adapters.files import Files, StoredFile
from adapters.home import Home
from adapters.jobs import Job, JobFailure, Jobs, JobStatus, NewEvent
from adapters.names import TunedName
from adapters.peft_format import file_digest
from adapters.registry import Registry
from trainer.job import ADAPTER, FURTHER, JOB_FILE, RUN, SENT, STOPPED, JobSpec, write_whole
from trainer.journal import Entry, JournalReader
from trainer.measured import Measured
from trainer.publishing import GatewayAwayError, Published, Publisher, RefusedError
from trainer.recipe import RECIPES

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
RESULTS_PURPOSE = "fine-tune-results"
BEATS = 3  # reports in one lease, at least
AWAY_S = 5.0  # between two tries to reach a gateway that is away
END_S = 20.0  # a child that was told to end at once gets so long
KEPT = {LOG_FILE, "journal.jsonl", "run.json", JOB_FILE}  # of an ended job's folder; nobody's rows or weights


@dataclass(frozen=True)
class WorkerSettings:
    """base: what the jobs are trained on, as a configuration of `lorikeet train` names it; engine: profile that serves it."""

    base: str
    engine: str = "auto"
    recipes: Path = RECIPES
    poll_s: float = 2.0
    report_s: float = 1.0
    command: tuple[str, ...] = (sys.executable, "-m", "trainer.job")  # trains the folder that is its last argument


@dataclass(frozen=True)
class Services:
    """What a worker works with."""

    home: Home
    registry: Registry
    jobs: Jobs
    files: Files
    blobs: BlobStore  # of adapters
    publisher: Publisher


def jobs_folder(home: Home) -> Path:
    return home.runs / "jobs"


@dataclass
class RunningJob:
    """One job in a worker's hands. Everything that is told of it goes through `report`, which also keeps the lease."""

    services: Services
    settings: WorkerSettings
    worker: str
    job: Job
    base_slug: str
    pool: ThreadPoolExecutor
    child: "subprocess.Popen[bytes] | None" = None
    measured: Measured = field(default_factory=Measured)
    finished: Mapping[str, Any] | None = None  # what the training came to
    failure: JobFailure | None = None
    started_s: float = field(default_factory=time.monotonic)
    first_step: int | None = None
    to_push: deque[int] = field(default_factory=deque)  # steps of checkpoints
    pushing: "tuple[int, Future[Published]] | None" = None
    push_again_s: float = 0.0
    waiting: list[NewEvent] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    further: bool = False
    reported_s: float = 0.0

    @property
    def folder(self) -> Path:
        return jobs_folder(self.services.home) / self.job.id

    def name(self, step: int | None = None) -> TunedName:
        spec = self.job.spec
        return TunedName.of_job(
            self.job.id, base=self.base_slug, tenant=self.job.tenant, suffix=spec.get("suffix", ""), step=step
        )

    def bring_to_an_end(self, stopping: threading.Event, at_once: threading.Event) -> bool:
        """Whether it has ended; if not, it waits for a worker, or for its owner. Raises ConflictError when it is lost."""
        if not self.prepare():
            return True
        pushed = {checkpoint.step for checkpoint in self.services.jobs.checkpoints(self.job.id, limit=10_000)}
        reader = JournalReader(self.folder)
        self.read(reader, pushed)
        if self.finished is None and self.failure is None:
            self.start()
        asked = False
        while self.child is not None:
            code = self.child.poll()
            self.read(reader, pushed)
            self.push_checkpoints()
            job = self.report()
            if job.cancel_requested:
                self.kill()
                self.finish(JobStatus.CANCELLED)
                return True
            if at_once.is_set() and code is None:
                self.kill()
                self.give_back(STOPPED)
                return False
            if (stopping.is_set() or job.pause_requested) and not asked and code is None:
                asked = True
                self.child.terminate()  # it stops at the next checkpoint
            if code is not None:
                self.read(reader, pushed)
                self.kill()
                if self.finished is None and self.failure is None:
                    early = asked and code == -signal.SIGTERM  # asked before it could listen
                    self.give_back(STOPPED if early else code)
                    return False
                break
            time.sleep(min(self.settings.report_s, self.services.jobs.lease_s / BEATS) / 4)
        if self.failure is not None:
            self.report(now=True)
            self.finish(JobStatus.FAILED, failure=self.failure)
            return True
        return self.publish(stopping, at_once)

    # The job's folder and its child

    def prepare(self) -> bool:
        """Bring everything the training needs into the folder; False when the job cannot be trained, which is told."""
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = self.job.spec
        for param in SENT:
            target = self.folder / f"{param}.jsonl"
            if spec.get(param) is None or target.is_file():
                continue
            try:
                file = self.services.files.file(spec[param], tenant=self.job.tenant)
            except NotFoundError as exc:
                self.finish(JobStatus.FAILED, failure=JobFailure(f"invalid_{param}", str(exc), param=param))
                return False
            self.services.files.fetch(file, target)
        start = spec.get("further")
        if start is not None and not (self.folder / FURTHER).is_dir():
            try:
                version = self.services.registry.version(self.job.tenant, start["adapter"], start["version"])
            except NotFoundError as exc:
                self.finish(JobStatus.FAILED, failure=JobFailure("model_not_found", str(exc), param="model"))
                return False
            materialise(self.services.blobs, version.files, self.folder / FURTHER)
        handed_on = JobSpec(
            id=self.job.id,
            adapter=self.name().adapter,
            base=self.settings.base,
            base_slug=self.base_slug,
            home=self.services.home.root,
            method=spec["method"],
            hyperparameters=dict(spec["hyperparameters"]),
            seed=spec["seed"],
            engine=self.settings.engine,
            recipes=self.settings.recipes,
        )
        write_whole(self.folder / JOB_FILE, handed_on.model_dump_json())
        return True

    def start(self) -> None:
        """A session of its own, so that Ctrl-C reaches the worker alone; a pipe that tells it when the worker is gone."""
        with (self.folder / LOG_FILE).open("ab") as log:
            self.child = subprocess.Popen(
                [*self.settings.command, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """The child and what it started are gone when this returns."""
        if self.child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait(END_S)
        if self.child.stdin is not None:
            self.child.stdin.close()
        self.child = None

    def give_back(self, code: int) -> None:
        """code: how the training process ended; STOPPED where that was our wish."""
        if code != STOPPED:
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            logger.warning("training broke off", extra={"job": self.job.id, "reason": why})
            message = f"The training process ended with {why}; it goes on from its last checkpoint"
            self.tell(f"broke-off:{secrets.token_hex(4)}", message, level="warn")
        self.report(now=True)
        self.services.jobs.release(self.job.id, self.worker, attempted=code != STOPPED)

    # What is told

    def tell(self, key: str, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None) -> None:
        self.waiting.append(NewEvent(key, message, level, data))

    def report(self, *, now: bool = False) -> Job:
        """Tell what waits to be told and keep the lease, not more often than is worth it. Raises ConflictError."""
        due_s = min(self.settings.report_s, self.services.jobs.lease_s / BEATS)
        if not now and time.monotonic() - self.reported_s < due_s:
            return self.job
        try:
            self.job = self.services.jobs.report(
                self.job.id, self.worker, progress=self.progress, events=self.waiting, further=self.further
            )
        except DatabaseError:
            logger.warning("registry unreachable, trying again", exc_info=True)
            return self.job
        self.waiting, self.further, self.reported_s = [], False, time.monotonic()
        return self.job

    def finish(
        self, status: JobStatus, *, failure: JobFailure | None = None, result: Mapping[str, Any] | None = None
    ) -> None:
        self.services.jobs.finish(self.job.id, self.worker, status, failure=failure, result=result)
        logger.info("job ended", extra={"job": self.job.id, "status": status.value})
        clean(self.folder)

    def read(self, reader: JournalReader, pushed: set[int]) -> None:
        """Turn what the child has written since the last look into events. pushed: checkpoints that answer already."""
        for entry in reader.news():
            self.take(entry, pushed)

    def take(self, entry: Entry, pushed: set[int]) -> None:
        data = entry.data
        match entry.kind:
            case "phase":
                self.progress["phase"] = data["phase"]
                if data["phase"] == "validating":
                    self._event(entry, "Validating training file")
                else:
                    self._event(entry, "Fine-tuning job started")
            case "settled":
                self.progress["hyperparameters"] = data["hyperparameters"]
                self._event(entry, f"Files validated: {data['rows']} rows to train on")
            case "step":
                self._step(entry)
            case "evaluated":
                self.measured.take(data)
                said = f"Step {data['step']}/{data['total_steps']}: validation loss={data['valid_loss']:.4f}"
                self._event(entry, said, data)
            case "checkpoint" if data["step"] not in pushed and data["step"] not in self.to_push:
                self.to_push.append(data["step"])
            case "finished":
                self.finished = data
                self.progress["phase"] = "publishing"
            case "failed":
                self.failure = JobFailure(**data)

    def _step(self, entry: Entry) -> None:
        data = entry.data
        step, steps = data["step"], data["total_steps"]
        self.measured.take(data)
        self.further |= step > int(self.job.progress.get("step", 0))
        self.progress |= {"step": step, "steps": steps}
        if self.child is not None:
            if self.first_step is None:
                self.first_step, self.started_s = step, time.monotonic()
            elif step > self.first_step:
                per_step_s = (time.monotonic() - self.started_s) / (step - self.first_step)
                self.progress["estimated_finish"] = int(time.time() + per_step_s * (steps - step))
        self._event(entry, f"Step {step}/{steps}: training loss={data['train_loss']:.4f}", data)

    def _event(self, entry: Entry, message: str, data: Mapping[str, Any] | None = None) -> None:
        self.waiting.append(NewEvent(entry.key, message, data=data, created_at=entry.at))

    # To the gateway

    def push_checkpoints(self) -> None:
        """One at a time, in a thread: training and lease do not wait for it."""
        if self.pushing is not None:
            step, future = self.pushing
            if not future.done():
                return
            self.pushing = None
            self._pushed(step, future)
        if self.to_push and time.monotonic() >= self.push_again_s:
            step = self.to_push[0]
            folder = self.folder / f"checkpoint-{step}"
            self.pushing = (step, self.pool.submit(self.services.publisher.push, folder, self.name(step)))

    def _pushed(self, step: int, future: "Future[Published]") -> None:
        name = str(self.name(step))
        try:
            future.result()
        except GatewayAwayError as exc:
            logger.warning("checkpoint waits for the gateway", extra={"job": self.job.id, "reason": str(exc)})
            self.push_again_s = time.monotonic() + AWAY_S
            return
        except RefusedError as exc:
            self.to_push.popleft()
            self.tell(
                f"checkpoint-refused:{step}", f"The checkpoint at step {step} cannot be served: {exc}", level="warn"
            )
            return
        self.to_push.popleft()
        self.services.jobs.add_checkpoint(self.job.id, self.worker, step, model=name, metrics=self.measured.at(step))
        self.tell(f"checkpoint:{step}", f"Checkpoint created at step {step}: {name}")

    def publish(self, stopping: threading.Event, at_once: threading.Event) -> bool:
        """The result to the gateway; however long that is away, the lease is kept meanwhile. Whether the job has ended."""
        assert self.finished is not None  # noqa: S101 - the caller has seen to it
        final: Future[Published] | None = None
        while True:
            job = self.report()
            if job.cancel_requested:
                self.finish(JobStatus.CANCELLED)
                return True
            if self.to_push or self.pushing is not None:
                self.push_checkpoints()
            elif final is None and time.monotonic() >= self.push_again_s:
                final = self.pool.submit(self.services.publisher.push, self.folder / ADAPTER, self.name())
            if final is not None and final.done():
                try:
                    published = final.result()
                    break
                except GatewayAwayError as exc:
                    logger.warning("result waits for the gateway", extra={"job": self.job.id, "reason": str(exc)})
                    self.tell("gateway-away", "The result waits for the server to answer", level="warn")
                    final, self.push_again_s = None, time.monotonic() + AWAY_S
                except RefusedError as exc:
                    why = JobFailure("result_refused", f"The trained adapter cannot be served: {exc}")
                    self.finish(JobStatus.FAILED, failure=why)
                    return True
            if at_once.is_set() or (stopping.is_set() and final is None):
                self.report(now=True)
                self.services.jobs.release(self.job.id, self.worker)
                return False
            time.sleep(min(self.settings.report_s, self.services.jobs.lease_s / BEATS) / 4)
        self._offer_to_the_gate(published)
        results = self._store_results()
        self.tell("model", f"New fine-tuned model created: {self.name()}")
        self.report(now=True)
        metrics = self.finished.get("metrics", {})
        self.finish(
            JobStatus.SUCCEEDED,
            result={
                "model": str(self.name()),
                "version": published.version,
                "trained_tokens": self.finished.get("trained_tokens"),
                "files": [results.id] if results is not None else [],
                "eval_loss": metrics.get("eval_loss"),
            },
        )
        return True

    def _offer_to_the_gate(self, published: Published) -> None:
        """Into production only by the gate, and only where the caller might have promoted by itself."""
        adapter = self.name().adapter
        if published.production:
            self.tell("production", f"'{adapter}' answers with it: it is the first version of that name")
        elif self.job.spec.get("promote"):
            try:
                self.services.publisher.promote(self.name(), published.version)
                self.tell("production", f"'{adapter}' answers with it: the gate let it into production")
            except RefusedError as exc:
                reasons = "; ".join(exc.reasons) or str(exc)
                message = f"'{adapter}' answers as before; the gate keeps version {published.version} out: {reasons}"
                self.tell("production", message, level="warn")
            except GatewayAwayError as exc:
                self.tell("production", f"'{adapter}' answers as before: {exc}", level="warn")

    def _store_results(self) -> StoredFile | None:
        """What was measured, step by step, as a file of the tenant's; None where it has no room for it."""
        filename = f"{self.job.id}-results.csv"
        known = self.services.files.files(self.job.tenant, purpose=RESULTS_PURPOSE, limit=10_000)
        found = next((file for file in known if file.filename == filename), None)
        if found is not None:
            return found
        path = self.folder / "results.csv"
        self.measured.write(path)
        try:
            return self.services.files.create(
                self.job.tenant,
                path,
                filename=filename,
                purpose=RESULTS_PURPOSE,
                digest=file_digest(path),
                actor=self.worker,
            )
        except ConflictError as exc:
            self.tell("results", f"The results file was not kept: {exc}", level="warn")
            return None


def clean(folder: Path) -> None:
    """Remove the tenant's rows and every weight; what tells how the training went stays."""
    if not folder.is_dir():
        return
    run = folder / RUN
    for path in [*folder.iterdir(), *(run.iterdir() if run.is_dir() else ())]:
        if path.name in KEPT or path == run or (path.parent == run and path.suffix in {".svg", ".jsonl"}):
            continue
        if path.is_dir():
            rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
