"""A study hands trials on to a job that waits, or the job gives up: never both."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autotune.sweep import handing
from autotune.sweep.handing import hand_on, has_ended, next_for, running, say_ended, waits_after


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "POLL_S", 0.01)
    monkeypatch.setattr(handing, "IDLE_S", 0.05)


def test_job_gets_the_trial_that_is_handed_on_and_begins_it_again_when_it_is_restarted(tmp_path: Path):
    assert not has_ended(tmp_path, "7", "trial-1") and running(tmp_path, "7") == b""
    say_ended(tmp_path, "7", "trial-1", waits=True)
    assert waits_after(tmp_path, "7", "trial-1") and not has_ended(tmp_path, "7", "trial-2")
    assert hand_on(tmp_path, "7", b"trial 2") and next_for(tmp_path, "7") == b"trial 2"
    assert running(tmp_path, "7") == b"trial 2"
    assert hand_on(tmp_path, "7", b"trial 3") and next_for(tmp_path, "7") == b"trial 3"


def test_job_that_has_given_up_is_handed_nothing(tmp_path: Path):
    assert next_for(tmp_path, "7") == b""
    assert not hand_on(tmp_path, "7", b"trial")


def test_handing_on_and_giving_up_at_once_end_with_one_of_them(tmp_path: Path):
    with ThreadPoolExecutor(2) as pool:
        for number in range(40):
            waits = pool.submit(next_for, tmp_path, str(number))
            is_handed = hand_on(tmp_path, str(number), b"trial")
            assert waits.result() == (b"trial" if is_handed else b"")


def test_handed_trial_is_readable_by_its_user_alone(tmp_path: Path):
    hand_on(tmp_path, "7", b"with a token")
    assert (tmp_path / "7.next").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["7.next"]
