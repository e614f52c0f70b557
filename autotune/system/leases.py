"""Leases of GPUs, each for one trial at a time: a lock on a file, freed by the kernel when its holders have ended."""

import fcntl
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from autotune.errors import InputError

# Of this user alone. Users who share GPUs name a folder that all of them may write to (mode 1777).
OWN = Path(f"/tmp/autotune-leases-{os.getuid()}")
FOLDER = Path(os.environ.get("AUTOTUNE_LEASES", OWN))
POLL_S = 0.1
QUEUE_S = 1.0  # a trial that finds its GPUs free is out of the queue by then


@dataclass(frozen=True)
class Lease:
    gpus: tuple[int, ...]
    files: tuple[int, ...]  # descriptors of the locks; a process that inherits them holds the lease, too

    @property
    def visible(self) -> str:
        """The value for CUDA_VISIBLE_DEVICES."""
        return ",".join(map(str, self.gpus))


def devices(gpus: Any) -> list[int]:
    """Indices of the GPUs that `gpus` (a list or `all`) names. Raises InputError."""
    if gpus is None:
        raise InputError("gpus=null: this launcher needs them; write gpus=[0,1], or gpus=all")
    if gpus != "all":
        return list(gpus)
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        if not all(index.strip().isdigit() for index in visible.split(",")):
            raise InputError(f"gpus=all: CUDA_VISIBLE_DEVICES={visible} holds no indices; write gpus=[0,1]")
        return [int(index) for index in visible.split(",")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        listed = ""
    listed_gpus = list(range(listed.count("GPU ")))
    if not listed_gpus:
        raise InputError("gpus=all: nvidia-smi lists no GPU here; write gpus=[0,1], or gpus=null for none")
    return listed_gpus


@contextmanager
def lease(gpus: Sequence[int], count: int, check: Callable[[], None] = lambda: None) -> Iterator[Lease]:
    """Lease `count` of `gpus` until the block ends; waits until that many are free, or `check` raises.

    First come, first served, so that small trials can't keep one that needs many GPUs waiting for ever. Raises
    InputError if there are not that many.
    """
    if count > len(gpus):
        raise InputError(f"this trial needs {count} GPUs (tensor × pipeline × data parallel), gpus has {len(gpus)}")
    with ExitStack() as locks:
        folder = _folder()
        locks.callback(os.close, folder)
        with _open(folder, "queue") as queue:
            _wait_in(queue, check)
            taken: dict[int, BinaryIO] = {}
            while len(taken) < count:
                for gpu in gpus:
                    if gpu not in taken and len(taken) < count:
                        file = _open(folder, f"gpu-{gpu}")
                        try:
                            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            taken[gpu] = locks.enter_context(file)
                        except BlockingIOError:
                            file.close()
                if len(taken) < count:
                    check()
                    time.sleep(POLL_S)
        yield Lease(tuple(taken), tuple(file.fileno() for file in taken.values()))


def _wait_in(queue: BinaryIO, check: Callable[[], None]) -> None:
    """Lock `queue` once all who came before have, or until `check` raises: closing it then gives the turn up."""
    turn = threading.Thread(target=fcntl.flock, args=(queue.fileno(), fcntl.LOCK_EX), daemon=True)
    turn.start()  # the kernel keeps the order of those who wait in such a call, which can't be ended
    turn.join(POLL_S)
    while turn.is_alive():
        check()
        turn.join(POLL_S)


def are_awaited() -> bool:
    """True if a trial of this user, or of one who shares the folder, has been waiting for GPUs for a moment."""
    folder, deadline = _folder(), time.monotonic() + QUEUE_S
    try:
        while True:
            with _open(folder, "queue") as queue:
                try:
                    fcntl.flock(queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return False
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        return True
            time.sleep(POLL_S)
    finally:
        os.close(folder)


def _folder() -> int:
    """A descriptor of the locks' folder. Raises InputError if it is not what it should be."""
    try:
        FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise InputError(f"leases in {FOLDER}: {error.strerror}; name another folder in AUTOTUNE_LEASES") from None
    if FOLDER == OWN and os.fstat(folder).st_uid != os.getuid():
        os.close(folder)
        raise InputError(f"leases in {FOLDER}: another user made it; name another folder in AUTOTUNE_LEASES")
    return folder


def _open(folder: int, name: str) -> BinaryIO:
    """A lock's file, for reading: a lock needs no more, and so every user may take it, whoever made the file."""
    file, safe = f"{name}.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # neither a link nor a pipe is followed
    try:
        try:
            descriptor = os.open(file, safe | os.O_CREAT | os.O_EXCL, dir_fd=folder)
            os.fchmod(descriptor, 0o644)  # whatever the umask
        except FileExistsError:
            descriptor = os.open(file, safe, dir_fd=folder)
    except OSError as error:
        raise InputError(f"{FOLDER / file}: {error.strerror}; delete it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{FOLDER / file}: not a file; delete it")
    return os.fdopen(descriptor, "rb")
