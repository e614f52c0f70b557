"""One trial in a process of its own: python -m autotune.sweep.worker FILE

waits for FILE to hold a trial, so that its imports are done before there is one.
"""

import logging
import os
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from autotune import interrupt, trial
from autotune.errors import AutotuneError
from autotune.logs import log_to
from autotune.schema import Config
from autotune.text import one_line

POLL_S = 0.02
LOG = "trial.log"  # what the process prints


@dataclass(frozen=True)
class Trial:
    """What a launcher runs; its result.json goes to `folder`, which exists."""

    config: Config
    overrides: list[str]  # Hydra's, that compose `config`
    folder: Path
    node: str = ""  # where it has to run, on a cluster

    def save(self, path: Path) -> None:
        """Hand it to the process that waits for `path`; nobody else can read it, as it may hold secrets."""
        draft = path.with_suffix(".draft")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            pickle.dump(self, file)
        draft.rename(path)


def run(one: Trial) -> str:
    """Run it; the reason in one line if it did not complete. Its log is `folder`/autotune.log."""
    with log_to(one.folder / "autotune.log"):
        try:
            trial.run(one.config, one.overrides, one.folder)
            return ""
        except Exception as error:  # whatever it is, the study goes on
            if not isinstance(error, AutotuneError):
                logging.getLogger(__name__).exception("the trial failed")
            return f"{type(error).__name__}: {one_line(error)}"


def run_job(one: Trial) -> str:
    """`run` as the main function of a process."""
    interrupt.install()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(one)


def main() -> None:
    path = Path(sys.argv[1])
    while not path.exists():
        time.sleep(POLL_S)
    one: Trial = pickle.loads(path.read_bytes())
    path.unlink()
    with (one.folder / LOG).open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.exit(run_job(one) or 0)


if __name__ == "__main__":
    main()
