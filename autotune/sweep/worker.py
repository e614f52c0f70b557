"""Trials in processes of their own: python -m autotune.sweep.worker MODULE FD SECONDS

imports what trials need, MODULE with the backend among it, and forks for each slot that is asked for through the socket
FD. A slot runs one trial; if a server stays in it, it answers with what came of it and waits for the next.
"""

import gc
import importlib
import json
import logging
import os
import pickle
import select
import socket
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from autotune.config import redact
from autotune.config.overrides import learn_secrets
from autotune.config.schema import Config
from autotune.errors import AutotuneError
from autotune.measure import trial
from autotune.measure.slot import Slot
from autotune.system import interrupt
from autotune.system.files import log_to
from autotune.system.host import git_revision
from autotune.system.process import MESSAGE, serve
from autotune.text import one_line

POLL_S = 1.0
IDLE_S = 60.0  # for which a server waits for its next trial
LOG = "trial.log"  # what the process prints


@dataclass(frozen=True)
class TrialSpec:
    """A trial for a launcher to run; its result.json goes to `folder`, which exists."""

    config: Config
    overrides: list[str]  # Hydra's, that compose `config`
    folder: Path
    node: str = ""  # where it has to run, on a cluster


def run(one: TrialSpec, slot: Slot | None = None) -> str:
    """Run it; the reason in one line if it did not complete. Its log is `folder`/autotune.log."""
    with log_to(one.folder / "autotune.log"):
        try:
            trial.run(one.config, one.overrides, one.folder, slot)
            return ""
        except Exception as error:  # whatever it is, the study goes on
            if not isinstance(error, AutotuneError):
                logging.getLogger(__name__).exception("the trial failed")
            return f"{type(error).__name__}: {redact.redact(one_line(error))}"


def run_job(one: TrialSpec, slot: Slot | None = None) -> str:
    """`run` as the main function of a process."""
    interrupt.install(hangup=False)  # its guard hangs up a trial that is to end at once
    redact.install(one.overrides)
    learn_secrets(one.config)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(one, slot)


def main() -> None:
    module, descriptor, stop_timeout_s = sys.argv[1:]
    importlib.import_module(module)
    git_revision()  # of what is loaded, and once for all
    gc.freeze()  # what is there need not be looked at, and so copied, in each fork
    requests = serve(int(descriptor), float(stop_timeout_s))
    reason = ""
    with closing(Slot(shares=True)) as slot:
        while one := request_for(slot, requests):
            with (one.folder / LOG).open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            reason = run_job(one, slot)
            if slot.server is None:
                break
            requests.send(json.dumps(reason).encode())
    if reason:
        sys.exit(reason)
    # To take all modules down would cost a fork 0.2 s, in which its worker is idle.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def request_for(slot: Slot, requests: socket.socket) -> TrialSpec | None:
    """The next trial; None if there will be none. A server for which there is none for a while ends."""
    waited = 0.0
    while not select.select([requests], [], [], POLL_S)[0]:
        waited += POLL_S
        slot.make_way()
        if waited > IDLE_S:
            slot.close()
    message = requests.recv(MESSAGE)
    spec: TrialSpec | None = pickle.loads(message) if message else None
    return spec


if __name__ == "__main__":
    main()
