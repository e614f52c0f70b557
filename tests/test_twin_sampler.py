"""sampler=twin asks for what wins on a twin of the server; where the twin is wrong or has nothing to say, TPE does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autotune.config.schema import Config
from autotune.data.models import Model
from autotune.errors import InputError
from autotune.measure.result import Result, State
from autotune.results.study import results_in
from autotune.search.samplers import LIVE, chosen, make_sampler
from autotune.search.space import Space
from autotune.search.twin import LEAST, Params, TwinSampler, encoded, key
from autotune.sweep import storage
from autotune.sweep.record import Record
from tests.studies import SEQS, composed, configured, space, study

TOKENS, BACKEND = "engine.args.max_num_batched_tokens", "engine.args.attention_backend"
NOT_SIMULATED = f"{BACKEND}=choice(default,FLASHINFER)"
SPACE = space(f"{SEQS}=choice(2,8,32,128)", f"{TOKENS}=choice(256,1024,4096)", NOT_SIMULATED)
CONFIG = configured("model=llama8b", "backend=sim", "scenario=offline", "scenario.min_queries=64", "prior=sim")
QUICK = {"proposal_s": 2.0, "draws": 1, "seed": 0}


def asked(sampler: TwinSampler, running: int = 0, swept: Space = SPACE) -> Params:
    """The parameters that a study's next trial is asked for beside others that run, empty where TPE is to choose."""
    made = optuna.create_study(sampler=sampler, direction="maximize")
    for _ in range(running):
        swept.suggest(made.ask(), {})
    trial = made.ask()
    return trial.relative_params


def trial(params: Params, value: float, expected: float, state: State = State.complete) -> Result:
    words = {"values": [expected], "feasible": True}
    return Result(state, values=[value], params=dict(params), expected=words, phases={"run": 60.0})


def named_by_number(results: list[Result]) -> dict[str, Result]:
    return {f"trial-{number}": one for number, one in enumerate(results)}


def test_twin_asks_for_what_is_good_on_it(caplog: pytest.LogCaptureFixture):
    """Nothing is measured that it could be compared with."""
    caplog.set_level("INFO")
    params = asked(TwinSampler(CONFIG, SPACE, {}, **QUICK))
    assert params[SEQS] == 128 and "so far" not in caplog.text


def test_slow_host_has_time_for_more_than_the_first_configurations():
    """The first ten configurations of a simulated study are random."""
    swept = space(f"{SEQS}=int(interval(2,128))")
    sampler = TwinSampler(CONFIG, swept, {}, **(QUICK | {"proposal_s": 1e-3}))
    assert asked(sampler, swept=swept)[SEQS] >= 64  # there are 64 requests


def test_short_trials_are_not_held_up_by_a_long_search():
    """A tenth of a trial's time, but for what is looked at in any case."""
    swept = space(f"{SEQS}=int(interval(2,1024))", f"{TOKENS}=int(interval(256,16384))")
    ended = named_by_number([replace(trial({SEQS: 8, TOKENS: 1024}, 6500.0, 6000.0), phases={"run": 1.0})])
    asked(sampler := TwinSampler(CONFIG, swept, ended, **(QUICK | {"proposal_s": 60.0})), swept=swept)
    assert LEAST <= len(sampler._simulated.seen) < 2 * LEAST


def test_trials_side_by_side_are_asked_for_different_configurations():
    sampler = TwinSampler(CONFIG, SPACE, {}, **QUICK)
    made = optuna.create_study(sampler=sampler, direction="maximize")
    points = [key(SPACE.suggest(made.ask(), {})) for _ in range(3)]
    assert len(set(points)) == 3


def test_configuration_that_would_do_what_a_measured_one_did_is_not_asked_for():
    swept = space(f"{SEQS}=choice(2,64,128,256)")  # there are 64 requests
    ended = {"trial-0": trial({SEQS: 128}, 100.0, 100.0)}
    sampler = TwinSampler(CONFIG, swept, ended, **QUICK)
    made = optuna.create_study(sampler=sampler, direction="maximize")
    assert swept.suggest(made.ask(), {})[SEQS] == 2


def test_twin_that_is_wrong_leaves_the_choice_to_tpe(caplog: pytest.LogCaptureFixture):
    points = [{SEQS: seqs, TOKENS: 1024, BACKEND: "default"} for seqs in (2, 8, 32, 128)]
    right = [trial(params, 100.0 * value, 100.0 * value) for value, params in enumerate(points, 1)]
    wrong = [trial(params, 500 - 100.0 * value, 100.0 * value) for value, params in enumerate(points, 1)]
    assert asked(TwinSampler(CONFIG, SPACE, named_by_number(right), **QUICK))
    caplog.set_level("INFO")
    assert not asked(TwinSampler(CONFIG, SPACE, named_by_number(wrong), **QUICK))
    assert "left aside for TPE, as it was off by" in caplog.text


