"""A study kept in a database server, which several machines may reach."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import PASSWORD, mariadb, missing_databases, postgresql
from tests.studies import SEQS, autotune, command, environment

pytestmark = [pytest.mark.slow, pytest.mark.services]


@pytest.fixture(scope="module", params=["postgresql", "mysql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if missing := missing_databases():
        pytest.fail(f"programs are missing ({', '.join(missing)}): `make services` installs them")
    with postgresql() if request.param == "postgresql" else mariadb(tmp_path_factory.mktemp("database")) as found:
        yield found


def arguments(url: str, *more: str) -> list[str]:
    return [f"hydra.sweeper.storage={url}", f"{SEQS}=range(4,200)", "baseline=false", *more]


def test_study_goes_on_there_and_its_password_is_written_nowhere(url: str, tmp_path: Path):
    first = autotune(tmp_path, *arguments(url, "n_trials=2"))
    again = autotune(tmp_path, *arguments(url, "n_trials=3"))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "Study s: 2 trials" in first.stdout and "Study s: 3 trials" in again.stdout
    said = [first.stdout, first.stderr, again.stdout, again.stderr]
    said += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(PASSWORD in text for text in said)
    other = tmp_path / "other"
    other.mkdir()
    refused = autotune(other, *arguments(url, "n_trials=4"))
    assert refused.returncode == 1 and "the results of its trials are not in" in refused.stderr


def test_second_process_in_another_folder_is_refused(url: str, tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    words = command(*arguments(url, "study=two", "n_trials=99", "backend.pace=0.02"))
    study = subprocess.Popen(words, cwd=one, env=environment(one), stdout=subprocess.DEVNULL)
    log = one / "multirun/two/autotune.log"
    while not (log.exists() and "trial-0" in log.read_text()):
        assert study.poll() is None
        time.sleep(0.1)
    second = autotune(other, *arguments(url, "study=two"))
    study.kill()
    study.wait()
    assert second.returncode == 1 and "another process works on study=two" in second.stderr
    assert PASSWORD not in second.stderr


def test_server_that_says_no_is_one_line_without_the_password(url: str, tmp_path: Path):
    done = autotune(tmp_path, *arguments(url.replace(PASSWORD, "wr0ng")))
    assert done.returncode == 1 and done.stderr.startswith("autotune: hydra.sweeper.storage=")
    assert "wr0ng" not in done.stderr and "Traceback" not in done.stderr
