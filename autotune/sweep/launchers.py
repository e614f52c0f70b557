"""Where trials run: what `launcher=` names. Each hands back a job at once or when it is done."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from autotune.errors import AutotuneError
from autotune.leases import devices
from autotune.process import GuardedProcess
from autotune.schema import Config
from autotune.text import one_line
from autotune.trial import run


class Job(Protocol):
    def done(self) -> bool: ...

    def cancel(self) -> None:
        """End it and all that it started; returns when that is so."""

    def reason(self) -> str:
        """Why it left no result, in one line."""


@dataclass(frozen=True)
class Trial:
    """What a launcher runs; its result.json goes to `folder`."""

    config: Config
    overrides: list[str]  # Hydra's, that compose `config`
    folder: Path


class Launcher(Protocol):
    n_jobs: int  # trials at a time

    def submit(self, trial: Trial) -> Job: ...


class Inline:
    """One trial at a time, in this process: `submit` returns when it is done."""

    n_jobs = 1

    def __init__(self, job: DictConfig, gpus: Any, **_: Any) -> None:
        pass

    def submit(self, trial: Trial) -> "Done":
        trial.folder.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(trial.folder / "autotune.log")
        logging.getLogger().addHandler(log)
        try:
            run(trial.config, trial.overrides, trial.folder)
            return Done("no result.json")
        except AutotuneError as error:
            return Done(f"{type(error).__name__}: {error}")
        except Exception as error:
            logging.getLogger(__name__).exception("trial failed")
            return Done(f"{type(error).__name__}: {one_line(error)}")
        finally:
            logging.getLogger().removeHandler(log)
            log.close()


@dataclass(frozen=True)
class Done:
    """A job that has ended."""

    why: str

    def done(self) -> bool:
        return True

    def cancel(self) -> None:
        """Nothing runs."""

    def reason(self) -> str:
        return self.why


class LocalProcesses:
    """Trials side by side, each `python -m autotune …` in a process of its own; the trial leases its GPUs."""

    def __init__(self, job: DictConfig, gpus: Any, n_jobs: int | None = None, **_: Any) -> None:
        self.n_jobs = n_jobs or len(devices(gpus))
        sources = job.hydra.runtime.config_sources
        self._config_dirs = [source.path for source in sources if source.provider == "command-line"]

    def submit(self, trial: Trial) -> "LocalJob":
        place = [f"hydra.run.dir={trial.folder}", "tracking.enabled=false"]
        command = [sys.executable, "-m", "autotune", *trial.overrides, *place]
        for directory in self._config_dirs:
            command += ["--config-dir", directory]
        trial.folder.mkdir(parents=True, exist_ok=True)
        log = trial.folder / "trial.log"
        return LocalJob(GuardedProcess(command, log, {}, stop_timeout_s=30), log)


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
