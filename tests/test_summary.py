"""What a user reads at the end of a trial and of a study."""

from dataclasses import replace
from pathlib import Path

import pytest

from autotune.config.schema import (
    Config,
    Kind,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    ScenarioConfig,
    TrackingConfig,
)
from autotune.measure.result import Result
from autotune.results import summary
from autotune.results.study import Study

MAXIMIZE = ObjectiveConfig("throughput", ["tokens_per_s"], ["maximize"])
MINIMIZE = ObjectiveConfig("latency", ["ttft_p99_ms"], ["minimize"])


def config(objective: ObjectiveConfig = MAXIMIZE) -> Config:
    return Config(study="s", model=ModelConfig(name="m"), objective=objective, tracking=TrackingConfig(enabled=False))


CONFIG = config()


def result(value: float, over: float = -1.0, command: str = "x") -> Result:
    metrics = dict.fromkeys(("tokens_per_s", "samples_per_s", "ttft_p99_ms", "tpot_p99_ms", "latency_p99_ms"), value)
    command_line = ["vllm", "serve", command]
    return Result("complete", values=[value], constraints={"ttft_p99": over}, metrics=metrics, command=command_line)


def study(baseline: Result | None, *trials: Result, config: Config = CONFIG) -> Study:
    """A study whose trial-N ran with max_num_seqs=N."""
    results = {} if baseline is None else {"baseline": baseline}
    for number, trial in enumerate(trials):
        trial.params = {"engine.args.max_num_seqs": number}
        results[f"trial-{number}"] = trial
    return Study(Path("multirun/s"), config, results)


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (Result("interrupted"), "1 trial, 0 failed\n"),
        (Result("refused", "too small"), "1 trial, 0 failed, 1 combination refused before taking a GPU\n"),
        (Result("pruned"), "2 trials, 0 failed, 1 ended early\n"),
        (Result("failed", "E: x"), "2 trials, 1 failed\n"),
        (replace(result(1.0), duplicate_of="trial-0"), "1 trial, 0 failed, 1 asked for again and looked up\n"),
    ],
    ids=lambda one: one.state if isinstance(one, Result) else "",
)
def test_trials_are_counted_by_how_they_ended(trial: Result, words: str):
    made = study(result(10), result(1.0), trial)
    assert f"Study s: {words}" in summary.render(made)
    assert summary.headline(made)["trials"] == int(words[0])


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (Result(reason="StartError: out of memory"), "failed: StartError: out of memory"),
        (Result("complete", values=[1234.5], verdict="VALID"), "tokens_per_s 1,234; LoadGen: VALID"),
        (Result("complete", values=[9.0], verdict="VALID", verdict_by="autotune"), "tokens_per_s 9; autotune: VALID"),
        (
            Result("complete", values=[5.0], verdict="INVALID", reasons=["too short"], constraints={"ttft_p99": 0.25}),
            "tokens_per_s 5; LoadGen: INVALID (too short); infeasible: ttft_p99 over by 25%",
        ),
    ],
)
def test_trial_ends_in_one_line(trial: Result, words: str):
    assert summary.outcome(trial, CONFIG) == words


@pytest.mark.parametrize(
    ("upper", "words"),
    [(30.2, ["TPOT p99 up to 30.2 ms (limit 30)"]), (None, ["tpot_p99 over by less than 1%"]), (0, [])],
)
def test_broken_limit_is_told_in_its_own_unit(upper: float | None, words: list[str]):
    """What was measured, or where that is within the limit, the bound by which it was judged."""
    limited = replace(CONFIG, scenario=ScenarioConfig(name="server", kind=Kind.Server, tpot_ms=30))
    trial = replace(result(29.5), constraints={"tpot_p99": 0.002 if upper != 0 else -0.1})
    trial.metrics |= {"tpot_p99_upper_ms": upper} if upper else {}
    assert summary.broken(trial, limited) == words
    assert summary.broken(replace(result(47.56), constraints={"tpot_p99": 0.002}), limited) == [
        "TPOT p99 47.56 ms (limit 30)"
    ]


def test_load_that_the_defaults_keep_up_with_is_said_to_decide_nothing():
    limited = replace(CONFIG, scenario=ScenarioConfig(name="server", kind=Kind.Server, qps=12))
    words = "vLLM's defaults keep up with 12 queries/s, and nothing can serve more than is sent: raise scenario.qps"
    idle = replace(result(937.1), bound="arrival")
    assert words in summary.render(study(idle, result(937.2), config=limited))
    assert words not in summary.render(study(replace(idle, bound="kv"), result(937.2), config=limited))
    assert words not in summary.render(study(replace(idle, constraints={"x": 1}), result(937.2), config=limited))
    swept = study(idle, result(937.2), config=limited)
    swept.results["trial-0"].params["scenario.qps"] = 13
    assert words not in summary.render(swept)


def test_next_step_is_to_verify_what_was_measured_and_seems_better():
    measured, better = result(10), result(12)
    assert "\nNext: autotune verify study=s " in summary.render(study(measured, better))
    assert "Next:" not in summary.render(study(better, measured))
    assert "Next:" not in summary.render(study(measured, replace(better, estimated=True)))


