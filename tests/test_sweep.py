"""What a study survives: kills, stops, a second process, trials that are slow, bad or too many."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from autotune.errors import InputError
from autotune.sweep.study import seconds
from tests.conftest import processes_in
from tests.studies import SEQS, autotune, command, environment, trials

pytestmark = pytest.mark.slow  # whole studies


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment(folder),
    )  # fmt: skip


def complete(folder: Path) -> list[FrozenTrial]:
    return [trial for trial in trials(folder) if trial.state is TrialState.COMPLETE]


def wait_for(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(complete(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gone(folder: Path) -> bool:
    deadline = time.monotonic() + 10
    while processes_in(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


GRID = ["sampler=grid", f"{SEQS}=range(4,24)", "launcher=gpus", "gpus=[0,1]", "backend.pace=0.003"]


def test_killed_study_goes_on_and_runs_each_point_once(tmp_path: Path):
    draw = random.Random(1)
    for _ in range(4):
        study = start(tmp_path, *GRID)
        time.sleep(draw.uniform(2.5, 5))
        study.kill()
        study.wait()
        assert gone(tmp_path)
    assert autotune(tmp_path, *GRID, "resume=true").returncode == 0
    done = complete(tmp_path)
    assert sorted(trial.params[SEQS] for trial in done) == list(range(4, 24))
    assert not [trial for trial in trials(tmp_path) if not trial.state.is_finished()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_study_keeps_what_it_has_and_leaves_no_process(tmp_path: Path, number: int):
    study = start(tmp_path, *GRID)
    wait_for(tmp_path, 1)
    study.send_signal(number)
    study.wait(60)
    assert study.returncode != 0 and gone(tmp_path)
    assert "Traceback" not in (study.stderr.read() if study.stderr else "")
    assert complete(tmp_path) and (tmp_path / "multirun/s/summary.txt").exists()
    assert not [trial for trial in trials(tmp_path) if trial.state is TrialState.RUNNING]


def test_second_process_on_one_study_is_refused(tmp_path: Path):
    study = start(tmp_path, *GRID)
    wait_for(tmp_path, 1)
    second = autotune(tmp_path, *GRID)
    assert second.returncode == 1 and "another process works on this study (process" in second.stderr
    study.terminate()
    study.wait(60)


def test_resume_of_nothing_is_said(tmp_path: Path):
    done = autotune(tmp_path, "resume=true", f"{SEQS}=choice(4,8)")
    assert done.returncode == 1 and "resume=true: there is no study in" in done.stderr


def test_study_that_goes_on_does_not_suggest_its_first_points_again(tmp_path: Path):
    for total in ("n_trials=3", "n_trials=6"):
        autotune(tmp_path, total, "sampler=random", "baseline=false", f"{SEQS}=range(10,1000)")
    values = [trial.params[SEQS] for trial in trials(tmp_path)]
    assert len(values) == 6 and len(set(values)) == 6


def test_failures_in_a_row_end_the_study_with_their_reasons(tmp_path: Path):
    broken = ["engine.args.gpu_memory_utilization=0.1", f"{SEQS}=range(4,100)", "max_failures=3", "n_trials=50"]
    done = autotune(tmp_path, *broken)
    assert done.returncode == 1
    assert "max_failures=3 trials failed in a row: StartError: no memory is left for the KV cache" in done.stderr
    assert len(trials(tmp_path)) <= 3


def test_budget_ends_the_asking_and_the_study_reports(tmp_path: Path):
    done = autotune(tmp_path, "budget=5m", "n_trials=50", f"{SEQS}=range(4,1000)")
    assert done.returncode == 0 and "Study s:" in done.stdout
    assert 2 <= len(trials(tmp_path)) <= 5  # some 95 simulated seconds each


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5d", 129_600)])
def test_durations_are_read(text: str, expected: float):
    assert seconds(text) == expected


def test_duration_without_a_unit_is_refused():
    with pytest.raises(InputError, match="budget=90: write a duration"):
        seconds("90")


@pytest.mark.parametrize("launcher", [["launcher=inline"], ["launcher=gpus", "gpus=[0]"]])
def test_bad_trial_is_pruned_while_it_runs(tmp_path: Path, launcher: list[str]):
    long = ["scenario.min_queries=600", "backend.pace=0.02", "baseline=false", *launcher]
    pruner = ["pruner=median", "pruner.n_startup_trials=1", "pruner.n_warmup_steps=3"]
    autotune(tmp_path, *long, *pruner, "sampler=grid", f"{SEQS}=choice(256,1)")
    by_value = {trial.params[SEQS]: trial for trial in trials(tmp_path)}
    if by_value[1].number == 0:  # the grid's order is drawn: nothing to compare the first one with
        assert by_value[1].state is TrialState.COMPLETE
    else:
        assert by_value[1].state is TrialState.PRUNED and by_value[1].value == pytest.approx(
            by_value[1].intermediate_values[max(by_value[1].intermediate_values)]
        )
    assert by_value[256].state is TrialState.COMPLETE


def test_search_that_can_hardly_be_the_best_any_more_is_pruned(tmp_path: Path):
    search = ["scenario=interactive", "objective=max_qps", "pruner=behind", "backend.pace=0.02", "sampler=grid"]
    done = autotune(tmp_path, *search, f"{SEQS}=choice(4,1024)")  # 1,024 is the baseline
    assert done.returncode == 0, done.stderr
    by_value = {trial.params[SEQS]: trial for trial in trials(tmp_path)}
    assert by_value[4].state is TrialState.PRUNED
    assert min(by_value[4].intermediate_values.values()) < 0.9 * by_value[1024].value
    assert "pruned at failing_qps" in done.stdout and "1 ended early by the pruner" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pruner=median", "objective=latency"], "pruner: needs one objective among tokens_per_s"),
        (["pruner=median", "objective=max_qps", "scenario=interactive"], "write pruner=behind"),
        (["pruner=behind"], "pruner=behind: needs objective=max_qps"),
        (["pruner=median", "pruner.n_startup_trials=-1"], "autotune: pruner: Number of startup trials"),
        (["sampler=nsga2", "hydra.sweeper.sampler.population_size=1"], "autotune: hydra.sweeper.sampler: `population"),
    ],
)
def test_pruner_or_sampler_that_can_not_be_made_or_watch_is_refused(tmp_path: Path, words: list[str], said: str):
    done = autotune(tmp_path, *words, f"{SEQS}=choice(4,8)")
    assert done.returncode == 1 and said in done.stderr


def test_several_objectives_are_measured_while_a_trial_says_how_far_it_is(tmp_path: Path):
    pace = ["backend.pace=0.02", "scenario.min_queries=600"]
    done = autotune(tmp_path, "objective=pareto", "n_trials=1", *pace, f"{SEQS}=choice(64)")
    assert done.returncode == 0, done.stderr
    assert [trial.state for trial in trials(tmp_path)] == [TrialState.COMPLETE]


@pytest.mark.parametrize("storage", ["journal://multirun/s/study.log", "sqlite:///other.db"])
def test_study_is_kept_where_the_storage_says(tmp_path: Path, storage: str):
    done = autotune(tmp_path, "n_trials=1", f"hydra.sweeper.storage={storage}", f"{SEQS}=choice(4,8)")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / storage.rpartition("://")[2].lstrip("/")).exists()


def test_upstream_sweeper_still_drives_trials(tmp_path: Path):
    done = autotune(tmp_path, "hydra/sweeper=optuna", "n_trials=2", f"{SEQS}=choice(4,8)")
    assert done.returncode == 0, done.stderr
    assert "best_value" in (tmp_path / "multirun/s/optimization_results.yaml").read_text()


def test_trials_see_those_that_run(tmp_path: Path):
    """With a constant liar, trials that are asked while others run are spread over the space."""
    space = ["launcher=gpus", "gpus=[0,1,2,3]", "backend.pace=0.002", f"{SEQS}=range(1,512)", "n_trials=8"]
    autotune(tmp_path, *space, "hydra.sweeper.sampler.n_startup_trials=4", "baseline=false")
    values = [trial.params[SEQS] for trial in trials(tmp_path)]
    assert len(set(values)) == 8
    assert json.loads((tmp_path / "multirun/s/trial-0/result.json").read_text())["facts"]["leased_gpus"]
