"""Run a command, and leave nothing behind that it started, even if the guard's own parent dies.

    python guard.py GRACE_S COMMAND …

Standard input is a socket that the parent never writes to. Its end means that the parent wants the command to end, or
has died in whatever way; SIGTERM means the same. The command then gets SIGTERM and, GRACE_S later, SIGKILL. Once it
has ended, every process that it left behind gets SIGKILL, also those that left its process group, and the folder that
the variable AUTOTUNE_SCRATCH names is removed. Exits with the command's code, or 128 + the signal that ended it. Uses
the standard library only, so that it starts in milliseconds.

The guard is two processes. If either is killed, the other one ends the command and all that it left. If both are, the
kernel hangs up the terminal that all of them share: it ends what has not left the guard's process group.
"""

import ctypes
import fcntl
import os
import select
import shutil
import signal
import sys
import termios
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
SCRATCH = "AUTOTUNE_SCRATCH"
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
    """Fork, in the process that leads its session. Returns None in the child; here, once all has ended, its exit code.

    The child is to end once the descriptor `parent` reaches its end of file.
    """
    terminal = open_terminal()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, woken = os.pipe()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: os.write(woken, b"x")) for number in numbers]
    if second := os.fork():
        return ending(second)
    for descriptor in (woken, *terminal):  # so that `wake` and the terminal end with the first process
        os.close(descriptor)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    if pid := os.fork():
        ended = os.pidfd_open(pid)
        if ended not in select.select([ended, wake, parent], [], [])[0]:
            os.kill(pid, signal.SIGTERM)
            select.select([ended], [], [], grace_s)
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the pid can't be another process's
        os._exit(ending(pid))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    for descriptor in (wake, parent):
        os.close(descriptor)
    return None


def open_terminal() -> list[int]:
    """Give this session a terminal; its other end is in the list, which is empty where there are no terminals."""
    try:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSCTTY)
    except OSError:
        return []
    os.close(theirs)
    return [ours]


def ending(pid: int) -> int:
    """The exit code of the child `pid`, once it and all that it left have ended; 128 + n if signal n ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kill_descendants()
    return 128 - code if code < 0 else code


def main() -> int:
    code = guard(float(sys.argv[1]), sys.stdin.fileno())
    if code is None:
        assert os.open(os.devnull, os.O_RDONLY) == sys.stdin.fileno() == 0
        os.set_inheritable(0, True)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP):  # Python ignores them; nohup the last
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvp(sys.argv[2], sys.argv[2:])
        except OSError as error:
            sys.exit(f"{sys.argv[2]}: {error.strerror}")
    if scratch := os.environ.get(SCRATCH):
        shutil.rmtree(scratch, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