@pytest.mark.parametrize(("objective", "best"), [(MAXIMIZE, 1), (MINIMIZE, 0)], ids=["maximize", "minimize"])
def test_best_is_feasible_and_follows_the_direction(objective: ObjectiveConfig, best: int):
    trials = [result(10), result(20), result(5, over=0.1), result(40, over=0.1), Result(reason="E: x")]
    assert study(None, *trials, config=config(objective)).best == f"trial-{best}"


def test_winner_is_shown_with_its_gain_and_its_command():
    made = study(result(10, command="default"), result(9), result(12, command="winner"))
    shown = summary.render(made)
    assert "Study s: 2 trials, 0 failed" in shown
    assert "Best: max_num_seqs=1 (+20.0% against vLLM's defaults" in shown
    assert "\n  vllm serve winner\n" in shown and "serve default" not in shown


@pytest.mark.parametrize(
    ("recipe", "words", "served"),
    [
        (11, "Best: max_num_seqs=0 (+20.0% against vLLM's defaults, +9.1% against the recipe, measured", "winner"),
        (16, "No trial beat the recipe by more than 0.5%. The best was max_num_seqs=0 (+20.0% against", "recipe"),
    ],
)
def test_gain_is_told_against_the_recipe_too(recipe: float, words: str, served: str):
    made = study(result(10, command="default"), result(12, command="winner"))
    made.results["recipe"] = replace(result(recipe, command="recipe"), params={"engine.args.stream_interval": 20})
    made.config.model.recipe = Recipe({"stream_interval": 20}, "vendor", "2026-03-08")
    shown = summary.render(made)
    assert words in shown and f"\n  vllm serve {served}\n" in shown
    assert "\n  recipe " in shown and "\nrecipe: stream_interval=20 (vendor, 2026-03-08)\n" in shown
    made.config.model.recipe = Recipe({"stream_interval": 20})
    assert "\nrecipe: stream_interval=20 (model.recipe)\n" in summary.render(made)
    figures = summary.headline(made)
    assert figures["recipe_tokens_per_s"] == recipe and figures["trials"] == 1
    assert figures["gain_over_recipe_percent"] == pytest.approx(100 * (12 / recipe - 1))
    assert figures["gain_percent"] == pytest.approx(20)


@pytest.mark.parametrize(
    ("queued_ms", "edge"), [(28.8, True), (31.1, True), (15.5, False), (63.4, False), (None, False)]
)
def test_best_that_holds_by_a_hair_is_said_to(queued_ms: float | None, edge: bool):
    best = result(12)
    if queued_ms:
        best.metrics["queued_tpot_p99_ms"] = queued_ms
    limited = replace(config(), scenario=ScenarioConfig(name="interactive", kind=Kind.Server, tpot_ms=30))
    shown = summary.render(study(result(10), best, config=limited))
    assert (f"its TPOT is {queued_ms} ms (p99) where 30 are allowed" in shown) == edge


def test_edge_is_that_of_what_is_served():
    loser = result(9)
    loser.metrics["queued_tpot_p99_ms"] = 29.0
    limited = replace(config(), scenario=ScenarioConfig(name="interactive", kind=Kind.Server, tpot_ms=30))
    assert "Close to a limit" not in summary.render(study(result(10), loser, config=limited))


def test_lower_latency_wins():
    made = study(result(10), result(8, command="winner"), config=config(MINIMIZE))
    assert "Best: max_num_seqs=0 (-20.0% against" in summary.render(made)


@pytest.mark.parametrize(("objective", "trial"), [(MAXIMIZE, 900), (MAXIMIZE, 1004), (MINIMIZE, 996)])
def test_defaults_that_win_or_all_but_tie_are_served(objective: ObjectiveConfig, trial: float):
    shown = summary.render(study(result(1000, command="default"), result(trial), config=config(objective)))
    assert "No trial beat vLLM's defaults" in shown and "\n  vllm serve default\n" in shown


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (Result(reason="StartError: no memory"), "(no usable baseline to compare with)"),
        (result(10, over=1.0), "(holds the limits; tokens_per_s 9, 10 with vLLM's defaults, which break them)"),
    ],
)
def test_baseline_that_is_no_measure_is_said_to_be_none(baseline: Result, words: str):
    shown = summary.render(study(baseline, result(9)))
    assert f"Best: max_num_seqs=0 {words}" in shown


def test_study_without_a_usable_trial_says_why():
    trials = [Result(reason="StartError: no memory"), Result(reason="StartError: no memory"), result(9, over=1.0)]
    shown = summary.render(study(None, *trials))
    assert "3 trials, 2 failed" in shown
    assert shown.count("StartError: no memory") == 1 and "\n  2 trials: StartError: no memory\n" in shown
    assert "No trial is feasible: loosen the limits" in shown


def test_headline_figures_name_the_metric():
    made = study(result(10), result(12), Result(reason="E: x"))
    assert summary.headline(made) == {
        "trials": 2,
        "failed_trials": 1,
        "baseline_tokens_per_s": 10,
        "best_tokens_per_s": 12,
        "gain_percent": pytest.approx(20),
    }


def test_trials_that_did_not_come_as_a_simulation_foresaw_are_named():
    one, other, fails, unforeseen = result(100.0), result(100.0), Result("failed", "E: x"), result(100.0)
    one.expected = {"values": [110.0], "feasible": True}
    other.expected = fails.expected = {"values": [], "feasible": False}
    said = summary.render(study(None, one, other, fails, unforeseen))
    assert "wrong about 1 of the 3 trials that it foresaw:\n  trial-1: expected to fail, measured 100" in said
