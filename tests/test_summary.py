"""What a user reads at the end of a trial and of a study."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from autotune.config.schema import Config, Kind, ModelConfig, ObjectiveConfig, ScenarioConfig, TrackingConfig
from autotune.measure.result import Result
from autotune.results import summary

MAXIMIZE = ObjectiveConfig("throughput", ["tokens_per_s"], ["maximize"])
MINIMIZE = ObjectiveConfig("latency", ["ttft_p99_ms"], ["minimize"])


def config(objective: ObjectiveConfig = MAXIMIZE) -> Config:
    return Config(study="s", model=ModelConfig(name="m"), objective=objective, tracking=TrackingConfig(enabled=False))


def result(value: float, over: float = -1.0, command: str = "x") -> Result:
    metrics = dict.fromkeys(("tokens_per_s", "samples_per_s", "ttft_p99_ms", "tpot_p99_ms", "latency_p99_ms"), value)
    command_line = ["vllm", "serve", command]
    return Result("complete", values=[value], constraints={"ttft_p99": over}, metrics=metrics, command=command_line)


def study(folder: Path, baseline: Result | None, *trials: Result, objective: ObjectiveConfig = MAXIMIZE):
    """A study as its trials leave it: in Optuna and in `folder`."""
    made = optuna.create_study(directions=objective.directions)
    named = {f"trial-{number}": trial for number, trial in enumerate(trials)}
    for name, one in named.items() if baseline is None else {"baseline": baseline, **named}.items():
        (folder / name).mkdir()
        one.save(folder / name)
    for number, one in enumerate(trials):
        made.add_trial(
            create_trial(
                state=TrialState.COMPLETE if one.complete else TrialState.FAIL,
                values=one.values if one.complete else None,
                params={"engine.args.max_num_seqs": number},
                distributions={"engine.args.max_num_seqs": IntDistribution(0, 9)},
                constraints=one.constraints,
                user_attrs={"reason": one.reason} if one.reason else {},
            )
        )
    return made


def test_trials_that_wait_to_be_run_are_not_counted(tmp_path: Path):
    made = study(tmp_path, None, result(1.0))
    made.enqueue_trial({"engine.args.max_num_seqs": 5})
    assert "Study s: 1 trials, 0 failed" in summary.words(made, tmp_path, config())
    assert summary.headline(made, tmp_path, config())["trials"] == 1


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (Result(reason="StartError: out of memory"), "failed: StartError: out of memory"),
        (Result("complete", values=[1234.5], verdict="VALID"), "tokens_per_s 1234; LoadGen: VALID"),
        (
            Result("complete", values=[5.0], verdict="INVALID", reasons=["too short"], constraints={"ttft_p99": 0.25}),
            "tokens_per_s 5; LoadGen: INVALID (too short); infeasible: ttft_p99 over by 25%",
        ),
    ],
)
def test_trial_ends_in_one_line(trial: Result, words: str):
    assert summary.outcome(trial, ["tokens_per_s"]) == words


@pytest.mark.parametrize(("objective", "best"), [(MAXIMIZE, 1), (MINIMIZE, 0)], ids=["maximize", "minimize"])
def test_best_is_feasible_and_follows_the_direction(tmp_path: Path, objective: ObjectiveConfig, best: int):
    trials = [result(10), result(20), result(5, over=0.1), result(40, over=0.1), Result(reason="E: x")]
    found = summary.best(study(tmp_path, None, *trials, objective=objective))
    assert found is not None and found.number == best


def test_winner_is_shown_with_its_gain_and_its_command(tmp_path: Path):
    made = study(tmp_path, result(10, command="default"), result(9), result(12, command="winner"))
    shown = summary.words(made, tmp_path, config())
    assert "Study s: 2 trials, 0 failed" in shown
    assert "Best: max_num_seqs=1 (+20.0% against vLLM's defaults" in shown
    assert "\n  vllm serve winner\n" in shown and "serve default" not in shown


@pytest.mark.parametrize(
    ("queued_ms", "edge"), [(28.8, True), (31.1, True), (15.5, False), (63.4, False), (None, False)]
)
def test_best_that_holds_by_a_hair_is_said_to(tmp_path: Path, queued_ms: float | None, edge: bool):
    best = result(12)
    if queued_ms:
        best.metrics["queued_tpot_p99_ms"] = queued_ms
    limited = replace(config(), scenario=ScenarioConfig(name="interactive", kind=Kind.Server, tpot_ms=30))
    shown = summary.words(study(tmp_path, result(10), best), tmp_path, limited)
    assert (f"its TPOT is {queued_ms} ms (p99) where 30 are allowed" in shown) == edge


def test_edge_is_that_of_what_is_served(tmp_path: Path):
    loser = result(9)
    loser.metrics["queued_tpot_p99_ms"] = 29.0
    limited = replace(config(), scenario=ScenarioConfig(name="interactive", kind=Kind.Server, tpot_ms=30))
    assert "On an edge" not in summary.words(study(tmp_path, result(10), loser), tmp_path, limited)


def test_lower_latency_wins(tmp_path: Path):
    made = study(tmp_path, result(10), result(8, command="winner"), objective=MINIMIZE)
    assert "Best: max_num_seqs=0 (-20.0% against" in summary.words(made, tmp_path, config(MINIMIZE))


def test_defaults_that_win_are_served(tmp_path: Path):
    shown = summary.words(study(tmp_path, result(10, command="default"), result(9)), tmp_path, config())
    assert "No trial beat vLLM's defaults" in shown and "\n  vllm serve default\n" in shown


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (Result(reason="StartError: no memory"), "baseline failed: StartError: no memory"),
        (result(10, over=1.0), "baseline is infeasible: "),
    ],
)
def test_baseline_that_is_no_measure_is_said_to_be_none(tmp_path: Path, baseline: Result, words: str):
    shown = summary.words(study(tmp_path, baseline, result(9)), tmp_path, config())
    assert words in shown and "Best: max_num_seqs=0 (no usable baseline to compare with)" in shown


def test_study_without_a_usable_trial_says_why(tmp_path: Path):
    trials = [Result(reason="StartError: no memory"), Result(reason="StartError: no memory"), result(9, over=1.0)]
    shown = summary.words(study(tmp_path, None, *trials), tmp_path, config())
    assert "3 trials, 2 failed" in shown
    assert shown.count("  StartError: no memory") == 1
    assert "No trial is feasible: loosen the limits" in shown


def test_headline_figures_name_the_metric(tmp_path: Path):
    made = study(tmp_path, result(10), result(12), Result(reason="E: x"))
    assert summary.headline(made, tmp_path, config()) == {
        "trials": 2,
        "failed_trials": 1,
        "baseline_tokens_per_s": 10,
        "best_tokens_per_s": 12,
        "gain_percent": pytest.approx(20),
    }
