"""The processes that make LoadGen runs; they stay warm from one run to the next, whichever server each is for."""

import os
import select
import socket
import sys
from contextlib import suppress
from pathlib import Path

from autotune.data.samples import Samples
from autotune.live import key
from autotune.live.messages import PATH_BYTES, STOP, RunSpec
from autotune.system.process import GuardedProcess, Stoppable


class LoadGenerator(Stoppable):
    """Makes LoadGen runs over `samples`, one at a time; see loadgen.py. It may outlive a trial and its server.

    It prepares the samples' requests at once, and again if its process has died. Leaving the `with` block ends all of
    its processes; so does the death of this process.
    """

    def __init__(self, samples: Samples, log: Path) -> None:
        """Begin to prepare; `log` gets what its processes print outside a run."""
        self._samples, self._log = samples, log
        self._run = Path()  # the folder of the run that was begun last
        self._runs = False  # whether it goes on
        self._start()

    def _start(self) -> None:
        self._words, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            samples = str(self._samples.path.resolve())
            command = [sys.executable, "-m", "autotune.live.loadgen", samples, str(theirs.fileno())]
            keep = [theirs.fileno()]
            self._process = GuardedProcess(command, self._log, key.environment(), stop_timeout_s=1.0, keep=keep)

    def begin(self, spec: RunSpec) -> None:
        """Begin the run; `wait` for it, or `cancel` it, before the next one."""
        if self._process.exit_code() is not None:
            self.stop()
            self._start()
        spec.save(spec.folder / "run.json")
        self._run, self._runs = spec.folder, True
        with suppress(BrokenPipeError):  # `wait` will tell
            self._words.send(os.fsencode(spec.folder.resolve()))

    def wait(self, timeout_s: float) -> int | None:
        """The run's exit code, 128 + n if signal n ended it; None if it still goes on after `timeout_s`."""
        words = self._words.fileno()
        ready = select.select([words, self._process.fileno()], [], [], timeout_s)[0]
        if not ready:
            return None
        code = self._words.recv(PATH_BYTES) if words in ready else b""
        ended = int(code) if code else self._process.wait(timeout_s)  # all have died
        self._runs = ended is None
        return ended

    def cancel(self) -> None:
        """End the run in its middle, if one goes on: the server sees its connections close."""
        if self._runs:
            with suppress(BrokenPipeError):  # all have ended
                self._words.send(STOP)
        while self._runs:
            self.wait(timeout_s=1.0)

    def last_line(self) -> str:
        """The last line that the run printed."""
        lines = (self._run / "loadgen.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"see {self._log}"

    def stop(self) -> None:
        self._process.stop()
        self._words.close()
