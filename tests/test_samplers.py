"""Every sampler that conf/ offers is made and asked, with a seed, on a space with all kinds of parameters."""

import sys

import numpy as np
import optuna
import pytest
import scipy.special
from optuna.samplers._tpe import _truncnorm

from autotune.config import command_line, schema
from autotune.errors import InputError
from autotune.measure import objective
from autotune.search import samplers
from tests.studies import composed, space

SAMPLERS = sorted(path.stem for path in (command_line.CONF / "sampler").glob("*.yaml"))
OTHERS = ("botorch", "twin")  # they have tests of their own
NUMBERS = ["engine.args.a=range(1,5,step=1)", "engine.args.b=range(0.1,0.5,step=0.1)"]
SPACE, NUMERIC = space(*NUMBERS, "engine.args.c=choice(x,y)"), space(*NUMBERS)


def sampler(name: str, seed: int = 3) -> optuna.samplers.BaseSampler:
    made = composed(["model=tiny", f"sampler={name}", f"seed={seed}"], simulated=True)
    return samplers.make_sampler(made.hydra.sweeper.sampler, NUMERIC if name == "cmaes" else SPACE)


def asked(name: str, trials: int) -> list[dict]:
    study = optuna.create_study(sampler=sampler(name), direction="maximize")
    for _ in range(trials):
        trial = study.ask()
        chosen = (NUMERIC if name == "cmaes" else SPACE).suggest(trial, {})
        trial.set_constraint("ttft_p99", chosen["engine.args.a"] - 3)
        study.tell(trial, chosen["engine.args.a"] + chosen["engine.args.b"])
    return [trial.params for trial in study.trials]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "gp")) for name in SAMPLERS if name not in OTHERS],
)
def test_same_seed_gives_the_same_trials(name: str):
    first = asked(name, 12)
    assert first == asked(name, 12)
    assert len({tuple(params.items()) for params in first}) > 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_tpe_asks_by_scipys_arithmetic_what_it_would_by_optunas(monkeypatch: pytest.MonkeyPatch):
    optunas, called = np.frompyfunc(_truncnorm._log_ndtr_single, 1, 1), 0

    def log_ndtr(values: np.ndarray) -> np.ndarray:
        nonlocal called
        called += 1
        return optunas(values).astype(float)

    assert _truncnorm._log_ndtr is scipy.special.log_ndtr
    by_scipy = asked("tpe", 60)
    monkeypatch.setattr(_truncnorm, "_log_ndtr", log_ndtr)
    assert asked("tpe", 60) == by_scipy and called


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_botorch_asks_by_its_model_once_it_has_ten_trials():
    assert len(asked("botorch", 11)) == 11


def test_grid_changes_what_takes_another_server_as_seldom_as_can_be():
    both = space("engine.args.block_size=choice(16,32)", "engine.args.max_num_seqs=choice(8,16,32)")
    made = composed(["model=tiny", "sampler=grid", "seed=3"], simulated=True)
    study = optuna.create_study(sampler=samplers.make_sampler(made.hydra.sweeper.sampler, both))
    points = [both.suggest(study.ask(), {}) for _ in range(both.grid_size)]
    sizes, seqs = ([params[f"engine.args.{flag}"] for params in points] for flag in ("block_size", "max_num_seqs"))
    assert sizes in ([16, 16, 16, 32, 32, 32], [32, 32, 32, 16, 16, 16])
    assert sorted(seqs[:3]) == sorted(seqs[3:]) == [8, 16, 32]


def test_grid_runs_every_point_once():
    points = asked("grid", SPACE.grid_size)
    assert len({tuple(sorted(params.items())) for params in points}) == SPACE.grid_size == 32


def test_missing_botorch_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    for module in [name for name in sys.modules if name.startswith("optuna_integration")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "optuna_integration", None)
    with pytest.raises(InputError, match=r"needs the extra `botorch`: uv pip install -e '\.\[botorch\]'"):
        sampler("botorch")


def test_penalty_makes_every_objective_worse_by_what_is_over():
    config = schema.ObjectiveConfig("o", ["tokens_per_s", "ttft_p99_ms"], ["maximize", "minimize"])
    assert objective.penalised(config, [100.0, 50.0], {"ttft_p99": 0.25, "tpot_p99": -0.5}) == [80.0, 62.5]
    assert objective.penalised(config, [100.0, 50.0], {"ttft_p99": -0.1}) == [100.0, 50.0]


def test_name_of_a_sampler_alone_is_refused_and_not_taken_for_it():
    for name, option in [("random", "random"), ("auto", "tpe"), ("nsga2", "nsgaii"), ("my-own", "tpe")]:
        samplers.check_name(name, option)
    with pytest.raises(InputError, match="override /sampler: random"):
        samplers.check_name("random", "tpe")
