"""`autotune plan`: a study simulated before it takes a GPU."""

import pytest

from autotune.commands import plan
from autotune.config.command_line import compose
from autotune.search.space import parse
from tests.conftest import Main

SEQS, MEMORY = "engine.args.max_num_seqs", "engine.args.gpu_memory_utilization"


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(plan, "DRAWS", 20)
    monkeypatch.setattr(plan, "SEARCHED", 20)
    common = ["model=llama8b", "prior=sim", "space=none", "scenario.min_queries=200"]
    config, params, sweeps = compose([*common, *arguments])
    return plan.render(plan.make(config, parse(params, sweeps, config.conditions, config.only_if)[0]))


def test_plan_says_what_runs_what_bounds_it_the_gain_and_the_hours(monkeypatch: pytest.MonkeyPatch):
    text = planned(monkeypatch, "scenario=offline", f"{SEQS}=choice(16,32,128)", f"{MEMORY}=choice(0.1,0.9)")
    assert "on H100: estimates of a simulation" in text
    assert "no memory is left for the KV cache" in text and "of it can run" in text
    assert "sequences" in text.split("bound by")[1].splitlines()[0]
    assert "against vLLM's defaults" in text
    assert "21 trials of" in text and "GPU hours" in text


@pytest.mark.slow
def test_plan_names_the_limit_that_binds(monkeypatch: pytest.MonkeyPatch):
    text = planned(monkeypatch, "scenario=interactive", "scenario.qps=45", f"{SEQS}=choice(64,256)")
    assert "the limit that binds is tpot p99" in text and "nothing that holds the limits" in text


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("prior=none", "prior=none: a plan needs a device to simulate; leave it out, or write prior=sim"),
        ("model=gpt9", "In 'config': Could not find 'model/gpt9'"),
        ("n_trials=many", "Value 'many' of type 'str' could not be converted to Integer"),
    ],
)
def test_what_can_not_be_planned_is_one_line(main: Main, word: str, said: str):
    done = main("plan", *([] if word.startswith("model=") else ["model=llama8b"]), word)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr and done.stderr.count("\n") == 1
