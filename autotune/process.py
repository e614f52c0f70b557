"""Processes that can't outlive the trial that started them."""

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from autotune.guard import PR_SET_PDEATHSIG, libc

GUARD = Path(__file__).with_name("guard.py")


class GuardedProcess:
    """`command` in its own session, under guard.py, with its output in `log`.

    `keep` are descriptors (a lease's locks) that stay open until the last of them has ended.
    Leaving the `with` block ends it and everything it started; so does the death of this process.
    """

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str], stop_timeout_s: float, keep: Sequence[int] = ()
    ) -> None:
        self.stop_timeout_s = stop_timeout_s
        with log.open("wb") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), str(stop_timeout_s), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
                pass_fds=keep,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def session(self) -> int:
        """Session id that the command and its children share, unless they leave it."""
        return self._guard.pid

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n after signal n."""
        return self._guard.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Exit code, or None if it still runs after `timeout_s`."""
        try:
            return self._guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        assert self._guard.stdin
        self._guard.stdin.close()
        # The guard needs a moment after its own SIGKILL; longer than that and it is stuck itself.
        if self.wait(self.stop_timeout_s + 5) is None:
            os.killpg(self._guard.pid, 9)
            self._guard.wait()


def fork(work: Callable[[socket.socket], None], close: Sequence[socket.socket] = ()) -> socket.socket:
    """Start a copy of this process that runs `work` on one end of a socket, then ends; returns the other end.

    It dies with the thread that makes it. `close` is what it must not keep open: the sockets of earlier copies.
    """
    parent = os.getpid()
    ours, theirs = socket.socketpair()
    if os.fork():
        theirs.close()
        return ours
    code = 1
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for sock in (ours, *close):
            sock.close()
        if os.getppid() == parent:
            work(theirs)
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
