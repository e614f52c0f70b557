"""What a study asks, keeps and says: on a stand-in for vLLM where its figures do not matter, else simulated."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from autotune.errors import InputError, MeasureError
from autotune.measure.backend import Measurement
from autotune.measure.result import Result
from autotune.results.study import ON_SHARED, load, results_in
from tests.standin import FLATTERED, StandInEngine
from tests.studies import SEQS, asked, autotune, study, trials

MEMORY, TOKENS = "engine.args.gpu_memory_utilization", "engine.args.max_num_batched_tokens"
LITTLE = 0.15  # of the memory: the weights do not fit
LONG = ["backend.pace=0.004"]  # a trial takes a few tenths of a second


def result(folder: Path, name: str) -> Result:
    return Result.load(folder / "multirun/s" / name)


def test_baseline_failure_and_refusal_are_kept_and_the_study_goes_on(tmp_path: Path):
    space = [f"{SEQS}=choice(16,64,256)", f"{TOKENS}=128", f"{MEMORY}=choice({LITTLE},0.9)"]
    said = study(tmp_path, "sampler=grid", *space)
    by_values = {(trial.params[SEQS], trial.params[MEMORY]): trial for trial in asked(tmp_path) if trial.params}
    assert by_values[256, 0.9].state is TrialState.PRUNED
    assert "must be at least max_num_seqs" in by_values[256, 0.9].user_attrs["refused"]
    assert by_values[16, LITTLE].state is TrialState.PRUNED  # a sampler would not see a failed trial
    assert "no memory is left for the KV cache" in by_values[16, LITTLE].user_attrs["reason"]
    assert by_values[64, 0.9].value > by_values[16, 0.9].value
    assert "grid: 6 points" in said
    assert "4 trials, 2 failed, 2 combinations refused before taking a GPU" in said
    assert "The best was max_num_seqs=64" in said and "These are estimates of a simulation" in said
    assert result(tmp_path, "baseline").complete


def test_refused_combinations_cost_no_trial(tmp_path: Path):
    space = [f"{SEQS}=choice(256,8)", f"{TOKENS}=128", "duplicates=measure"]
    study(tmp_path, "sampler=random", "n_trials=2", *space, "baseline=false")
    states = [trial.state for trial in asked(tmp_path)]
    assert states.count(TrialState.COMPLETE) == 2
    assert states.count(TrialState.PRUNED) > 0


def test_defaults_within_the_space_are_a_trial_the_sampler_learns_from(tmp_path: Path):
    study(tmp_path, "n_trials=1", f"{SEQS}=range(1000,1100)")
    baseline = [trial for trial in asked(tmp_path) if "baseline" in trial.user_attrs]
    assert [trial.params for trial in baseline] == [{SEQS: 1024}]


def test_defaults_that_win_are_said_to_win(tmp_path: Path):
    assert "No trial beat vLLM's defaults" in study(tmp_path, "n_trials=1", f"{SEQS}=choice(2)")


RECIPE = ["model.recipe.args.max_num_seqs=64"]


def test_recipe_is_a_second_baseline_also_of_a_study_that_goes_on(tmp_path: Path):
    study(tmp_path, "n_trials=1", f"{SEQS}=range(16,33)")
    study(tmp_path, "n_trials=2", f"{SEQS}=range(16,33)", "baseline=[defaults,recipe]", *RECIPE)
    found = results_in(tmp_path / "multirun/s")
    assert list(found)[:2] == ["baseline", "recipe"] and len(found) == 4
    assert (found["recipe"].params, found["recipe"].args["max_num_seqs"]) == ({SEQS: 64}, 64)
    assert not any("baseline" in trial.user_attrs for trial in asked(tmp_path))  # neither is in the space
    assert sum(trial.state is TrialState.COMPLETE for trial in asked(tmp_path)) == 2
    summary = (tmp_path / "multirun/s/summary.txt").read_text()
    assert "against vLLM's defaults, " in summary and "% against the recipe, estimated once each" in summary


def test_recipe_within_the_space_is_a_trial_the_sampler_learns_from_and_is_not_run_again(tmp_path: Path):
    said = study(tmp_path, "sampler=grid", f"{SEQS}=choice(64,128)", "baseline=[recipe]", *RECIPE)
    assert " repeats recipe" in said and not (tmp_path / "multirun/s/baseline").exists()
    assert [trial.params for trial in asked(tmp_path) if "baseline" in trial.user_attrs] == [{SEQS: 64}]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["only_if={scenario.foo: async_scheduling}"], "only_if.scenario.foo: no parameter has that name"),
        (
            ["only_if.max_num_seqs=async_scheduling"],
            "only_if.max_num_seqs: no parameter has that name; write its whole",
        ),
        (["launcher=slurm", "launcher.cluster=none"], "launcher.cluster=none: AutoExecutor doesn't know"),
        (["hydra.sweeper.storage=3"], "hydra.sweeper.storage=3: not a URL; write sqlite:///<file>"),
        (["hydra.sweeper.storage=postgres://a/b"], "hydra.sweeper.storage=postgres://a/b: not a URL; write sqlite:///"),
        (
            ["hydra.sweeper.storage=mssql+pyodbc://a/b"],
            "Please install appropriate one.; install that database's driver",
        ),
        (
            ["hydra.sweeper.storage=journal:///tmp"],
            "journal:///tmp: no file can be made there (a folder); write another",
        ),
        (["baseline=recipe"], "baseline=recipe: llama8b has none; leave it out, or write model.recipe.args.<flag>="),
        (["baseline=[defaults,best]", *RECIPE], "baseline=best: write false, defaults, recipe, or [defaults,recipe]"),
        (
            ["baseline=recipe", f"{TOKENS}=32", *RECIPE],
            "baseline=recipe: vLLM refuses max_num_seqs=64: max_num_batched",
        ),
    ],
)
def test_recipe_that_can_not_be_run_is_refused(words: list[str], said: str, tmp_path: Path):
    with pytest.raises(InputError, match=re.escape(said)):
        study(tmp_path, "n_trials=1", f"{SEQS}=choice(2,4)", *words)


def test_trial_over_a_limit_is_kept_but_not_best(tmp_path: Path):
    load = ["scenario=server", "scenario.qps=0.1", "scenario.tpot_ms=20"]
    said = study(tmp_path, *load, "sampler=grid", f"{SEQS}=choice(64,256)")
    slow, fast = sorted(asked(tmp_path), key=lambda trial: trial.values[0])
    assert fast.constraints["tpot_p99"] > 0 >= slow.constraints["tpot_p99"]
    assert "Best: max_num_seqs=64 " in said


@pytest.mark.parametrize("objective", ["throughput", "goodput"])
def test_no_feasible_trial_says_so(tmp_path: Path, objective: str):
    none_good = ["scenario=server", "scenario.ttft_ms=1", f"objective={objective}"]
    assert "No trial is feasible" in study(tmp_path, *none_good, "sampler=grid", f"{SEQS}=choice(2,4)")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([f"{SEQS}=choice(2,6)"], f"exists with other choices for {SEQS}"),
        ([f"{SEQS}=range(2,6)"], f"exists with other choices for {SEQS}"),
        ([f"{SEQS}=choice(2,4)", "objective=pareto"], "was measured with objective.directions="),
        (["objective.directions=[maximise]", f"{SEQS}=choice(2)"], "neither minimize nor maximize"),
        (["objective.metrics=[a,b]", f"{SEQS}=choice(2)"], "2 metrics and 1 directions"),
    ],
)
def test_study_that_can_not_go_on_says_so(tmp_path: Path, changed: list[str], words: str):
    study(tmp_path, "n_trials=1", "baseline=false", f"{SEQS}=choice(2,4)")
    with pytest.raises(InputError, match=re.escape(words)):
        study(tmp_path, "n_trials=2", *changed)


def test_choice_with_a_comma_reaches_the_trial_as_it_is(tmp_path: Path):
    study(tmp_path, "n_trials=1", "baseline=false", 'engine.args.x=choice("a,b")')
    assert result(tmp_path, "trial-0").args["x"] == "a,b"


def test_pareto_front_is_printed_and_stored(tmp_path: Path):
    objective = ["objective=pareto", "objective.metrics=[tokens_per_s,tpot_p99_ms]"]
    assert "Pareto front" in study(tmp_path, *objective, "sampler=grid", f"{SEQS}=choice(2,64)")
    front = json.loads((tmp_path / "multirun/s/pareto.json").read_text())
    assert sorted(row["params"][SEQS] for row in front) == [2, 64]


def test_n_trials_is_the_total_of_a_study_run_again(tmp_path: Path):
    for total in ("n_trials=2", "n_trials=3"):
        study(tmp_path, total, "sampler=random", f"{SEQS}=range(20,40)")
    assert len(asked(tmp_path)) == 3


def test_trial_leases_as_many_gpus_as_its_flags_take_and_the_baseline_its_own(tmp_path: Path):
    words = ["gpus=[0,1,2]", "baseline_gpu=2", "sampler=grid", "engine.args.tensor-parallel-size=choice(2)"]
    study(tmp_path, *words)
    assert result(tmp_path, "baseline").facts["leased_gpus"] == "2"
    assert len(result(tmp_path, "trial-0").facts["leased_gpus"].split(",")) == 2


@pytest.mark.slow
def test_trials_of_different_sizes_never_share_a_gpu(tmp_path: Path):
    space = ["sampler=grid", f"{SEQS}=choice(10,11,12)", "engine.args.tensor_parallel_size=choice(1,2)"]
    done = autotune(tmp_path, *LONG, *space, "launcher=gpus", "gpus=[0,1,2,3]", "baseline_gpu=2")
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


def test_space_that_can_never_run_ends_with_the_reason(tmp_path: Path):
    message = r"100 combinations can't be run: max_num_batched_tokens \(128\)"
    with pytest.raises(InputError, match=message):
        study(tmp_path, "baseline=false", f"{SEQS}=choice(512)", f"{TOKENS}=128")


def test_space_that_is_refused_as_its_defaults_are_is_told_before_anything_starts(tmp_path: Path):
    told = r"vLLM refuses its defaults and 100 combinations of the space: max_num_batched_tokens \(4\).*; change what"
    with pytest.raises(InputError, match=told):
        study(tmp_path, f"{MEMORY}=choice(0.8,0.9)", f"{TOKENS}=4", f"{SEQS}=5")
    assert not (tmp_path / "multirun/s").exists()


def test_space_of_which_little_is_left_ends_the_study_in_order_and_one_line_tells_the_refusals(tmp_path: Path):
    said = study(tmp_path, "baseline=false", "sampler=random", f"{SEQS}=range(127,227)", f"{TOKENS}=128")
    ran = len({trial.params[SEQS] for trial in asked(tmp_path) if trial.state is TrialState.COMPLETE})
    assert said.count("can't be run") == ran + 1 and "stopping: 100 combinations can't be run: max_num" in said


def test_grid_runs_its_points_however_many_are_refused_in_a_row(tmp_path: Path):
    study(tmp_path, "sampler=grid", "baseline=false", f"{TOKENS}=128", f"{SEQS}=range(120,260)")
    assert sum(trial.state is TrialState.COMPLETE for trial in asked(tmp_path)) == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([f"{SEQS}=int(interval(1,2000000000))"], f"sampler=grid: 2,000,000,000 points, each a trial, as {SEQS} has"),
        ([f"{SEQS}=range(1,1002)"], f"sampler=grid: 1,001 points, each a trial, as {SEQS} has 1,001 values; thin"),
        ([f"{SEQS}=choice(1,2)", "warm_start=other"], "sampler=grid: it runs every point; leave out warm_start"),
    ],
)
def test_grid_that_is_too_large_or_begins_with_other_trials_is_refused(tmp_path: Path, words: list[str], said: str):
    with pytest.raises(InputError, match=re.escape(said)):
        study(tmp_path, "sampler=grid", *words)
    assert not (tmp_path / "multirun/s").exists()


@pytest.mark.slow
def test_prior_starts_with_what_the_simulation_found_best(tmp_path: Path):
    space = [f"{SEQS}=tag(log, int(interval(1,1024)))", "prior=sim", "prior.trials=20", "prior.keep=3"]
    said = study(tmp_path, *space, "n_trials=4", "baseline=false", simulated=True)
    first, second, third, other = asked(tmp_path)
    assert first.params[SEQS] > 32 and len({one.params[SEQS] for one in (first, second, third)}) == 3
    assert first.value == pytest.approx(first.user_attrs["expected"]["values"][0])
    assert "expected" not in other.user_attrs
    assert "The simulation was right about all 3 trials" in said


@pytest.mark.slow
def test_what_contradicts_the_prior_is_reported(tmp_path: Path):
    space = [f"{SEQS}=choice(8,16,32)", "prior=sim", "prior.trials=10", "prior.keep=2"]
    said = study(tmp_path, *space, "n_trials=2", "baseline=false")
    assert "The simulation was wrong about 2 of the 2 trials" in said


def test_signal_amid_a_question_to_the_sampler_ends_the_study_in_order_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ask = optuna.Study.ask

    def armed(study: optuna.Study) -> optuna.Trial:
        """A signal comes while the database executes the first statement of the first question."""
        monkeypatch.undo()
        sqlalchemy.event.listen(
            sqlalchemy.Engine, "after_cursor_execute", lambda *_: signal.raise_signal(signal.SIGTERM), once=True
        )
        return ask(study)

    words = ["hydra.sweeper.storage=null", "baseline=false", "n_trials=3", f"{SEQS}=range(4,65)"]
    monkeypatch.setattr(optuna.Study, "ask", armed)
    with pytest.raises(SystemExit) as ended:
        study(tmp_path, *words)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped; " in (tmp_path / "multirun/s/autotune.log").read_text()
    lost = trials(tmp_path)[0].params[SEQS]
    study(tmp_path, *words)
    complete = [trial for trial in trials(tmp_path) if trial.state is TrialState.COMPLETE]
    assert len(complete) == 3 and lost in [trial.params[SEQS] for trial in complete]


MODE, SIZES = "engine.args.compilation_config.cudagraph_mode", "engine.args.compilation_config.cudagraph_capture_sizes"
SPECULATIVE = "engine.args.speculative_config"


@pytest.mark.parametrize(
    "sampler", ["tpe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grid", "random", "nsga2", "botorch"))]
)
def test_objects_and_lists_are_swept_by_every_sampler_and_go_on(tmp_path: Path, sampler: str):
    swept = [
        f"sampler={sampler}",
        f"{MODE}=choice(FULL,PIECEWISE)",
        f"{SIZES}=choice([1,2],[1,2,4])",
        f"{SPECULATIVE}=choice({{method:ngram,num_speculative_tokens:4}},default)",
        "engine.args.compilation_config.mode=3",
        "conditions.mine=\"cudagraph_mode == 'FULL' or len(compilation_config.cudagraph_capture_sizes) > 2\"",
    ]
    study(tmp_path, *swept, "n_trials=3")
    study(tmp_path, *swept, "n_trials=4")
    results = [one for one in results_in(tmp_path / "multirun/s").values() if one.params and one.complete]
    assert len({json.dumps(one.params) for one in results if not one.duplicate_of}) >= 4
    for one in results:
        assert one.args["compilation_config"] == {
            "mode": 3,
            "cudagraph_mode": one.params[MODE],
            "cudagraph_capture_sizes": json.loads(one.params[SIZES]),
        }
        assert one.params[MODE] == "FULL" or one.params[SIZES] == "[1, 2, 4]"
        chosen = one.params[SPECULATIVE]
        assert one.args["speculative_config"] == (None if chosen == "default" else json.loads(chosen))


SHARED = ["backend.shares=true", "sampler=grid"]


def test_best_trial_on_a_shared_server_is_measured_on_one_of_its_own_before_it_wins(tmp_path: Path):
    said = study(tmp_path, *SHARED, f"{SEQS}=choice(64,1100)", "scenario.min_queries=64")
    assert "trial-1 is the best; it shared a server, and is measured again on one of its own" in said
    assert "started by trial-0" in result(tmp_path, "trial-1").facts["server"]
    fresh = result(tmp_path, "fresh-trial-1")
    assert fresh.facts["server"] == result(tmp_path, "baseline").facts["server"] == "fresh"
    counted = results_in(tmp_path / "multirun/s")["trial-1"]
    assert counted.values == fresh.values and counted.params == {SEQS: 64}
    assert "2 trials shared 1 server" in said and f"trial-1 on a server of its own: {fresh.values[0]:,.0f}" in said
    assert json.loads(counted.facts[ON_SHARED]) == [pytest.approx(FLATTERED * fresh.values[0])]
    assert load(str(tmp_path / "multirun/s")).config_of("trial-1").backend["bounds"] is None  # it is verified alone


def test_best_trial_whose_own_server_fails_is_measured_on_another_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, crashes = StandInEngine.run, ["the server crashed"]

    def run(engine: StandInEngine, *arguments: Any) -> Measurement:
        if engine.folder.name.startswith("fresh-") and crashes:
            raise MeasureError(crashes.pop())
        return whole(engine, *arguments)

    monkeypatch.setattr(StandInEngine, "run", run)
    said = study(tmp_path, *SHARED, f"{SEQS}=choice(64)")
    assert "fresh-trial-0: failed: MeasureError: the server crashed" in said and "once more" in said
    assert load(str(tmp_path / "multirun/s")).best == "trial-0" and result(tmp_path, "fresh-trial-0").complete


def test_trial_that_repeats_the_best_one_does_not_win_by_what_a_shared_server_told(tmp_path: Path):
    said = study(tmp_path, "backend.shares=true", "sampler=random", f"{SEQS}=choice(64,1100)", "n_trials=3")
    assert "proposals in a row were already measured" in said and said.count("is measured again on one of its own") == 1
    (fresh,) = (tmp_path / "multirun/s").glob("fresh-*")
    found = load(str(tmp_path / "multirun/s"))
    assert found.best and found.results[found.best].values == Result.load(fresh).values


def test_trial_on_a_shared_server_does_not_win_where_three_others_were_measured_on_their_own(tmp_path: Path):
    said = study(tmp_path, *SHARED, f"{SEQS}=choice(60,61,62,63,64)")
    assert said.count("is measured again on one of its own") == 3 and "Best: max_num_seqs=64 " in said
    assert "was not measured on one of its own: autotune verify" in said


def test_shared_server_that_flatters_a_trial_does_not_make_it_win(tmp_path: Path):
    said = study(tmp_path, *SHARED, f"{SEQS}=choice(1040)")  # a little slower than the defaults
    assert "fresh-trial-0" in said and "No trial beat vLLM's defaults" in said


def test_trials_share_no_server_where_what_is_swept_needs_a_start(tmp_path: Path):
    study(tmp_path, *SHARED, "engine.args.block_size=choice(16,32)")
    assert result(tmp_path, "trial-0").facts["server"] == "fresh"
    assert not (tmp_path / "multirun/s/fresh-trial-0").exists()


def test_processes_of_launcher_gpus_keep_their_server_for_the_next_trial(tmp_path: Path):
    study(tmp_path, *SHARED, f"{SEQS}=range(10,18)", "launcher=gpus", "gpus=[0,1]", "baseline=false")
    told = [result(tmp_path, f"trial-{number}").facts["server"] for number in range(8)]
    assert len(set(told)) == 2 and all(one.startswith("shared: started by trial-") for one in told)
