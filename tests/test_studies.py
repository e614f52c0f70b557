"""What is read of a study's folder."""

from pathlib import Path

from autotune import studies
from autotune.result import Result
from tests.studies import SEQS, autotune


def test_study_is_known_by_a_trial_that_left_its_configuration(tmp_path: Path):
    done = autotune(tmp_path, f"{SEQS}=choice(64)", "n_trials=1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "multirun/s"
    (folder / "baseline/config.yaml").unlink()  # as if its job had never begun
    Result(reason="SLURM job 1: CANCELLED").save(folder / "baseline")
    study = studies.load(str(folder))
    assert list(study.results) == ["baseline", "trial-0"] and study.name == "s"
    assert study.base.study == "s" and study.objective.metrics == ["tokens_per_s"]
