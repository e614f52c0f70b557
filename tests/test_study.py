"""Studies as a user starts them, on a simulated server."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState

from autotune.measure.result import Result
from tests.studies import SEQS, autotune, command, trials

MEMORY, TOKENS = "engine.args.gpu_memory_utilization", "engine.args.max_num_batched_tokens"
LITTLE = 0.15  # of the memory: the weights do not fit
LONG = ["backend.pace=0.004"]  # a trial takes a few tenths of a second


def result(folder: Path, name: str) -> Result:
    return Result.load(folder / "multirun/s" / name)


def test_baseline_failure_and_refusal_are_kept_and_the_study_goes_on(tmp_path: Path):
    space = [f"{SEQS}=choice(16,64,256)", f"{TOKENS}=128", f"{MEMORY}=choice({LITTLE},0.9)"]
    done = autotune(tmp_path, "sampler=grid", *space)
    assert done.returncode == 0, done.stderr
    by_values = {(trial.params[SEQS], trial.params[MEMORY]): trial for trial in trials(tmp_path) if trial.params}
    assert by_values[256, 0.9].state is TrialState.PRUNED
    assert "must be at least max_num_seqs" in by_values[256, 0.9].user_attrs["refused"]
    assert by_values[16, LITTLE].state is TrialState.PRUNED  # a sampler would not see a failed trial
    assert "no memory is left for the KV cache" in by_values[16, LITTLE].user_attrs["reason"]
    assert by_values[64, 0.9].value > by_values[16, 0.9].value
    assert "grid: 6 points" in done.stdout
    assert "4 trials, 2 failed, 2 combinations refused before they took a GPU" in done.stdout
    assert "The best was max_num_seqs=64" in done.stdout and "These are estimates of a simulation" in done.stdout
    assert result(tmp_path, "baseline").complete


def test_refused_combinations_cost_no_trial(tmp_path: Path):
    space = [f"{SEQS}=choice(256,8)", f"{TOKENS}=128", "duplicates=measure"]
    autotune(tmp_path, "sampler=random", "n_trials=2", *space, "baseline=false")
    states = [trial.state for trial in trials(tmp_path)]
    assert states.count(TrialState.COMPLETE) == 2
    assert states.count(TrialState.PRUNED) > 0


def test_defaults_within_the_space_are_a_trial_the_sampler_learns_from(tmp_path: Path):
    autotune(tmp_path, "n_trials=1", f"{SEQS}=range(1000,1100)")
    baseline = [trial for trial in trials(tmp_path) if "baseline" in trial.user_attrs]
    assert [trial.params for trial in baseline] == [{SEQS: 1024}]


@pytest.mark.slow
def test_defaults_that_win_are_said_to_win(tmp_path: Path):
    done = autotune(tmp_path, "n_trials=1", f"{SEQS}=choice(2)")
    assert "No trial beat vLLM's defaults" in done.stdout


def test_trial_over_a_limit_is_kept_but_not_best(tmp_path: Path):
    load = ["scenario=server", "scenario.qps=20", "scenario.tpot_ms=13.5", "scenario.min_duration_s=5"]
    done = autotune(tmp_path, *load, "sampler=grid", f"{TOKENS}=choice(512,8192)", f"{SEQS}=256")
    fast, slow = (next(trial for trial in trials(tmp_path) if trial.params.get(TOKENS) == n) for n in (512, 8192))
    assert slow.constraints["tpot_p99"] > 0 >= fast.constraints["tpot_p99"]
    assert "Best: max_num_batched_tokens=512 " in done.stdout


@pytest.mark.slow
def test_no_feasible_trial_says_so(tmp_path: Path):
    done = autotune(tmp_path, "scenario=server", "scenario.ttft_ms=1", "n_trials=1", f"{SEQS}=choice(9,64)")
    assert "No trial is feasible" in done.stdout


def test_baseline_of_nothing_does_not_end_the_study_in_a_traceback(tmp_path: Path):
    none_good = ["scenario=server", "scenario.ttft_ms=1", "objective=goodput"]
    done = autotune(tmp_path, *none_good, "sampler=grid", f"{SEQS}=choice(2,4)")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "No trial is feasible" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([f"{SEQS}=choice(2,6)"], f"exists with other choices for {SEQS}"),
        ([f"{SEQS}=choice(2,4)", "objective=pareto"], "exists with another objective"),
        (["objective.directions=[maximise]", f"{SEQS}=choice(2)"], "neither minimize nor maximize"),
        (["objective.metrics=[a,b]", f"{SEQS}=choice(2)"], "2 metrics and 1 directions"),
    ],
)
def test_study_that_can_not_go_on_says_so(tmp_path: Path, changed: list[str], words: str):
    autotune(tmp_path, "n_trials=1", f"{SEQS}=choice(2,4)")
    done = autotune(tmp_path, "n_trials=2", *changed)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_choice_with_a_comma_reaches_the_trial_as_it_is(tmp_path: Path):
    autotune(tmp_path, "n_trials=1", "baseline=false", 'engine.args.x=choice("a,b")')
    assert result(tmp_path, "trial-0").args["x"] == "a,b"


def test_hyphenated_flag_is_the_same_flag(tmp_path: Path):
    gpus = ["launcher=gpus", "gpus=[0,1]", "engine.args.tensor-parallel-size=2"]
    autotune(tmp_path, *gpus, "n_trials=1", "baseline=false", f"{SEQS}=choice(9)")
    assert result(tmp_path, "trial-0").facts["leased_gpus"] == "0,1"


def test_pareto_front_is_printed_and_stored(tmp_path: Path):
    objective = ["objective=pareto", "objective.metrics=[tokens_per_s,tpot_p99_ms]"]
    done = autotune(tmp_path, *objective, "sampler=grid", f"{SEQS}=choice(2,64)")
    assert "Pareto front" in done.stdout
    front = json.loads((tmp_path / "multirun/s/pareto.json").read_text())
    assert sorted(row["params"][SEQS] for row in front) == [2, 64]


@pytest.mark.slow
def test_n_trials_is_the_total_of_a_study_run_again(tmp_path: Path):
    for total in ("n_trials=2", "n_trials=3"):
        autotune(tmp_path, total, "sampler=random", f"{SEQS}=range(20,40)")
    assert len(trials(tmp_path)) == 3


def test_trials_run_side_by_side_on_gpus_of_their_own(tmp_path: Path):
    done = autotune(
        tmp_path,
        *LONG,
        "launcher=gpus",
        "gpus=[0,1,2,3]",
        "baseline_gpu=2",
        "sampler=grid",
        f"{SEQS}=choice(10,11,12)",
        "engine.args.tensor_parallel_size=choice(1,2)",
    )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path, "baseline").facts["leased_gpus"] == "2"
    held = []
    for path in (tmp_path / "multirun/s").glob("*/result.json"):
        found = Result.load(path.parent)
        held_s = 0.004 * (found.phases["start"] + found.phases["run"])
        held.append((set(found.facts["leased_gpus"].split(",")), found.ended_at - held_s, found.ended_at))
    assert sorted(len(gpus) for gpus, _, _ in held) == [1] * 4 + [2] * 3
    for gpus, start, end in held:
        others = [other for other in held if other[1] < end and start < other[2] and other != (gpus, start, end)]
        assert not any(gpus & other[0] for other in others)
    overlaps = [sum(other[1] < end and start < other[2] for other in held) for _, start, end in held]
    assert max(overlaps) > 1
    assert len([trial for trial in trials(tmp_path) if trial.state is TrialState.COMPLETE]) == 6


@pytest.mark.slow
def test_space_that_can_never_run_ends_with_the_reason(tmp_path: Path):
    done = autotune(tmp_path, "baseline=false", f"{SEQS}=choice(512)", f"{TOKENS}=128")
    assert done.returncode == 1
    assert "combinations in a row can't be run; the last: max_num_batched_tokens (128)" in done.stderr


def test_prior_starts_with_what_the_simulation_found_best(tmp_path: Path):
    space = [f"{SEQS}=tag(log, int(interval(1,1024)))", "prior=sim", "prior.trials=30", "prior.keep=3"]
    done = autotune(tmp_path, *space, "n_trials=4", "baseline=false")
    assert done.returncode == 0, done.stderr
    first, second, third, other = trials(tmp_path)
    assert first.params[SEQS] > 32 and len({one.params[SEQS] for one in (first, second, third)}) == 3
    assert first.value == pytest.approx(first.user_attrs["expected"]["values"][0])
    assert "expected" not in other.user_attrs
    assert "The simulation was right about all 3 trials" in done.stdout


def test_what_contradicts_the_prior_is_reported(tmp_path: Path):
    space = [f"{SEQS}=choice(8,16,32)", "prior=sim", "prior.trials=10", "prior.keep=2"]
    slower = ["backend.device.math_efficiency=0.3"]
    done = autotune(tmp_path, *space, *slower, "n_trials=2", "baseline=false")
    assert "The simulation was wrong about 2 of the 2 trials" in done.stdout, done.stderr


# A signal while the database executes a statement of the study's first question.
SIGNALLED = """
import runpy, signal
import optuna, sqlalchemy

def signalled(*_):
    signal.raise_signal(signal.SIGTERM)

ask = optuna.Study.ask
def armed(study):
    optuna.Study.ask = ask
    sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", signalled, once=True)
    return ask(study)
optuna.Study.ask = armed
runpy.run_module("autotune", run_name="__main__", alter_sys=True)
"""


def test_signal_amid_a_question_to_the_sampler_ends_the_study_in_order_and_loses_nothing(tmp_path: Path):
    words = command("baseline=false", "n_trials=3", f"{SEQS}=range(4,65)")
    stopped = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *words[3:]], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert stopped.returncode == 128 + signal.SIGTERM and "Traceback" not in stopped.stderr, stopped.stderr
    assert "stopped; results are kept" in stopped.stdout
    assert (tmp_path / "multirun/s/report.html").exists()
    asked = trials(tmp_path)[0].params[SEQS]
    done = autotune(tmp_path, "baseline=false", "n_trials=3", f"{SEQS}=range(4,65)")
    assert done.returncode == 0, done.stderr
    complete = [trial for trial in trials(tmp_path) if trial.state is TrialState.COMPLETE]
    assert len(complete) == 3 and asked in [trial.params[SEQS] for trial in complete]
