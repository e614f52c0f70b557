"""Run a command, and leave nothing behind that it started, even if the guard's own parent dies.

    python guard.py GRACE_S COMMAND …

Standard input is a pipe that the parent never writes to. Its end means that the parent wants the command to end, or has
died in whatever way; SIGTERM means the same. The command then gets SIGTERM and, GRACE_S later, SIGKILL. Once it has
ended, every process that it left behind gets SIGKILL, also those that left its process group. Exits with the command's
code, or 128 + the signal that ended it. Uses the standard library only, so that it starts in milliseconds.
"""

import ctypes
import os
import select
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
libc = ctypes.CDLL(None, use_errno=True)


def children(pid: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        if int(fields[1]) == pid:
            pids.append(int(stat.parent.name))
    return pids


def kill_descendants() -> None:
    """Kill all descendants: as subreaper this process inherits each orphan, until none is left."""
    while pids := children(os.getpid()):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def guard(grace_s: float, parent: int) -> int | None:
    """Fork. Returns None in the child; in this process, which guards the child until it ends, its exit code.

    The child is to end once the descriptor `parent` reaches its end of file.
    """
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, woken = os.pipe()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: os.write(woken, b"x")) for number in numbers]
    pid = os.fork()
    if pid == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        for descriptor in (wake, woken, parent):
            os.close(descriptor)
        return None
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, wake, parent], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGTERM)
        select.select([ended], [], [], grace_s)
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the pid can't be another process's
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kill_descendants()
    return 128 - code if code < 0 else code


def main() -> int:
    code = guard(float(sys.argv[1]), sys.stdin.fileno())
    if code is None:
        assert os.open(os.devnull, os.O_RDONLY) == sys.stdin.fileno() == 0
        os.set_inheritable(0, True)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        os.execvp(sys.argv[2], sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
