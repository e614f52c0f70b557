"""Launchers on this machine: each starts trials and returns their jobs at once."""

import json
import logging
import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from autotune.config.overrides import typed_target
from autotune.config.schema import Config, InlineConfig, LocalConfig
from autotune.measure import progress
from autotune.measure.slot import Slot
from autotune.sweep import worker
from autotune.sweep.worker import TrialSpec
from autotune.system.files import last_line
from autotune.system.leases import devices
from autotune.system.process import Forked, ForkServer

log = logging.getLogger(__name__)


class Job(Protocol):
    @property
    def node(self) -> str:
        """The node that it runs on; empty on this machine, or if it is not known."""

    @property
    def lost(self) -> bool:
        """Tell of a job that is done whether something else than its trial ended it."""

    def done(self) -> bool: ...

    def wait(self, timeout_s: float) -> None:
        """Return when it is done, or after `timeout_s`."""

    def cancel(self) -> None:
        """End it and all that it started; returns when that is so, or is under way on another machine."""

    def reason(self) -> str:
        """Say why it left no result, in one line."""


class Launcher:
    """Runs trials; as it stands, on this machine and no longer than this process."""

    n_jobs: int  # trials at a time
    shares = False  # True: a server may stay for the next trial

    def submit(self, trials: Sequence[TrialSpec]) -> list[Job]:
        """Start `trials`, whose folders exist: see `begin`."""
        raise NotImplementedError

    def nodes(self) -> list[str]:
        """Nodes that are to show what they can before they get trials."""
        return []

    def set_aside(self, node: str) -> None:
        """Start nothing on `node` any more, unless there is no other."""

    def attach(self, folder: Path) -> Job | None:
        """The job that still runs the trial in `folder` for an earlier sweeping process, if there is one."""
        return None

    def close(self) -> None:
        """End the servers that stay between trials, once no trial runs."""


def make_launcher(config: Config) -> Launcher:
    """The launcher that `launcher=` names. Raises InputError."""
    launcher_class, settings = typed_target(config.launcher, "launcher")
    launcher: Launcher = launcher_class(settings, config.gpus)
    return launcher


def begin(launcher: Launcher, trials: Sequence[TrialSpec]) -> list[Job]:
    """Start `trials` in folders that hold nothing of an earlier start's end; returns their jobs."""
    for trial in trials:
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / "result.json").unlink(missing_ok=True)
        progress.begin(trial.folder)
    return launcher.submit(trials) if trials else []


class Inline(Launcher):
    """One trial at a time, in this process."""

    Config = InlineConfig
    n_jobs = 1
    shares = True

    def __init__(self, config: InlineConfig, gpus: Any) -> None:
        """`gpus` are leased by the trials themselves."""
        self._slot = Slot(shares=True)

    def submit(self, trials: Sequence[TrialSpec]) -> list[Job]:
        return [Thread(trial, self._slot) for trial in trials]

    def close(self) -> None:
        self._slot.close()


class Thread:
    """A trial beside the sweep, which watches it."""

    node, lost = "", False

    def __init__(self, trial: TrialSpec, slot: Slot) -> None:
        self._folder = trial.folder
        self._why = ""
        self._thread = threading.Thread(target=self._run, args=(trial, slot))
        self._thread.start()

    def _run(self, trial: TrialSpec, slot: Slot) -> None:
        self._why = worker.run(trial, slot)

    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def cancel(self) -> None:
        progress.stop(self._folder)
        self._thread.join()

    def reason(self) -> str:
        return self._why or "no result.json"


class LocalProcesses(Launcher):
    """Trials side by side on this machine, in processes that end with this one; the trials lease their GPUs."""

    Config = LocalConfig
    shares = True

    def __init__(self, config: LocalConfig, gpus: Any) -> None:
        self.n_jobs = config.n_jobs or len(devices(gpus))
        self._server: ForkServer | None = None  # a process that has done the imports
        self._idle: list[Forked] = []  # with a server for the next trial

    def submit(self, trials: Sequence[TrialSpec]) -> list[Job]:
        jobs: list[Job] = []
        for trial in trials:
            server = self._running_server(trial)
            process = next((one for one in self._taken() if one.exit_code() is None), None) or server.fork()
            jobs.append(LocalJob(trial, process, server.log, self._idle))
        return jobs

    def close(self) -> None:
        for process in self._taken():
            process.stop()

    def _taken(self) -> Iterator[Forked]:
        while self._idle:
            yield self._idle.pop()

    def _running_server(self, trial: TrialSpec) -> ForkServer:
        if self._server is None or not self._server.runs():
            backend = trial.config.backend["_target_"].rpartition(".")[0]
            command = [sys.executable, "-m", "autotune.sweep.worker", backend]
            self._server = ForkServer(command, trial.folder.parent / ".workers.log", stop_timeout_s=30)
        return self._server


class LocalJob:
    """A trial in a process, which joins `idle` if the trial's server stays."""

    node = ""

    def __init__(self, trial: TrialSpec, process: Forked, server_log: Path, idle: list[Forked]) -> None:
        self._process, self._idle = process, idle
        self._logs = (trial.folder / worker.LOG, server_log)
        self._answer: str | None = None
        process.send(pickle.dumps(trial))

    @property
    def lost(self) -> bool:
        return self._process.lost

    def done(self) -> bool:
        self.wait(0)
        return self._answer is not None or self._process.exit_code() is not None

    def wait(self, timeout_s: float) -> None:
        if self._answer is None and (answer := self._process.answer(timeout_s)):
            self._answer = json.loads(answer)
            self._idle.append(self._process)

    def cancel(self) -> None:
        self._process.stop()

    def reason(self) -> str:
        if self._answer is not None:
            return self._answer or "no result.json"
        last = next(filter(None, (last_line(log, "") for log in self._logs)), "no output")
        return f"the trial's process ended with {self._process.exit_code()}: {last}"
