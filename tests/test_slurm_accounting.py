"""A study on a SLURM that has accounting (slurmdbd), and preempts without requeue."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.databases import mariadb, missing_databases
from tests.slurm_cluster import Slurm, missing_programs, slurm_cluster
from tests.studies import SEQS, trials
from tests.test_slurm import done, job_of, start

pytestmark = [pytest.mark.slow, pytest.mark.services]


@pytest.fixture
def accounted(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    if missing := missing_programs() + missing_databases():
        pytest.fail(f"programs are missing ({', '.join(missing)}): `make services` installs them")
    folder = tmp_path_factory.mktemp("accounted")
    with mariadb(folder) as database, slurm_cluster(folder, database) as slurm:
        for name, value in slurm.environment.items():
            monkeypatch.setenv(name, value)
        yield slurm
        slurm.cancel_all()


def test_trial_that_is_preempted_without_requeue_fails_and_the_study_goes_on(accounted: Slurm, tmp_path: Path):
    grid = ["sampler=grid", f"{SEQS}=choice(100,101,102,103,104)"]
    study = start(accounted, tmp_path, *grid, "launcher.parameters.slurm_partition=cancel")
    job = job_of(tmp_path, 0)
    accounted.submit("sleep 3", "--partition=high", "--exclusive", "--gpus-per-node=4")
    output = done(study)
    states = {trial.number: trial.state for trial in trials(tmp_path)}
    assert states[0] is TrialState.FAIL, output
    assert len(states) == 5 and TrialState.COMPLETE in states.values()
    assert not any(state is TrialState.RUNNING for state in states.values())
    assert accounted.run("sacct", "--noheader", "--allocations", f"--jobs={job}", "--format=State") == "PREEMPTED"
