"""Studies as a user starts them, on a backend that answers at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

ROOT = Path(__file__).parent.parent
COMMON = ["model=tiny", "dataset=cnn_small", "space=none", "backend._target_=tests.standin.Standin", "study=s"]


def autotune(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AUTOTUNE_LEASES": str(folder / "leases")}
    command = [sys.executable, "-m", "autotune", "-m", *COMMON, "tracking=none", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=120)


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/multirun/s/study.db").trials


def test_baseline_failure_and_refusal_are_kept_and_the_study_goes_on(tmp_path: Path):
    done = autotune(tmp_path, "sampler=grid", "engine.args.max_num_seqs=choice(2,3,5,16)")
    assert done.returncode == 0, done.stderr
    by_value = {trial.params["engine.args.max_num_seqs"]: trial for trial in trials(tmp_path)}
    assert by_value[3].state is TrialState.PRUNED and by_value[3].user_attrs["refused"] == "three is refused"
    assert by_value[5].state is TrialState.FAIL and "five fails" in by_value[5].user_attrs["reason"]
    assert by_value[16].value == 16
    assert "grid: 4 points" in done.stdout
    assert "3 trials, 1 failed, 1 combinations refused before they took a GPU" in done.stdout
    assert "max_num_seqs=16 (+100.0% against vLLM's defaults" in done.stdout
    assert (tmp_path / "multirun/s/baseline/result.json").exists()


def test_refused_combinations_cost_no_trial(tmp_path: Path):
    autotune(tmp_path, "sampler=random", "n_trials=2", "engine.args.max_num_seqs=choice(3,4)")
    states = [trial.state for trial in trials(tmp_path)]
    assert states.count(TrialState.COMPLETE) == 2
    assert states.count(TrialState.PRUNED) > 0


def test_defaults_within_the_space_are_a_trial_the_sampler_learns_from(tmp_path: Path):
    autotune(tmp_path, "n_trials=1", "engine.args.max_num_seqs=range(6,12)")
    baseline = [trial for trial in trials(tmp_path) if "baseline" in trial.user_attrs]
    assert [trial.params for trial in baseline] == [{"engine.args.max_num_seqs": 8}]


@pytest.mark.slow
def test_defaults_that_win_are_said_to_win(tmp_path: Path):
    done = autotune(tmp_path, "n_trials=1", "engine.args.max_num_seqs=choice(2)")
    assert "No trial beat vLLM's defaults" in done.stdout


def test_trial_over_a_limit_is_kept_but_not_best(tmp_path: Path):
    limits = ["scenario=server", "scenario.ttft_ms=10"]
    done = autotune(tmp_path, *limits, "sampler=grid", "engine.args.max_num_seqs=choice(9,64)")
    over = next(trial for trial in trials(tmp_path) if trial.params.get("engine.args.max_num_seqs") == 64)
    assert over.value == 64 and over.constraints["ttft_p99"] == pytest.approx(5.4)
    assert "Best: max_num_seqs=9 " in done.stdout


@pytest.mark.slow
def test_no_feasible_trial_says_so(tmp_path: Path):
    limits = ["scenario=server", "scenario.ttft_ms=1"]
    done = autotune(tmp_path, *limits, "n_trials=1", "engine.args.max_num_seqs=choice(9,64)")
    assert "No trial is feasible" in done.stdout


def test_baseline_of_nothing_does_not_end_the_study_in_a_traceback(tmp_path: Path):
    limits = ["scenario=server", "scenario.ttft_ms=5", "objective=goodput"]
    done = autotune(tmp_path, *limits, "sampler=grid", "engine.args.max_num_seqs=choice(2,4)")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Best: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["engine.args.max_num_seqs=choice(2,6)"], "exists with other choices for engine.args.max_num_seqs"),
        (["engine.args.max_num_seqs=choice(2,4)", "objective=pareto"], "exists with another objective"),
        (["objective.directions=[maximise]", "engine.args.max_num_seqs=choice(2)"], "neither minimize nor maximize"),
        (["objective.metrics=[a,b]", "engine.args.max_num_seqs=choice(2)"], "2 metrics and 1 directions"),
    ],
)
def test_study_that_can_not_go_on_says_so(tmp_path: Path, changed: list[str], words: str):
    autotune(tmp_path, "n_trials=1", "engine.args.max_num_seqs=choice(2,4)")
    done = autotune(tmp_path, "n_trials=2", *changed)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_choice_with_a_comma_reaches_the_trial_as_it_is(tmp_path: Path):
    autotune(tmp_path, "n_trials=1", "baseline=false", 'engine.args.x=choice("a,b")')
    result = json.loads(next(tmp_path.glob("multirun/s/trial-*/result.json")).read_text())
    assert result["args"]["x"] == "a,b"


def test_hyphenated_flag_is_the_same_flag(tmp_path: Path):
    gpus = ["launcher=gpus", "gpus=[0,1]", "engine.args.tensor-parallel-size=2"]
    autotune(tmp_path, *gpus, "n_trials=1", "baseline=false", "engine.args.max_num_seqs=choice(9)")
    assert json.loads(next(tmp_path.glob("multirun/s/*/lease.json")).read_text())[0] == [0, 1]


def test_pareto_front_is_printed_and_stored(tmp_path: Path):
    objective = ["objective=pareto", "objective.metrics=[tokens_per_s,ttft_p99_ms]"]
    done = autotune(tmp_path, *objective, "sampler=grid", "engine.args.max_num_seqs=choice(2,4)")
    assert "Pareto front" in done.stdout
    front = json.loads((tmp_path / "multirun/s/pareto.json").read_text())
    assert sorted(row["values"][0] for row in front) == [2, 4]


@pytest.mark.slow
def test_n_trials_is_the_total_of_a_study_run_again(tmp_path: Path):
    for total in ("n_trials=2", "n_trials=3"):
        autotune(tmp_path, total, "sampler=random", "engine.args.max_num_seqs=range(20,40)")
    assert len(trials(tmp_path)) == 3


def test_trials_run_side_by_side_on_gpus_of_their_own(tmp_path: Path):
    done = autotune(
        tmp_path,
        "launcher=gpus",
        "gpus=[0,1,2,3]",
        "baseline_gpu=2",
        "sampler=grid",
        "engine.args.max_num_seqs=choice(10,11,12)",
        "engine.args.tensor_parallel_size=choice(1,2)",
    )
    assert done.returncode == 0, done.stderr
    held = [json.loads(path.read_text()) for path in (tmp_path / "multirun/s").glob("*/lease.json")]
    assert json.loads((tmp_path / "multirun/s/baseline/lease.json").read_text())[0] == [2]
    assert sorted(len(gpus) for gpus, _, _ in held) == [1] * 4 + [2] * 3
    for gpus, start, end in held:
        others = [other for other in held if other[1] < end and start < other[2] and other != [gpus, start, end]]
        assert not any(set(gpus) & set(other[0]) for other in others)
    overlaps = [sum(other[1] < end and start < other[2] for other in held) for _, start, end in held]
    assert max(overlaps) > 1
    assert len([trial for trial in trials(tmp_path) if trial.state is TrialState.COMPLETE]) == 6


@pytest.mark.slow
def test_space_that_can_never_run_ends_with_the_reason(tmp_path: Path):
    done = autotune(tmp_path, "baseline=false", "engine.args.max_num_seqs=choice(3)")
    assert done.returncode == 1
    assert "combinations in a row can't be run; the last: three is refused" in done.stderr
