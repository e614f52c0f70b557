import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autotune.errors import InputError, StoppedError
from autotune.system import leases

HOLD = """
import sys, time
from pathlib import Path
from autotune.system import leases
leases.FOLDER = Path(sys.argv[1])
with leases.lease([0, 1], int(sys.argv[2])) as held:
    print(*held.gpus, flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(leases, "FOLDER", tmp_path)
    return tmp_path


def hold(folder: Path, count: int, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(folder), str(count), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_trials_get_different_gpus():
    with leases.lease([0, 1], 1) as one, leases.lease([0, 1], 1) as other:
        assert {*one.gpus, *other.gpus} == {0, 1}


def test_trial_waits_until_enough_gpus_are_free(folder: Path):
    holder = hold(folder, 1, 0.5)
    assert holder.stdout and holder.stdout.readline() == "0\n"
    started = time.monotonic()
    with leases.lease([0, 1], 2) as held:
        assert held.gpus == (0, 1) or held.gpus == (1, 0)
    assert time.monotonic() - started > 0.2
    holder.wait()


def test_killed_holder_frees_its_gpus(folder: Path):
    holder = hold(folder, 2, 60)
    assert holder.stdout and holder.stdout.readline()
    holder.kill()
    with leases.lease([0, 1], 2) as held:
        assert len(held.gpus) == 2
    holder.wait()


@pytest.mark.parametrize("lock", ["queue", "gpu-0"])
def test_trial_that_is_told_to_stop_waits_no_longer_and_keeps_no_turn(folder: Path, lock: str):
    def stopped() -> None:
        raise StoppedError("stopped")

    with (folder / f"{lock}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoppedError), leases.lease([0], 1, stopped):
            pass
    with leases.lease([0], 1) as held:
        assert held.gpus == (0,)


@pytest.mark.slow
def test_trial_of_many_gpus_is_not_overtaken(folder: Path):
    first = hold(folder, 1, 1.0)
    assert first.stdout and first.stdout.readline()
    large = hold(folder, 2, 0.5)
    time.sleep(0.5)
    small = hold(folder, 1, 0.1)
    assert large.stdout and large.stdout.readline()
    assert small.poll() is None
    assert small.wait(20) == large.wait(20) == first.wait(20) == 0


def test_folder_and_locks_are_their_users_own_unless_told_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch):
    own = folder / "own"
    monkeypatch.setattr(leases, "FOLDER", own)
    monkeypatch.setattr(leases, "OWN", own)
    with leases.lease([0], 1):
        modes = {path.name: path.stat().st_mode & 0o7777 for path in (own, *own.iterdir())}
    assert modes == {"own": 0o700, "queue.lock": 0o644, "gpu-0.lock": 0o644}
    monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
    with pytest.raises(InputError, match=r"another user made it; name another folder in AUTOTUNE_LEASES"):
        leases.lease([0], 1).__enter__()


@pytest.mark.parametrize("make", [lambda lock, target: lock.symlink_to(target), lambda lock, _: os.mkfifo(lock)])
def test_lock_that_is_a_link_or_a_pipe_is_refused_and_nothing_changes(make: Callable[[Path, Path], None], folder: Path):
    target = folder / "secret"
    make(folder / "gpu-0.lock", target)
    with pytest.raises(InputError, match=r"gpu-0.lock: .*; delete it"):
        leases.lease([0], 1).__enter__()
    assert not target.exists()


def test_folder_that_is_a_link_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "link").symlink_to(folder)
    monkeypatch.setattr(leases, "FOLDER", folder / "link")
    with pytest.raises(InputError, match=r"leases in .*link: "):
        leases.lease([0], 1).__enter__()


def test_another_users_lock_is_taken_in_turn_and_left_as_it_is(folder: Path):
    (folder / "gpu-0.lock").touch(mode=0o444)
    for _ in range(2):
        with leases.lease([0], 1) as held:
            assert held.gpus == (0,)
    assert (folder / "gpu-0.lock").stat().st_mode & 0o777 == 0o444


def test_more_gpus_than_there_are_is_an_input_error():
    with pytest.raises(InputError, match=r"needs 4 GPUs .* gpus has 2"), leases.lease([0, 1], 4):
        pass


@pytest.mark.parametrize("visible", ["GPU-8f3a", "", "-1"])
def test_visible_devices_without_indices_say_what_to_write(visible: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InputError, match=r"holds no indices; write gpus=\[0,1\]"):
        leases.devices("all")


def test_all_means_the_visible_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert leases.devices("all") == [2, 5]
