"""Runs a command and outlives it: when its own parent is gone, nothing the command started is left.

    python guard.py GRACE_S COMMAND …

Standard input is a pipe that the parent never writes to. Its end means that the parent has stopped the
command, or has died in whatever way; SIGTERM means the same. The command then gets SIGTERM, GRACE_S later
SIGKILL, and so does every process it left behind, also those that left its process group. Exits with the
command's code, or 128 + the signal that ended it. Standard library only, so that it starts in milliseconds.
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
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def kill_descendants() -> None:
    """SIGKILL what is left; as subreaper this process inherits each orphan, so the tree ends up empty."""
    while pids := children(os.getpid()):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def guard(grace_s: float, parent: int) -> int | None:
    """Fork. The child gets None; this process guards it until it ends, and gets its exit code.

    The end of what can be read from the descriptor `parent` means that the child is to end.
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
        os.kill(pid, signal.SIGKILL)  # it is still to be waited for, so this is no other's pid
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kill_descendants()
    return 128 - code if code < 0 else code


def main() -> int:
    code = guard(float(sys.argv[1]), sys.stdin.fileno())
    if code is None:
        assert os.open(os.devnull, os.O_RDONLY) == sys.stdin.fileno() == 0
        os.set_inheritable(0, True)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        os.execvp(sys.argv[2], sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
