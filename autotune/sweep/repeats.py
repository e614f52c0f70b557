"""Trials of a study that run again, each as often as is asked; those that are complete are kept."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from autotune.config.overrides import check_trusted, leaves
from autotune.config.redact import HIDDEN
from autotune.config.schema import Config
from autotune.errors import InputError
from autotune.measure import trial
from autotune.measure.result import Result
from autotune.results.study import Study
from autotune.sweep.launchers import Job, Launcher, begin
from autotune.sweep.worker import TrialSpec
from autotune.system import interrupt

log = logging.getLogger(__name__)

POLL_S = 0.1


@dataclass(frozen=True)
class Repeat:
    """A run of one configuration in one block."""

    name: str  # of the study's trial
    block: int  # from 1
    trial: TrialSpec

    def is_complete(self) -> bool:
        """True if it has completed already, with this very configuration."""
        config, result = self.trial.folder / "config.yaml", Result.find(self.trial.folder)
        if not (result and result.complete and config.is_file()):
            return False
        return config.read_bytes() == trial.as_yaml(self.trial.config).encode()


def config_of(study: Study, name: str, overrides: Sequence[str]) -> Config:
    """The configuration of the trial `name`, to run it again with `overrides`.

    Raises InputError if it would run others' code, or if a value is hidden that `overrides` do not give.
    """
    config = study.config_of(name, overrides)
    if keys := [key for key, value in leaves(asdict(config)) if HIDDEN in str(value)]:
        raise InputError(f"{study.folder} hides {', '.join(keys)}; add {keys[0]}=… to this command")
    check_trusted(config, overrides, study.folder / name)
    return config


def run_missing(repeats: Sequence[Repeat], launcher: Launcher, on_end: Callable[[Repeat, Result], None]) -> None:
    """Run those that are not complete, up to the launcher's n_jobs side by side; `on_end` gets each result."""
    waiting = [repeat for repeat in repeats if not repeat.is_complete()]
    running: list[tuple[Repeat, Job]] = []
    try:
        with interrupt.deferred():  # a job that has started is always in `running`
            while waiting or running:
                interrupt.check()
                free = launcher.n_jobs - len(running)
                batch, waiting = waiting[:free], waiting[free:]
                running += start(batch, launcher)
                for repeat, job in [pair for pair in running if pair[1].done()]:
                    running.remove((repeat, job))
                    on_end(repeat, Result.find(repeat.trial.folder) or Result(reason=job.reason()))
                if running:
                    running[0][1].wait(POLL_S)
    finally:
        with ExitStack() as all_of_them:  # one that can't be cancelled doesn't keep the others
            for _, job in running:
                all_of_them.callback(job.cancel)


def start(batch: Sequence[Repeat], launcher: Launcher) -> list[tuple[Repeat, Job]]:
    """Jobs for `batch`; a cluster's job that outlived an earlier process is attached."""
    attached = [(repeat, launcher.attach(repeat.trial.folder)) for repeat in batch]
    fresh = [repeat for repeat, job in attached if not job]
    for repeat in fresh:
        log.info("block %d: %s", repeat.block, repeat.name)
    started = zip(fresh, begin(launcher, [repeat.trial for repeat in fresh]), strict=True)
    return [*((repeat, job) for repeat, job in attached if job), *started]
