"""Studies beside each other, and one that starts with another's best."""

import json
import re
from pathlib import Path

import pytest

from autotune.commands.compare import column_of
from autotune.config.command_line import compose
from autotune.errors import InputError
from autotune.measure.objective import offered_load
from autotune.measure.result import Result, State
from autotune.results.study import Study
from tests import in_process
from tests.in_process import Done
from tests.studies import SEQS, asked, study

TOKENS = "engine.args.max_num_batched_tokens"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study `s` of three points, of which 64 sequences are best."""
    folder = tmp_path_factory.mktemp("first")
    study(folder, "sampler=grid", f"{SEQS}=choice(4,16,64)", f"{TOKENS}=2048", simulated=True)
    return folder


def compare(folder: Path, *words: str) -> Done:
    return in_process.autotune(folder, "compare", *words)


def test_differences_are_marked_and_figures_stand_beside_each_other(first: Path, tmp_path: Path):
    other = ["sampler=random", "n_trials=2", f"{SEQS}=choice(4,8)", "backend/device=a100"]
    study(tmp_path, *other, simulated=True)
    shown = compare(tmp_path, str(first / "multirun/s"), "multirun/s").stdout
    lines = {" ".join(line.split()[:2]): line.split() for line in shown.splitlines() if line}
    assert lines["≠ device"][2:] == ["H100,", "simulated", "A100,", "simulated"]
    assert lines["≠ sampler"][2:] == ["grid", "random"]
    assert lines["≠ max_num_seqs"][2:] == ["64", "8"]
    assert "model" in {line.split()[0] for line in shown.splitlines() if line}  # not marked: the same
    assert "objectives differ" not in shown


def test_figures_are_those_of_the_results(first: Path):
    one, other = json.loads(compare(first, "s", "s", "format=json").stdout)
    results = [json.loads(path.read_text()) for path in first.glob("multirun/s/*/result.json")]
    assert one == other and one["best"] == max(result["values"][0] for result in results if result["params"])
    assert one["best"] == pytest.approx(one["baseline"] * (1 + one["gain"]))
    spent = sum(sum(result["phases"].values()) for result in results)
    assert 0 < one["engine_s_to_best"] <= spent + 1e-6
    assert one["trials"] == 3 and one["failed"] == 0


def test_trial_that_was_looked_up_is_counted_once(tmp_path: Path):
    trials = [Result(State.failed), Result(State.failed, duplicate_of="trial-0"), Result(State.refused)]
    one = column_of(Study(tmp_path, compose([])[0], {f"trial-{number}": trial for number, trial in enumerate(trials)}))
    assert (one.trials, one.failed) == (1, 1)


def test_gain_over_the_recipe_stands_below_the_one_over_the_defaults(first: Path, tmp_path: Path):
    recipe = ["baseline=[defaults,recipe]", "model.recipe.args.max_num_seqs=16"]
    study(tmp_path, "n_trials=1", f"{SEQS}=choice(32)", *recipe)
    done = compare(tmp_path, str(first / "multirun/s"), "s")
    rows = {re.split("  +", line.strip())[0]: line.split()[-2:] for line in done.stdout.splitlines()}
    assert rows["recipe"][0] == rows["gain over the recipe"][0] == "–"
    assert float(rows["gain over the recipe"][1][:-1]) > float(rows["gain"][1][:-1]) > 0
    assert "recipe" not in compare(first, "s", "s").stdout


def test_other_objective_is_said(first: Path, tmp_path: Path):
    study(tmp_path, "objective=latency", "n_trials=1", f"{SEQS}=choice(4,8)")
    shown = compare(tmp_path, str(first / "multirun/s"), "s").stdout
    assert "The objectives differ: the values of these studies can't be compared" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["s"], "name two studies or more"),
        (["s", "r"], "study=r: no such folder below multirun/; there is s"),
        (["s", "multirun/s/space.json"], "study=multirun/s/space.json: a file; write the name of a study"),
        (["s", "s", "format=xml"], "format=xml: write one of text, json; see --help"),
        (["s", "s", "output=."], "output=.: Is a directory; write a file's path"),
    ],
)
def test_what_can_not_be_compared_is_one_line(first: Path, words: list[str], said: str):
    done = compare(first, *words)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1


def test_warm_start_asks_first_for_the_best_that_fit(first: Path, tmp_path: Path):
    warm = [f"warm_start={first}/multirun/s", "n_trials=3", "baseline=false"]
    said = study(tmp_path, *warm, "sampler=random", f"{SEQS}=range(1,32)", f"{TOKENS}=choice(1024,2048)")
    assert [trial.params[SEQS] for trial in asked(tmp_path)[:2]] == [16, 4]
    assert f"trial-{best_number(first)}'s {SEQS}=64 is outside 1…31" in said
    assert ["warm_start" in trial.user_attrs for trial in asked(tmp_path)] == [True, True, False]


def best_number(folder: Path) -> int:
    return max(asked(folder), key=lambda trial: trial.value if "baseline" not in trial.user_attrs else 0).number


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"warm_start": "nothing"}, "warm_start=nothing: no such folder below multirun/"),
        ({SEQS: "range(100,200)"}, "none of its 3 feasible trials lies within this space"),
    ],
)
def test_warm_start_from_nothing_is_one_line(first: Path, tmp_path: Path, changed: dict[str, str], words: str):
    written = {"warm_start": f"{first}/multirun/s", SEQS: "range(1,32)", **changed}
    with pytest.raises(InputError, match=words):
        study(tmp_path, *(f"{key}={value}" for key, value in written.items()))


@pytest.mark.parametrize(
    ("words", "load"),
    [
        (["scenario=offline"], ""),
        (["scenario=server", "scenario.qps=8"], "8 queries/s"),
        (["scenario=server", "scenario.qps=8", "objective=max_qps"], "the highest load within the limits"),
    ],
)
def test_offered_load_is_said_as_it_was(words: list[str], load: str):
    config = compose(["model=llama8b", *words])[0]
    assert offered_load(config.objective, config.scenario) == load