def test_trials_that_fail_where_the_twin_saw_them_run_make_it_wrong():
    points = [{SEQS: seqs, TOKENS: 1024, BACKEND: "default"} for seqs in (2, 8, 32, 128)]
    ended = [
        trial(one, 100.0, 100.0, State.failed if number % 2 else State.complete) for number, one in enumerate(points)
    ]
    assert not asked(TwinSampler(CONFIG, SPACE, named_by_number(ended), **QUICK))


def test_flag_that_the_twin_does_not_model_is_learned_as_a_factor():
    ended: dict[str, Result] = {}
    sampler = TwinSampler(CONFIG, SPACE, ended, **QUICK)
    for seqs in (2, 8, 32):
        for backend, factor in (("default", 1.0), ("FLASHINFER", 1.3)):
            params = {SEQS: seqs, TOKENS: 1024, BACKEND: backend}
            expected = sampler.expected(params)["values"][0]
            ended[key(params)] = trial(params, factor * expected, expected)
    assert asked(sampler)[BACKEND] == "FLASHINFER"
    new = {SEQS: 32, TOKENS: 4096}
    told = [sampler.expected({**new, BACKEND: backend})["values"][0] for backend in ("default", "FLASHINFER")]
    assert told[1] / told[0] == pytest.approx(1.3, rel=0.1)


def test_choice_of_a_flag_that_is_not_modelled_is_tried_before_one_that_the_baseline_has_shown():
    baseline = Result(State.complete, values=[1.0], phases={"run": 1.0})
    assert asked(TwinSampler(CONFIG, SPACE, {"baseline": baseline}, **QUICK))[BACKEND] == "FLASHINFER"


def test_broken_steps_cost_the_twin_their_trial_only(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "trial-0").mkdir()
    (tmp_path / "trial-0/steps.parquet").write_text("nothing")
    Result("complete", values=[100.0], params={SEQS: 8, TOKENS: 1024, BACKEND: "default"}).save(tmp_path / "trial-0")
    assert asked(TwinSampler(CONFIG, SPACE, results_in(tmp_path), tmp_path, **QUICK))[SEQS] == 128
    assert "trial-0/steps.parquet: not a file of recorded steps" in caplog.text


def test_model_that_can_not_be_simulated_is_refused_with_what_to_write(model: Model):
    (model.folder / "config.json").write_text(json.dumps(model.config | {"architectures": ["BertModel"]}))
    bert = configured("model=custom", f"model.path={model.folder}", "backend=sim", "scenario=offline", "prior=sim")
    with pytest.raises(InputError, match=r"sampler=twin simulates: .* none that it knows .*; or write another sampler"):
        make_sampler(composed(["sampler=twin"], simulated=True).hydra.sweeper.sampler, SPACE, bert)
    assert "none that it knows" in named(replace(bert, backend=LIVE_BACKEND), SPACE)


def named(config: Config, swept: Space) -> str:
    """The name of the sampler that sampler=auto stands for."""
    hydra = composed([f"sampler={config.sampler}"], simulated=True).hydra
    return chosen(hydra.sweeper.sampler, hydra.runtime.choices, config, swept)[1]


LIVE_BACKEND = {"_target_": LIVE, "steps": True}


@pytest.mark.parametrize(
    ("change", "swept", "name"),
    [
        ({}, SPACE, "twin (auto)"),
        ({"prior": CONFIG.prior}, SPACE, "twin (auto)"),
        ({"backend": {"_target_": "tests.standin.StandIn"}}, SPACE, "tpe (auto: the backend is not live vLLM)"),
        ({"backend": {"_target_": LIVE, "steps": False}}, SPACE, "tpe (auto: backend.steps=false records no steps)"),
        ({"objective": configured("objective=pareto").objective}, SPACE, "tpe (auto: it has several objectives)"),
        ({}, space(NOT_SIMULATED), "tpe (auto: none of what it sweeps is simulated)"),
        ({"sampler": "gp"}, SPACE, "gp"),
    ],
)
def test_default_is_the_twin_where_a_live_study_sweeps_what_it_models(change: dict[str, Any], swept: Space, name: str):
    live = {"backend": LIVE_BACKEND, "prior": replace(CONFIG.prior, backend=None), **change}
    assert named(replace(CONFIG, **live), swept) == name


def test_summary_says_why_it_was_tpe(tmp_path: Path):
    said = study(tmp_path, f"{SEQS}=choice(4,16)", "n_trials=1")
    assert "Sampler: tpe (auto: the backend is not live vLLM)" in said


