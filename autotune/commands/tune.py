"""One trial, or with -m a study: what `autotune` does unless a command is named."""

import logging
import os
import re
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from autotune import commands, sweep
from autotune.config import CONF, schema, words
from autotune.config.command_line import errors_in_one_line, register, without_sweep, without_usage
from autotune.config.overrides import typed
from autotune.config.redact import redact
from autotune.measure import progress, trial
from autotune.measure.prepare import prepare, prepare_samples
from autotune.measure.result import Result
from autotune.results import beside, summary, tracking
from autotune.system import interrupt, threads
from autotune.system.files import unless_refused, write_whole
from autotune.text import rounded

log = logging.getLogger(__name__)

TOLD_EVERY_S = 10.0  # rates of a trial that runs
# What only a study heeds.
OF_STUDIES = (
    *("n_trials", "budget", "budget_of", "max_failures", "duplicates", "resume", "baseline", "baseline_gpu"),
    *("sampler", "seed", "prior", "warm_start", "pruner", "launcher", "space", "conditions", "only_if"),
)


@hydra.main(config_path=str(CONF), config_name="config")
def job(composed: DictConfig) -> float | list[float]:
    """One trial, alone or as a study's job; returns the objective."""
    if HydraConfig.get().mode is RunMode.RUN:
        with errors_in_one_line():
            return single(composed)
    return values(trial.run(*inputs(composed)))


def single(composed: DictConfig) -> float | list[float]:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with unless_refused(folder):
        config, overrides, _ = inputs(composed)
        prepare_samples(config, prepare(config))
        tracking.check(config.tracking)
    if unheeded := [word for word in overrides if re.split(r"[.=]", word.lstrip("+~"))[0] in OF_STUDIES]:
        log.info("this is one trial, which does not heed %s: add -m for a study", ", ".join(unheeded))
    for file in (folder / (HydraConfig.get().output_subdir or "")).glob("*.yaml"):
        write_whole(file, redact(file.read_text()))  # Hydra's own, with hydra.output_subdir=.hydra
    progress.begin(folder)
    with beside.study(config.tracking, None, folder) as tracker:
        try:
            with progress_told(folder):
                result = trial.run(config, overrides, folder)
            log.info(summary.single(result, config, folder))
        except (KeyboardInterrupt, SystemExit):
            log.info("stopped; what was measured by then is in %s", folder)
            raise
        finally:
            tracker.log_trial(folder)
    return values(result)


def progress_told(folder: Path) -> AbstractContextManager[None]:
    """Log what the trial in `folder` does: each run as it begins, and every TOLD_EVERY_S what it has served so far."""
    reader = progress.Reader(folder)

    def tell(ended: threading.Event) -> None:
        next_s, last = 0.0, False
        while not last:
            last = ended.wait(0.5)
            for entry in reader.new():
                rates = entry.get("values", {})
                if entry.get("phase", "start") != "start":  # the server's log is named then
                    log.info(entry["phase"])
                elif progress.FAILING in rates:
                    log.info("  it breaks a limit")
                elif rates.get("completed") and entry["time"] >= next_s:
                    next_s = entry["time"] + TOLD_EVERY_S
                    over = f", {rates['over_limit']:.0f} of them over a limit" if rates["over_limit"] else ""
                    served = f"{rates['completed']:.0f} requests served{over}"
                    speed = f"{rounded(rates['samples_per_s'])} requests/s, {rounded(rates['tokens_per_s'])} tokens/s"
                    log.info("  %s; %s", served, speed)

    return threads.beside(tell)


def inputs(composed: DictConfig) -> tuple[schema.Config, list[str], Path]:
    """The typed configuration, the overrides that made it, and the trial's folder."""
    context = HydraConfig.get()
    return typed(composed), list(context.overrides.task), Path(context.runtime.output_dir)


def values(result: Result) -> float | list[float]:
    return result.values[0] if len(result.values) == 1 else result.values


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are, and leave as one line
    os.environ.pop("HYDRA_MAIN_MODULE", None)
    if {"-sc", "--shell-completion"} & set(sys.argv):  # the shell tells the line so far: a command takes the same keys
        line = os.environ.get("COMP_LINE", "autotune ")
        os.environ["COMP_LINE"] = re.sub(rf"^(\S+\s+)({'|'.join(commands.NAMES)})\s", r"\1", line)
    interrupt.install()
    register()
    sweep.register()
    with errors_in_one_line(), without_usage():
        words.check(sys.argv[1:])
        sys.argv[1:] = without_sweep(sys.argv[1:])
        with words.naming_files(words.split_config_dir(sys.argv[1:])[0]):
            job()


if __name__ == "__main__":
    main()
