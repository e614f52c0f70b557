"""What stays in a slot between trials, and when it is given back."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autotune.measure.slot import Slot
from autotune.system import leases
from autotune.system.leases import are_awaited


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "FOLDER", tmp_path / "leases")
    monkeypatch.setattr(leases, "QUEUE_S", 0.0)


def is_free(name: str) -> bool:
    """True if nobody has the lock of this name."""
    with (leases.FOLDER / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def server(ends: list[str]) -> Iterator[str]:
    yield "server"
    ends.append("server")


def test_gpus_are_given_back_with_the_trial_that_leaves_no_server():
    slot = Slot(shares=True)
    with slot.leased([0], 1):
        assert slot.lease and slot.lease.gpus == (0,) and not is_free("gpu-0")
    assert slot.lease is None and is_free("gpu-0")


def test_server_stays_with_its_gpus_until_the_slot_is_closed():
    slot, ends = Slot(shares=True), []
    for _ in range(2):
        with slot.leased([0], 1):
            slot.server = slot.server or slot.keep(server(ends))
        assert slot.lease and not is_free("gpu-0") and not ends
    slot.close()
    assert ends == ["server"] and slot.server is None and is_free("gpu-0")


def test_trial_that_needs_other_gpus_ends_the_server():
    slot, ends = Slot(shares=True), []
    with slot.leased([0, 1], 1):
        slot.server = slot.keep(server(ends))
    with slot.leased([0, 1], 2):
        assert ends and slot.lease and slot.lease.gpus == (0, 1)


def test_server_makes_way_for_a_trial_that_waits_for_gpus():
    slot, ends = Slot(shares=True), []
    with slot.leased([0], 1):
        slot.server = slot.keep(server(ends))
        assert not are_awaited()
        with (leases.FOLDER / "queue.lock").open() as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)  # as a trial does while it waits
            slot.make_way()
    assert ends and is_free("gpu-0")
