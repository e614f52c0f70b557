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
import subprocess
import sys
import time
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


def main() -> int:
    grace_s = float(sys.argv[1])
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, woken = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(woken, b"x"))
    command = subprocess.Popen(
        sys.argv[2:],
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    ended = os.pidfd_open(command.pid)
    ready, _, _ = select.select([ended, wake, sys.stdin], [], [])
    if ended not in ready:
        command.terminate()
        deadline = time.monotonic() + grace_s
        select.select([ended], [], [], max(0.0, deadline - time.monotonic()))
    if command.poll() is None:
        command.kill()
    code = command.wait()
    kill_descendants()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
