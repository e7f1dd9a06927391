"""Start one engine process, watch it, bring it back: the supervisor of vLLM."""

import asyncio
import contextlib
import getpass
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gateway.engines import launch, leftovers
from gateway.engines.profile import EngineProfile, engine_command, engine_environment, find_preloads
from gateway.engines.protocol import Engine
from gateway.engines.vllm import VllmEngine
from gateway.errors import EngineStartError

logger = logging.getLogger(__name__)

HEALTH_POLL_S = 0.2
STABLE_S = 60.0  # an engine that was ready this long has nothing to do with the failures before it
LONGEST_BACKOFF_S = 60.0
STOP_MARGIN_S = 10.0  # beyond the engine's own shutdown time-out
SOCKET_PATH_BYTES = 107  # struct sockaddr_un.sun_path, less the end
_TAIL_LINES = 12

OnReady = Callable[[Engine], Awaitable[None]]


def failures_after(failures: int, *, ready_s: float) -> int:
    """How many times in a row the engine has failed, after one more exit; ready_s: how long it had been ready."""
    return 0 if ready_s >= STABLE_S else failures + 1


def backoff_s(failures: int) -> float:
    """The pause before the next start: none after a stable run, then 1, 2, 4 … 60 s."""
    return 0.0 if failures == 0 else min(LONGEST_BACKOFF_S, 2.0 ** min(failures - 1, 16))


