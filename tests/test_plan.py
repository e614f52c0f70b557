"""`autotune plan`: a study simulated before it takes a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from autotune.commands import plan
from autotune.config.command_line import compose
from autotune.config.schema import Device, PriorConfig, SimConfig
from autotune.errors import InputError
from autotune.measure.result import Result, State
from autotune.results.study import Study, results_in
from autotune.search.space import parse
from autotune.sim.backend import SimBackend
from autotune.sim.shape import Shape
from tests.conftest import Main
from tests.studies import configured, study

STEPS = Path(__file__).parent.parent / "datasets/steps"
SEQS, MEMORY = "engine.args.max_num_seqs", "engine.args.gpu_memory_utilization"


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(plan, "MOST", 20)
    common = ["model=llama8b", "prior=sim", "space=none", "scenario.min_queries=200"]
    config, params, sweeps = compose([*common, *arguments])
    return plan.render(plan.make(config, parse(params, sweeps, config.conditions, config.only_if)[0]))


def test_plan_says_what_runs_what_bounds_it_the_gain_and_the_hours(monkeypatch: pytest.MonkeyPatch):
    text = planned(monkeypatch, "scenario=offline", f"{SEQS}=choice(16,32,128)", f"{MEMORY}=choice(0.1,0.9)")
    assert "on H100: estimates of a simulation" in text
    assert "no memory is left for the KV cache" in text and "points can run" in text
    assert "sequences" in text.split("bound by")[1].splitlines()[0]
    assert "against vLLM's defaults" in text
    assert "21 trials of" in text and "GPU hours" in text


def test_plan_of_slow_simulations_ends_with_those_that_it_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "LONG_S", 0.0)
    assert "of 1 points can run" in planned(monkeypatch, "scenario=offline", f"{SEQS}=choice(16,32,128)")


@pytest.mark.slow
def test_plan_names_the_limit_that_binds(monkeypatch: pytest.MonkeyPatch):
    text = planned(monkeypatch, "scenario=interactive", "scenario.qps=45", f"{SEQS}=choice(64,256)")
    assert "the limit that binds is tpot p99" in text and "nothing holds the limits" in text


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("prior=none", "prior=none: a plan needs a device to simulate; leave it out, or write prior=sim"),
        ("model.recipe.args.max_num_seq=1", "model.recipe.args.max_num_seq: vLLM has no such flag; did you mean"),
        ("model=gpt9", "model=gpt9: there is no such option"),
        ("n_trials=many", "n_trials=many: write a whole number from 1 to 10000000"),
    ],
)
def test_what_can_not_be_planned_is_one_line(main: Main, word: str, said: str):
    done = main("plan", *([] if word.startswith("model=") else ["model=llama8b"]), "baseline=[defaults,recipe]", word)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_twin_that_is_given_twice_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["plan", "model=llama8b", "twin=a", "twin=b"])
    with pytest.raises(SystemExit, match="autotune: twin is set twice; write it once"):
        plan.main()


def test_twin_that_does_not_exist_or_has_no_steps_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plan", "model=llama8b", "twin=lost"])
    with pytest.raises(SystemExit, match="autotune: twin=lost: no such folder below multirun/"):
        plan.main()
    config = configured("model=llama8b", "backend=sim", "scenario=offline")
    monkeypatch.setattr(plan, "load", lambda *_: Study(tmp_path, config, {}))
    with pytest.raises(InputError, match=r"twin=s: no trial of it has recorded its steps .*; backend.steps=true does"):
        plan.on_twin_of("s", config, keep_device=True)


def test_device_of_a_twin_is_that_of_a_trial_that_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    results = {
        "trial-0": Result(State.refused),
        "trial-1": Result(State.complete, values=[1.0], facts={"gpu": "NVIDIA H200"}),
    }
    (tmp_path / "trial-1").mkdir()
    (tmp_path / "trial-1/steps.parquet").touch()
    config = configured("model=llama8b", "scenario=offline", "prior=sim")
    study = Study(tmp_path, replace(config, prior=PriorConfig()), results)
    monkeypatch.setattr(plan, "load", lambda *_: study)
    plan.on_twin_of("s", config, keep_device=False)
    assert config.prior.backend["device"]["name"] == "H200"


@pytest.mark.slow
def test_plan_simulates_the_twin_of_a_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The server is half as fast as its device's YAML says: told by the study's device, and by its steps alone."""
    slow = [f"backend.device.{name}_efficiency=0.4" for name in ("math", "bandwidth")]
    study(tmp_path, "backend.steps=true", *slow, f"{SEQS}=choice(16)", "n_trials=1", simulated=True)
    measured = results_in(tmp_path / "multirun/s")["baseline"].values[0]
    monkeypatch.setattr(plan, "MOST", 2)
    monkeypatch.chdir(tmp_path)
    words = ["model=llama8b", "prior=sim", "space=none", "scenario=offline", "scenario.min_queries=64"]
    for keep_device in (False, True):
        config, _, sweeps = compose([*words, f"{SEQS}=choice(16,32)"])
        plan.on_twin_of("s", config, keep_device)
        made = plan.make(config, parse({}, sweeps, {}, {})[0])
        assert made.baseline.values[0] == pytest.approx(measured, rel=0.05)
        assert "on H100, a twin of multirun/s: estimates" in plan.render(made)


@pytest.mark.slow
def test_prior_takes_the_twin_of_a_study(tmp_path: Path):
    words = [f"{SEQS}=choice(8,16,64)", "n_trials=1"]
    study(tmp_path, "backend.steps=true", "backend.device.bandwidth_efficiency=0.4", *words, simulated=True)
    (tmp_path / "multirun/s").rename(tmp_path / "multirun/first")
    on_it = ["prior=sim", "prior.backend.twin=[multirun/first]", "prior.trials=4", "prior.devices=2", "prior.keep=1"]
    study(tmp_path, *on_it, "backend.device.bandwidth_efficiency=0.4", *words, simulated=True)
    found = results_in(tmp_path / "multirun/s")["trial-0"]
    assert found.expected["values"][0] == pytest.approx(found.values[0], rel=0.05)


def test_steps_of_another_model_are_refused():
    device = Device(**configured("model=llama8b", "backend=sim", "scenario=offline").backend["device"])
    backend = SimBackend(SimConfig(device=device, twin=[str(STEPS / "llama8b-512.parquet")]), STEPS)
    with pytest.raises(InputError, match="steps of llama8b-512 are another model's; name steps of this model"):
        backend.twin_of(Shape.of(configured("model=qwen3_30b_a3b", "scenario=offline").model.shape))
