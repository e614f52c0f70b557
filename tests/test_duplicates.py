"""A configuration that a study has measured already is looked up, and takes no engine time again."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from autotune.errors import StartError
from autotune.measure.result import Result
from autotune.sweep import study as sweep
from autotune.sweep.launchers import Inline
from tests.standin import StandIn
from tests.studies import SEQS, asked, study

FEW = ["sampler=random", f"{SEQS}=choice(4,8,16)", "baseline=false"]


def looked_up(folder: Path) -> list[FrozenTrial]:
    return [trial for trial in asked(folder) if "duplicate_of" in trial.user_attrs]


def test_point_asked_for_again_has_the_first_ones_result_and_is_none_of_n_trials(tmp_path: Path):
    said = study(tmp_path, *FEW, "n_trials=3")
    again = looked_up(tmp_path)
    by_name = {f"trial-{trial.number}": trial for trial in asked(tmp_path)}
    measured = [trial for trial in by_name.values() if trial not in again]
    assert sorted(trial.params[SEQS] for trial in measured) == [4, 8, 16]
    assert again and "Study s: 3 trials, 0 failed, " in said
    for trial in again:
        first = by_name[trial.user_attrs["duplicate_of"]]
        assert (trial.params, trial.values, trial.constraints) == (first.params, first.values, first.constraints)
        result = Result.load(tmp_path / f"multirun/s/trial-{trial.number}")
        assert result.complete and not result.phases and result.facts["duplicate_of"] in by_name


def test_study_of_an_exhausted_space_ends_and_says_so(tmp_path: Path):
    said = study(tmp_path, *FEW, "n_trials=4")
    assert "50 proposals in a row were already measured" in said
    assert len(asked(tmp_path)) - len(looked_up(tmp_path)) == 3


def test_study_that_goes_on_looks_up_what_it_measured_before(tmp_path: Path):
    study(tmp_path, f"{SEQS}=choice(4,8)", "sampler=grid", "baseline=false")
    study(tmp_path, f"{SEQS}=choice(4,8)", "sampler=random", "baseline=false", "n_trials=5")
    assert len(asked(tmp_path)) - len(looked_up(tmp_path)) == 2


def test_flag_that_vllm_would_set_to_the_same_is_the_same_point(tmp_path: Path):
    """The stand-in resolves max_num_seqs to 1024 by itself."""
    study(tmp_path, f"{SEQS}=choice(4,1024)", "sampler=grid", "objective=pareto")
    again = looked_up(tmp_path)
    assert [(trial.params[SEQS], trial.user_attrs["duplicate_of"]) for trial in again] == [(1024, "baseline")]
    assert len(again[0].values) == 2


def test_noise_is_measured_again_where_that_is_asked_for(tmp_path: Path):
    study(tmp_path, *FEW, "n_trials=5", "duplicates=measure")
    assert len(asked(tmp_path)) == 5 and not looked_up(tmp_path)


def test_workers_that_are_asked_for_the_same_point_at_once_measure_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Inline, "n_jobs", 4)
    monkeypatch.setattr(sweep, "DUPLICATES_IN_A_ROW", 8)
    said = study(tmp_path, *FEW, "n_trials=6", "backend.steps=5")
    assert ", which runs" in said
    assert sorted(trial.params[SEQS] for trial in asked(tmp_path) if trial not in looked_up(tmp_path)) == [4, 8, 16]


def test_trial_that_repeats_one_that_fails_has_failed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Inline, "n_jobs", 3)
    monkeypatch.setattr(StandIn, "start", no_server)
    with pytest.raises(SystemExit):
        study(tmp_path, f"{SEQS}=choice(4)", "sampler=random", "baseline=false", "n_trials=2")
    assert {trial.state for trial in asked(tmp_path)} == {TrialState.PRUNED}  # as what can't start
    assert looked_up(tmp_path)


@contextmanager
def no_server(*_: object) -> Iterator[None]:
    time.sleep(0.2)
    raise StartError("no memory is left for the KV cache")
    yield