class EngineProcess:
    """One vLLM in a process group of its own. Implements `protocol.EngineHost`.

    Whatever way it ends, code 0 included, it is started again; `on_ready` then gives it its adapters back before the
    state becomes ready. `stop`, and the next `start` after a killed gateway, leave no process, socket, shared memory
    or temporary folder of it.
    """

    def __init__(
        self,
        profile: EngineProfile,
        model: Path,
        run_dir: Path,
        log: Path,
        *,
        id: str = "engine-0",  # noqa: A002
        on_ready: OnReady | None = None,
        command: Sequence[str] | None = None,
        backoff: Callable[[int], float] = backoff_s,
        stop_margin_s: float = STOP_MARGIN_S,
    ) -> None:
        """run_dir holds the socket and the record, both named after the id. command: instead of the profile's."""
        self.id = id
        self.profile = profile
        self.socket = run_dir.absolute() / f"{id}.sock"
        self.log = log
        self.on_ready = on_ready
        self.restarts = 0
        self.last_exit: int | None = None
        self.engine: Engine = VllmEngine(id, self.socket)
        self._command = tuple(command or engine_command(profile, model=model.absolute(), socket=self.socket))
        self._backoff = backoff
        self._stop_margin_s = stop_margin_s
        self._record = run_dir.absolute() / f"{id}.json"
        self._state = "stopped"
        self._changed = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._ready_at: float | None = None
        self._log_start = 0

    @property
    def state(self) -> str:
        """stopped, starting, restoring, ready, restarting (it ended), failed (the last start did not come up)."""
        return self._state

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    async def reached(self, state: str) -> None:
        """Return once the engine is in the state."""
        while self._state != state:
            await self._changed.wait()

    async def start(self) -> None:
        """Returns when the engine is ready, and keeps it so from then on.

        Raises EngineStartError when it does not come up; it is then tried again, with pauses, until `stop`.
        """
        if self._watcher is not None:
            raise EngineStartError(f"Engine '{self.id}' has been started already.")
        await asyncio.to_thread(self._claim)
        self._set("starting")
        try:
            await self._bring_up()
        except BaseException as exc:
            await self._tear_down()
            self._set("failed")
            if isinstance(exc, Exception):
                self._keep_up(failures=1)
            raise
        self._keep_up(failures=0)

    def _keep_up(self, failures: int) -> None:
        self._watcher = asyncio.create_task(self._watch(failures), name=f"watch {self.id}")

    async def stop(self) -> None:
        """SIGTERM, time to finish, SIGKILL for the group. Nothing is left behind."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        await self._tear_down(grace_s=self.profile.shutdown_timeout_s + self._stop_margin_s)
        await self.engine.close()
        self._set("stopped")

    async def restart(self, reason: str) -> None:
        """Kill the engine now: whoever asks has found that its answers are no good. The watch brings it back."""
        if self._state not in ("ready", "restoring") or self._watcher is None:
            return
        logger.warning("engine is restarted", extra={"engine": self.id, "reason": reason})
        self._set("restarting")
        await asyncio.to_thread(leftovers.note_segments, self._record, self.socket)
        self._signal_group(signal.SIGKILL)

    def _set(self, state: str) -> None:
        if state != self._state:
            logger.info("engine state", extra={"engine": self.id, "state": state})
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    def _claim(self) -> None:
        """Make sure that no other gateway runs this engine."""
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES:
            raise EngineStartError(
                f"The path of the engine's socket is longer than {SOCKET_PATH_BYTES} bytes: {self.socket}. "
                "Choose a shorter LORIKEET_HOME."
            )
        record = leftovers.read_record(self._record)
        if record is not None and record.owner_lives:
            raise EngineStartError(
                f"Engine '{self.id}' is already run by process {record.owner_pid} ({self._record}). "
                "Stop it with `lorikeet down`, or choose another LORIKEET_HOME."
            )

    async def _bring_up(self) -> None:
        await self._spawn()
        try:
            async with asyncio.timeout(self.profile.start_timeout_s):
                await self._unless_it_exits(self._until_healthy())
                await asyncio.to_thread(leftovers.note_segments, self._record, self.socket)
                self._set("restoring")
                if self.on_ready is not None:
                    await self._unless_it_exits(self.on_ready(self.engine))
        except TimeoutError as exc:
            raise self._start_error(f"was not ready after {self.profile.start_timeout_s:g} s") from exc
        self._ready_at = asyncio.get_running_loop().time()
        self._set("ready")

    async def _spawn(self) -> None:
        environment = await asyncio.to_thread(self._prepare)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid())]
            self._process = await asyncio.create_subprocess_exec(
                *launcher,
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                cwd=environment["TMPDIR"],
                env=environment,
                start_new_session=True,
            )
        record = leftovers.read_record(self._record) or leftovers.Record.mine()
        leftovers.write_record(self._record, record.with_engine(self._process.pid))
        logger.info("engine started", extra={"engine": self.id, "pid": self._process.pid, "log": self.log.name})

    def _prepare(self) -> dict[str, str]:
        """Clear away what was there before, and return the environment of what comes."""
        self.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        killed = leftovers.sweep(self._record, self.socket)
        if killed:
            logger.warning("left-over engine processes were killed", extra={"engine": self.id, "processes": killed})
        scratch = leftovers.make_scratch()
        leftovers.write_record(self._record, replace(leftovers.Record.mine(), scratch=str(scratch)))
        environment = engine_environment(self.profile, os.environ, preload=find_preloads(self.profile))
        # Where torch would keep it without a TMPDIR of ours: compiled code is worth keeping.
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        return environment | {"TMPDIR": str(scratch), leftovers.MARK: str(self.socket)}

    async def _until_healthy(self) -> None:
        while not await self.engine.healthy():  # noqa: ASYNC110  another process tells no event of ours
            await asyncio.sleep(HEALTH_POLL_S)

    async def _unless_it_exits(self, work: Awaitable[None]) -> None:
        """Await the work; an exit of the process meanwhile ends it with EngineStartError."""
        assert self._process is not None  # noqa: S101
        doing = asyncio.ensure_future(work)
        exiting = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({doing, exiting}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise self._start_error(f"exited with code {self._process.returncode} before it was ready")
            doing.result()
        finally:
            doing.cancel()
            exiting.cancel()
            await asyncio.gather(doing, exiting, return_exceptions=True)

    async def _watch(self, failures: int) -> None:
        if failures:
            failures = await self._revive(failures)
        while self._process is not None:
            self.last_exit = await self._process.wait()
            loop = asyncio.get_running_loop()
            failures = failures_after(failures, ready_s=loop.time() - (self._ready_at or loop.time()))
            logger.error("engine exited", extra={"engine": self.id, "code": self.last_exit, "failures": failures})
            self._set("restarting")
            failures = await self._revive(failures)
            self.restarts += 1

    async def _revive(self, failures: int) -> int:
        """Start it until it is ready; failures in a row, before and after."""
        while self._state != "ready":
            await asyncio.to_thread(leftovers.sweep, self._record, self.socket)
            await asyncio.sleep(self._backoff(failures))
            self._set("restarting")
            try:
                await self._bring_up()
            except Exception:
                logger.exception("engine did not come back", extra={"engine": self.id, "failures": failures})
                await self._tear_down()
                failures += 1
                self._set("failed")
        return failures

    async def _tear_down(self, *, grace_s: float = 0.0) -> None:
        """End the process and everything of it."""
        if self._process is not None and self._process.returncode is None:
            await asyncio.to_thread(leftovers.note_segments, self._record, self.socket)
            if grace_s:
                with contextlib.suppress(ProcessLookupError):
                    self._process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), grace_s)
            if self._process.returncode is None:
                self._signal_group(signal.SIGKILL)
                await self._process.wait()
        if self._process is not None:
            await asyncio.to_thread(leftovers.sweep, self._record, self.socket)
        self._process = None

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _start_error(self, what: str) -> EngineStartError:
        tail = "\n".join(_tail(self.log, self._log_start))
        return EngineStartError(f"Engine '{self.id}' {what}. Its log is {self.log}; it ends with:\n{tail}")


def _tail(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
