"""Where trials run: what `launcher=` names. Each hands back a job at once or when it is done."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher as HydraLauncher
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from autotune.live.leases import devices
from autotune.process import GuardedProcess
from autotune.text import one_line


class Job(Protocol):
    def done(self) -> bool: ...

    def cancel(self) -> None:
        """End it and all that it started; returns when that is so."""

    def reason(self) -> str:
        """Why it left no result, in one line."""


class Launcher(Protocol):
    n_jobs: int  # trials at a time

    def submit(self, number: int, overrides: Sequence[str], folder: Path) -> Job:
        """Start the trial that `overrides` compose; it writes its result.json to `folder`."""


class Inline:
    """One trial at a time through Hydra's own launcher, which returns when the trial is done."""

    n_jobs = 1

    def __init__(self, hydra_launcher: HydraLauncher, job: DictConfig, gpus: Any, **_: Any) -> None:
        self._launcher = hydra_launcher

    def submit(self, number: int, overrides: Sequence[str], folder: Path) -> "Done":
        try:
            # The trial's folder is below the study's, and Hydra wants the two apart.
            returned = self._launcher.launch(
                [[*overrides, f"hydra.sweep.subdir={folder.name}"]], initial_job_idx=number
            )
            return Done(returned[0]._return_value)
        except (HydraException, OmegaConfBaseException) as error:
            return Done(error)


class Done:
    def __init__(self, returned: Any) -> None:
        self._returned = returned

    def done(self) -> bool:
        return True

    def cancel(self) -> None:
        """Nothing runs."""

    def reason(self) -> str:
        return f"{type(self._returned).__name__}: {one_line(self._returned)}"


class LocalProcesses:
    """Trials side by side, each `python -m autotune …` in a process of its own; the trial leases its GPUs."""

    def __init__(
        self, hydra_launcher: HydraLauncher, job: DictConfig, gpus: Any, n_jobs: int | None = None, **_: Any
    ) -> None:
        self.n_jobs = n_jobs or len(devices(gpus))
        sources = job.hydra.runtime.config_sources
        self._config_dirs = [source.path for source in sources if source.provider == "command-line"]

    def submit(self, number: int, overrides: Sequence[str], folder: Path) -> "LocalJob":
        command = [sys.executable, "-m", "autotune", *overrides, f"hydra.run.dir={folder}", "tracking.enabled=false"]
        for directory in self._config_dirs:
            command += ["--config-dir", directory]
        folder.mkdir(parents=True, exist_ok=True)
        return LocalJob(GuardedProcess(command, folder / "trial.log", {}, stop_timeout_s=30), folder / "trial.log")


class LocalJob:
    def __init__(self, process: GuardedProcess, log: Path) -> None:
        self._process = process
        self._log = log

    def done(self) -> bool:
        return self._process.exit_code() is not None

    def cancel(self) -> None:
        self._process.stop()

    def reason(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"the trial's process ended with {self._process.exit_code()}: {lines[-1] if lines else 'no output'}"
