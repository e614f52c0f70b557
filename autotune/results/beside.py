"""Logging to MLflow in a process beside the study, which MLflow so neither delays nor ends:

    python -m autotune.results.beside FD

The study writes JSON lines to the pipe FD: where to log, then the folder of each trial that has ended, then how it has
ended itself. What is logged is noted in the trials' folders; the process prints what could not be.
"""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from autotune.config.redact import install, redact
from autotune.config.schema import TrackingConfig
from autotune.errors import AutotuneError
from autotune.measure.result import Result
from autotune.results.tracking import Tracker, is_server, known_run, trials_in
from autotune.system.files import last_line
from autotune.system.process import GuardedProcess

LOG = ".mlflow.log"  # in the study's folder: what the process prints
# At its end a study waits as long as trials are being logged, but no longer than END_S.
SERVER_QUIET_S = 10.0  # without a trial that was logged
FILE_QUIET_S = 60.0  # the same for a file, which never hangs, but MLflow may still have to make it
END_S = 120.0

log = logging.getLogger("autotune.results.beside")  # also where the module is __main__


@contextmanager
def study(config: TrackingConfig, name: str | None, folder: Path) -> Iterator["TrackingProcess"]:
    """A parent run for the study `name`, ended with the study; without a name, for a trial alone, there is none."""
    process, status = TrackingProcess(config, name, folder), "KILLED"
    try:
        yield process
        status = "FINISHED"
    finally:
        process.end(status)


class TrackingProcess:
    """Has trials logged below one parent run, or does nothing when tracking is off."""

    def __init__(self, config: TrackingConfig, name: str | None, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._trials: list[Path] = []
        self._has_warned = False
        if not config.enabled:
            return
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(read)]
        self._process = GuardedProcess(command, folder / LOG, {}, stop_timeout_s=1, keep=[read])
        os.close(read)
        self._send({"config": asdict(config), "study": name, "folder": str(folder)})

    def log_trial(self, folder: Path) -> None:
        """Have the trial in `folder`, which has ended, logged at some time."""
        if not self._config.enabled:
            return
        self._trials.append(folder)
        self._send({"trial": str(folder)})
        if not self._has_warned and (reason := self._reason()):
            self._has_warned = True
            log.warning("%s; the study goes on", reason)

    def end(self, status: str) -> None:
        """Wait for what is being logged; say what is missing then, and how to log it."""
        if not self._config.enabled:
            return
        self._send({"status": status})
        os.close(self._pipe)
        with self._process:
            code = self._awaited()
        if code == 0:
            return
        missing, uri = len(self._missing()), redact(self._config.uri)
        what = f"{missing} of {len(self._trials)} trials" if missing else "the end of the study"
        why = self._reason() or (f"its process ended with {code}" if code else f"{uri} does not answer")
        command = f"autotune log {shlex.quote(str(self._folder))} --uri {shlex.quote(uri)}"
        command += f" --experiment {shlex.quote(self._config.experiment)}"
        log.warning("MLflow lacks %s (%s); nothing is lost, log it later: %s", what, why, command)

    def _awaited(self) -> int | None:
        """The exit code of the process; None once it is not worth to wait for."""
        quiet_s = SERVER_QUIET_S if is_server(self._config.uri) else FILE_QUIET_S
        missing, deadline = len(self._missing()), time.monotonic() + END_S
        while (code := self._process.wait(quiet_s)) is None:
            missing, before = len(self._missing()), missing
            if missing == before or time.monotonic() > deadline:
                return None
        return code

    def _missing(self) -> list[Path]:
        uri = redact(self._config.uri)
        return [folder for folder in self._trials if known_run(folder, uri) is None]

    def _reason(self) -> str:
        """The last line that the process has printed."""
        return last_line(self._folder / LOG, "")

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(BlockingIOError, BrokenPipeError):  # at its end the process finds what it has not heard of
            os.write(self._pipe, json.dumps(message).encode() + b"\n")


def main() -> None:
    install()
    # Every library is quiet, and says what matters in its exceptions.
    logging.basicConfig(level=logging.CRITICAL, format="%(message)s", stream=sys.stdout)
    logging.getLogger("autotune").setLevel(logging.INFO)
    with os.fdopen(int(sys.argv[1])) as pipe:
        first = json.loads(pipe.readline())
        redact(first)  # so that no error repeats a password of the URI
        config, folder = TrackingConfig(**first["config"]), Path(first["folder"])
        sys.exit(min(1, follow(config, first["study"], folder, map(json.loads, pipe))))


def follow(config: TrackingConfig, name: str | None, folder: Path, messages: Iterable[dict[str, str]]) -> int:
    """Log what `messages` name as they come, and at their end what is missing; returns how many steps failed then."""
    made: list[Tracker] = []
    errors: list[AutotuneError] = []

    def attempt(step: Callable[[Tracker], None]) -> bool:
        try:
            if not made:
                made.append(Tracker(config, name, folder))
            step(made[0])
        except AutotuneError as error:
            errors.append(error)
            log.warning("%s", error if made else errors[0])  # half made, a database says other things than why
            return False
        return True

    attempt(lambda _: None)
    status = "KILLED"
    for message in messages:
        status = message.get("status", status)
        if "trial" in message:
            attempt(partial(_log_trial, Path(message["trial"])))
    rest = [path for path in trials_in(folder) if not known_run(path, redact(config.uri))]
    steps: list[Callable[[Tracker], None]] = [partial(_log_trial, path) for path in rest]
    steps += [lambda tracker: tracker.summarise(folder), lambda tracker: tracker.end(status)]
    return sum(not attempt(step) for step in steps)


def _log_trial(folder: Path, tracker: Tracker) -> None:
    if (result := Result.find(folder)) and result.ran:
        tracker.log_trial(folder, result)


if __name__ == "__main__":
    main()
