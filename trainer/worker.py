"""`lorikeet worker`: claim a fine-tuning job, have it trained in a child process, and bring what comes out to the gateway.

The worker holds the lease and does everything that is told outside; the child only trains, in the job's folder. What the child
tells lies in the folder's journal, so whoever claims the job after a kill tells the rest of it, and each thing once.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapters.base import read_base
from adapters.errors import AdapterError, BlobError, ConflictError, DatabaseError, NotFoundError
from adapters.jobs import ENDED, Job, JobFailure, JobStatus
from trainer.recipe import load_recipes
from trainer.running_job import AWAY_S, RunningJob, Services, WorkerSettings, clean, jobs_folder

logger = logging.getLogger(__name__)


def new_worker_id() -> str:
    return f"worker:{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


class Worker:
    """One job at a time, until it is stopped."""

    def __init__(self, services: Services, settings: WorkerSettings, base: Path, *, id: str | None = None) -> None:  # noqa: A002
        """base: the prepared model folder. Raises BaseModelError, ConfigError."""
        self.id = id or new_worker_id()
        self._services = services
        self._settings = settings
        self._base = read_base(base)
        load_recipes(settings.recipes)
        self._stopping = threading.Event()
        self._at_once = threading.Event()

    def stop(self) -> None:
        """End after the next checkpoint; asked twice, at once. Either way the job goes on with the next worker."""
        (self._at_once if self._stopping.is_set() else self._stopping).set()

    def run(self, *, once: bool = False) -> int:
        """Work until stopped; with `once`, until no job waits. How many jobs were brought to an end."""
        ended = 0
        self.tidy()
        while not self._stopping.is_set():
            job = self._claim()
            if job is None:
                if once:
                    break
                self._stopping.wait(self._settings.poll_s)
                continue
            logger.info("job claimed", extra={"job": job.id, "tenant": job.tenant, "attempt": job.attempts})
            ended += self._attend(job)
        return ended

    def tidy(self) -> None:
        """Remove rows and weights of jobs that ended while no worker had them, such as cancelled ones."""
        for folder in jobs_folder(self._services.home).glob("ftjob-*"):
            with contextlib.suppress(NotFoundError):
                if self._services.jobs.job(folder.name).status in ENDED:
                    clean(folder)

    def _claim(self) -> Job | None:
        try:
            return self._services.jobs.claim(self.id, bases=[self._base.fingerprint.weights_digest])
        except DatabaseError:
            logger.warning("registry unreachable, trying again", exc_info=True)
            return None

    def _attend(self, job: Job) -> bool:
        """Whether the job has ended."""
        with ThreadPoolExecutor(1, thread_name_prefix="publish") as pool:
            care = RunningJob(self._services, self._settings, self.id, job, self._base.slug, pool)
            try:
                return care.bring_to_an_end(self._stopping, self._at_once)
            except ConflictError:
                logger.warning("job lost to another worker", extra={"job": job.id})
                return False
            except (DatabaseError, BlobError):
                logger.exception("job left to the next worker", extra={"job": job.id})
                self._stopping.wait(AWAY_S)
                return False
            except AdapterError as exc:  # such as an archived tenant: no worker could do better
                logger.exception("job failed", extra={"job": job.id})
                care.finish(JobStatus.FAILED, failure=JobFailure("job_failed", str(exc)))
                return True
            finally:
                care.kill()


def follow_signals(worker: Worker) -> None:
    """SIGTERM and Ctrl-C: stop at the next checkpoint, and the second time at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
