"""One trial in a process of its own: python -m autotune.sweep.worker MODULE FD SECONDS

imports what trials need, MODULE with the backend among it, and forks for each trial that comes through the socket FD.
"""

import gc
import importlib
import logging
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

from autotune.config import redact
from autotune.config.overrides import learn_secrets
from autotune.config.schema import Config
from autotune.errors import AutotuneError
from autotune.measure import trial
from autotune.system import interrupt
from autotune.system.files import log_to
from autotune.system.host import git_revision
from autotune.system.process import serve
from autotune.text import one_line

LOG = "trial.log"  # what the process prints


@dataclass(frozen=True)
class TrialSpec:
    """A trial for a launcher to run; its result.json goes to `folder`, which exists."""

    config: Config
    overrides: list[str]  # Hydra's, that compose `config`
    folder: Path
    node: str = ""  # where it has to run, on a cluster


def run(one: TrialSpec) -> str:
    """Run it; the reason in one line if it did not complete. Its log is `folder`/autotune.log."""
    with log_to(one.folder / "autotune.log"):
        try:
            trial.run(one.config, one.overrides, one.folder)
            return ""
        except Exception as error:  # whatever it is, the study goes on
            if not isinstance(error, AutotuneError):
                logging.getLogger(__name__).exception("the trial failed")
            return f"{type(error).__name__}: {redact.redact(one_line(error))}"


def run_job(one: TrialSpec) -> str:
    """`run` as the main function of a process."""
    interrupt.install()
    redact.install(one.overrides)
    learn_secrets(one.config)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(one)


def main() -> None:
    module, descriptor, stop_timeout_s = sys.argv[1:]
    importlib.import_module(module)
    git_revision()  # of what is loaded, and once for all
    gc.freeze()  # what is there need not be looked at, and so copied, in each fork
    one: TrialSpec = pickle.loads(serve(int(descriptor), float(stop_timeout_s)))
    with (one.folder / LOG).open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if reason := run_job(one):
        sys.exit(reason)
    # To take all modules down would cost a fork 0.2 s, in which its worker is idle.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