def test_parameters_are_numbers_from_0_to_1():
    swept = space("engine.args.a=tag(log,int(interval(1,100)))", "engine.args.b=choice(x,y)")
    assert encoded({"engine.args.a": 10, "engine.args.b": "y"}, swept) == [0.5, 0.0, 1.0]
    assert encoded({"engine.args.b": "x"}, swept) == [0.5, 1.0, 0.0]


def test_enqueued_trial_costs_no_simulation():
    sampler = TwinSampler(CONFIG, SPACE, {}, **QUICK)
    made = optuna.create_study(sampler=sampler)
    made.enqueue_trial({SEQS: 8})
    assert not made.ask().relative_params


def test_twin_without_a_prior_leaves_the_first_trials_to_tpe(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    sampler = TwinSampler(replace(CONFIG, prior=replace(CONFIG.prior, backend=None)), SPACE, {}, **QUICK)
    assert not asked(sampler) and not sampler.expected({SEQS: 8})
    assert "twin: waits for the first steps; TPE is asked" in caplog.text


def test_storage_is_not_locked_while_the_twin_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    locked, computed = [False], []

    @contextmanager
    def transaction(_: object) -> Iterator[None]:
        locked[0] = True
        yield
        locked[0] = False

    def choose(*_: object) -> Params:
        computed.append(locked[0])
        return {SEQS: 8, TOKENS: 1024, BACKEND: "default"}

    with storage.opened(f"sqlite:///{tmp_path}/study.db", "s") as opened:
        record = Record(opened, "s", SPACE, CONFIG.objective)
        sampler = TwinSampler(CONFIG, SPACE, {}, **QUICK)
        record.use(sampler, optuna.pruners.NopPruner())
        monkeypatch.setattr(Record, "_transaction", transaction)
        monkeypatch.setattr(sampler, "_chosen", choose)
        monkeypatch.setattr(sampler, "_expected", choose)
        trial, params = record.ask({})
    assert params[SEQS] == 8 and "expected" in trial.user_attrs
    assert computed == [False, False]


def test_trials_that_run_count_as_bad_where_tpe_chooses_unless_it_is_told_otherwise():
    for tpe, liar in (({}, True), ({"constant_liar": False}, False)):
        assert TwinSampler(CONFIG, SPACE, {}, tpe=tpe, **QUICK)._constant_liar == liar


def test_error_leaves_the_study_to_tpe(caplog: pytest.LogCaptureFixture):
    """As where the objective is something that no simulation knows."""
    metric = replace(CONFIG.objective, metrics=["gpu_power_w"])
    sampler = TwinSampler(replace(CONFIG, objective=metric), SPACE, {}, **QUICK)
    assert not asked(sampler) and not asked(sampler)
    assert caplog.text.count("twin: left aside for TPE: InputError: objective.metrics: ") == 1


@pytest.mark.slow
def test_study_learns_its_server_from_the_steps_of_its_trials(tmp_path: Path):
    """The twin begins with a GPU half as fast as the server's."""
    budget = "hydra.sweeper.sampler.proposal_s=2"
    slow = [f"prior.backend.device.{name}_efficiency=0.45" for name in ("math", "bandwidth")]
    words = ["sampler=twin", "backend.steps=true", *slow, budget]
    space = [f"{SEQS}=choice(4,16,64,256)", f"{TOKENS}=choice(512,2048,8192)"]
    said = study(tmp_path, *words, *space, "n_trials=3", simulated=True)
    results = results_in(tmp_path / "multirun/s")
    assert "twin: expects +" in said or "expects nothing better" in said
    trials = [results[f"trial-{number}"] for number in range(3)]
    assert len({found.params[TOKENS] for found in trials[:2]}) == 2  # the second has steps that no trial has shown
    for found, off in zip(trials, (0.1, 0.25, 0.1), strict=True):
        assert found.expected["values"][0] == pytest.approx(found.values[0], rel=off)
    # It goes on, with the steps of all trials.
    study(tmp_path, *words, *space, "n_trials=4", simulated=True)
    results = results_in(tmp_path / "multirun/s").values()
    assert sum(found.complete and not found.duplicate_of for found in results) == 5


@pytest.mark.slow
def test_study_with_two_objectives_asks_the_twin(tmp_path: Path):
    budget = "hydra.sweeper.sampler.proposal_s=1"
    words = ["sampler=twin", "backend.steps=true", "objective=pareto", budget, f"{SEQS}=choice(4,16,64,256)"]
    study(tmp_path, *words, "n_trials=3", simulated=True)
    found = results_in(tmp_path / "multirun/s")["trial-0"]
    assert found.complete and len(found.expected["values"]) == 2
