"""Handing trials on to a job that waits for one, through files in a folder that both can see.

The job writes to JOB.ended which trial has ended. The study makes JOB.next, which holds another trial,
or the job does, empty, to give up: whoever comes first has made it, also on a network's file system. The job keeps the
trial as JOB.running, so that it can begin it again if the cluster restarts the job.
"""

import json
import os
import time
from pathlib import Path

from autotune.system.files import left_in, write_whole

POLL_S = 0.2
IDLE_S = 60.0  # for which a job waits, and its server with it


def say_ended(folder: Path, job: str, trial: str, waits: bool) -> None:
    """Tell the study that `trial` has ended, and whether its job `waits` for another."""
    write_whole(folder / f"{job}.ended", json.dumps({"trial": trial, "waits": waits}))


def has_ended(folder: Path, job: str, trial: str) -> bool:
    return left_in(folder / f"{job}.ended").get("trial") == trial


def waits_after(folder: Path, job: str, trial: str) -> bool:
    """True if `job` waits for another trial, now that this one has ended, or has given up."""
    return left_in(folder / f"{job}.ended") == {"trial": trial, "waits": True}


def hand_on(folder: Path, job: str, trial: bytes) -> bool:
    """Give `trial` to `job`; False if it has given up."""
    return _made(folder / f"{job}.next", trial)


def next_for(folder: Path, job: str) -> bytes:
    """The trial that is handed on to `job`; empty once it has given up."""
    file, deadline = folder / f"{job}.next", time.monotonic() + IDLE_S
    while not file.exists():
        if time.monotonic() > deadline and _made(file, b""):
            return b""
        time.sleep(POLL_S)
    return file.replace(folder / f"{job}.running").read_bytes()


def running(folder: Path, job: str) -> bytes:
    """The trial that was handed on to `job` last, before it was restarted; empty if there was none."""
    try:
        return (folder / f"{job}.running").read_bytes()
    except OSError:
        return b""


def _made(file: Path, content: bytes) -> bool:
    """Make `file` with its whole content at once; False if it is there."""
    own = file.with_name(f"{file.name}-{os.getpid()}")
    with open(own, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as made:  # a trial may hold secrets
        made.write(content)
    try:
        os.link(own, file)
        return True
    except FileExistsError:
        return False
    finally:
        own.unlink()
