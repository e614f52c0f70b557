"""Processes that can't outlive the trial that started them."""

import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from autotune.system.guard import PR_SET_PDEATHSIG, guard, libc

GUARD = Path(__file__).with_name("guard.py")
MESSAGE = 1 << 20  # bytes of the largest request to a fork
DRAIN_S = 86_400.0  # a fork server that is asked to end does so after the last of its forks


class Stoppable:
    """Something that leaving its `with` block stops."""

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class GuardedProcess(Stoppable):
    """A command in its own session, under guard.py, with its output in `log`.

    The descriptors `keep` (a lease's locks) stay open until the command and everything it started have ended. Leaving
    the `with` block ends them all; so does the death of this process.
    """

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str], stop_timeout_s: float, keep: Sequence[int] = ()
    ) -> None:
        self.stop_timeout_s = stop_timeout_s
        self._alive, theirs = socket.socketpair()  # the guard watches one end, we the other
        with log.open("wb") as output, theirs:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), str(stop_timeout_s), *command],
                stdin=theirs.fileno(),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
                pass_fds=keep,
            )

    def fileno(self) -> int:
        """A descriptor to select on: it is readable once the command, and what it left, has ended."""
        return self._alive.fileno()

    @property
    def session(self) -> int:
        """Id of the session that the command and its children share, unless they leave it."""
        return self._guard.pid

    def exit_code(self) -> int | None:
        """None while it, or what it left, runs; 128 + n if signal n ended it."""
        return self.wait(0)

    def wait(self, timeout_s: float) -> int | None:
        """Exit code, or None if it still runs after `timeout_s`."""
        if self._guard.returncode is None and not select.select([self._alive], [], [], timeout_s)[0]:
            return None
        code = self._guard.wait()
        return 128 - code if code < 0 else code

    def stop(self) -> None:
        if self._guard.returncode is None:
            self._alive.shutdown(socket.SHUT_WR)
        # The guard needs a moment after its own SIGKILL; if it takes longer than that, it is stuck itself.
        if self.wait(self.stop_timeout_s + 5) is None:
            os.killpg(self._guard.pid, 9)
            self._guard.wait()
        self._alive.close()


def fork(work: Callable[[], None]) -> int:
    """Start a copy of this process, which dies with this thread; it ends with 1 if `work` raises. Returns its pid."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.getppid() == parent:
            work()
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class ForkServer:
    """A guarded process that has done its imports and then forks itself for each request; see `serve`."""

    def __init__(self, command: Sequence[str], log: Path, stop_timeout_s: float) -> None:
        """Start `command`, with the descriptor for `serve` and `stop_timeout_s` added as its last arguments."""
        self.log = log
        self._stop_timeout_s = stop_timeout_s
        self._requests, theirs = socket.socketpair()
        with theirs:
            words = [*command, str(theirs.fileno()), str(stop_timeout_s)]
            self._process = GuardedProcess(words, log, {}, DRAIN_S, keep=[theirs.fileno()])

    def runs(self) -> bool:
        return self._process.exit_code() is None

    def fork(self) -> "Forked":
        """Start a process in which `serve` returns the other end of this one's `requests`."""
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)  # not a file: a request may hold secrets
        life, other = socket.socketpair()
        with theirs, other, suppress(BrokenPipeError):  # it has ended, and its forks with it; `life` will tell
            socket.send_fds(self._requests, [b"1"], [theirs.fileno(), other.fileno()])
        return Forked(ours, life, self._stop_timeout_s)


class Forked:
    """A process that a ForkServer forked; it ends with this process."""

    def __init__(self, requests: socket.socket, life: socket.socket, stop_timeout_s: float) -> None:
        self._requests = requests
        self._life = life  # while it is open, the process may run; its guard writes the exit code there
        self._stop_timeout_s = stop_timeout_s
        self._ended: int | None = None
        self.lost = False  # once it has ended: with its guard, so that nobody knows why

    def send(self, request: bytes) -> None:
        with suppress(BrokenPipeError):  # it has ended, and its exit code will tell
            self._requests.send(request)

    def answer(self, timeout_s: float) -> bytes:
        """Its answer to a request; nothing if it has not after `timeout_s`, or has ended."""
        if self._ended is not None or not select.select([self._requests], [], [], timeout_s)[0]:
            return b""
        with suppress(ConnectionResetError):
            return self._requests.recv(MESSAGE)
        return b""

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n if signal n ended it."""
        return self.wait(0)

    def wait(self, timeout_s: float) -> int | None:
        """Exit code, or None if it still runs after `timeout_s`."""
        if self._ended is None and select.select([self._life], [], [], timeout_s)[0]:
            code = self._life.recv(3)
            self._ended, self.lost = int(code or 128 + signal.SIGKILL), not code
            self._life.close()
            self._requests.close()
        return self._ended

    def stop(self) -> None:
        """End the process and everything it started."""
        if self._ended is None:
            self._life.shutdown(socket.SHUT_WR)
        self.wait(self._stop_timeout_s + 5)  # by then its guard has killed it, or is stuck itself


def serve(descriptor: int, stop_timeout_s: float) -> socket.socket:
    """Serve a ForkServer: returns in each of its forks, in its own session and under a guard, with its `requests`.

    In the calling process it never returns. That process must have no threads (numpy stops its own at a fork).
    """
    requests = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaves no zombies
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]  # it ends after its forks
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 2)
        if not message:
            break
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
            own, life = descriptors
            os.setsid()
            code = guard(stop_timeout_s, life)
            if code is not None:
                os.write(life, str(code).encode())
                os._exit(code)
            return socket.socket(fileno=own)
        for received in descriptors:
            os.close(received)
    with suppress(ChildProcessError):
        os.wait()  # returns once all have ended, as SIGCHLD is ignored
    sys.exit()
