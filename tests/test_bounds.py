"""Values out of bounds are refused before anything starts, wherever they are written."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from autotune.config import bounds
from autotune.config.command_line import model_name
from autotune.config.overrides import with_fields
from autotune.config.schema import Config, Kind
from autotune.errors import InputError
from autotune.measure import prepare
from autotune.search.checks import check_space
from autotune.search.space import parse
from tests.standin import StandIn
from tests.studies import SEQS, configured, space, study


@pytest.fixture(scope="module")
def config() -> Config:
    words = ["model=llama8b", "backend=sim", "scenario=server", "prior=sim", "launcher=gpus", "gpus=[0]"]
    return configured(*words)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("scenario.qps", [0, -5, math.nan, math.inf]),
        ("scenario.ttft_ms", [0, -1]),
        ("scenario.ttft_by_prompt", [5, [1024, 500], [["a", 1]], [[1024]], [[-1, 500]], [[1024, 500], [1024, 600]]]),
        ("scenario.seed", [-1, 2**40]),
        ("conditions", [{"a": [1]}, {"a": {"b": "c"}}]),
        ("only_if", [{SEQS: ["enforce_eager"]}]),
        ("objective.metrics", [[["tokens_per_s"]]]),
        ("scenario.min_queries", [0, 10**18]),
        ("scenario.min_duration_s", [-1, 1e12]),
        ("scenario.over_share", [-0.1, 1.1]),
        ("scenario.search.growth", [1, 0.5]),
        ("scenario.search.max_runs", [0]),
        ("benchmark.scenarios.server.tpot_ms", [0]),
        ("dataset.count", [0, -1]),
        ("dataset.min_output_tokens", [0, 500]),
        ("backend.device.tflops", [0, -3, math.inf]),
        ("backend.device.block_size", [0]),
        ("backend.pace", [-1, 1e9]),
        ("prior.backend.device.bandwidth_gbs", [0]),
        ("prior.keep", [-1]),
        ("prior.sigma", [-1, math.nan]),
        ("launcher.n_jobs", [0, -2, 1.5, "two"]),
        ("tracking.system_metrics_s", [-1, math.inf]),
        ("seed", [-1, 2**40]),
        ("n_trials", [0, -1]),
        ("max_failures", [0]),
        ("baseline_gpu", [-1]),
        ("gpus", ["foo", 2, [], [-1], ["a"], [0, 0], [True], [10**21], {}]),
        ("dataset.records.count", [math.nan]),
        ("budget", ["1.2.3h", "-1h", "nan", "inf", "1e99h", "5 parsecs", "", "90", "0h", "9" * 400 + "h", "1h 2m"]),
        ("objective.metrics", [[], ["throughput"], ["tokens_per_s", "tokens_per_s"], ["ttft_p99_upper_ms"]]),
        ("dataset.path", ["", " "]),
        ("model.path", [""]),
        ("cache_dir", [""]),
        ("warm_start", [""]),
        ("model.name", ["a/b", "..", "a" * 300]),
    ],
)
def test_value_out_of_bounds_is_refused_by_its_key(config: Config, key: str, values: list[Any]):
    for value in values:
        with pytest.raises(InputError) as refused:
            prepare.check(with_fields(config, {key: value}))
        told = str(refused.value)
        assert key in told and "no such field" not in told and "\n" not in told


def test_loads_and_ends_that_do_not_go_together_are_refused(config: Config):
    for values, words in (
        ({"scenario.ttft_by_prompt": [[1024, 0]]}, "scenario.ttft_by_prompt=.*write pairs of numbers above 0"),
        ({"scenario.ttft_by_prompt": [[1024]]}, "write pairs of numbers above 0"),
        ({"scenario.qps": 1e5, "scenario.min_duration_s": 600.0}, "scenario.qps=100000: 6e"),
        ({"scenario.max_duration_s": 1.0}, "scenario.max_duration_s=1: write scenario.min_duration_s=60 or more, or 0"),
        ({"scenario.max_queries": 5}, "scenario.max_queries=5"),
        ({"scenario.kind": "Offline", "objective.metrics": ["max_qps"]}, "has no arrival rate"),
    ):
        with pytest.raises(InputError, match=words):
            prepare.check(with_fields(config, values))


def test_object_that_is_set_once_leaves_nothing_in_the_next(config: Config):
    assert with_fields(config, {"engine.args": {"max_num_seqs": 4}}).engine.args == {"max_num_seqs": 4}
    assert with_fields(config, {"engine.args": {"block_size": 16}}).engine.args == {"block_size": 16}


def test_field_takes_the_type_that_the_schema_gives_it(config: Config):
    changed = with_fields(config, {"scenario.kind": "Offline", "scenario.qps": 3, "scenario.ttft_ms": None})
    assert changed.scenario.kind is Kind.Offline and changed.scenario.ttft_ms is None


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("scenario.mn_queries=choice(1,2)", "scenario.mn_queries: there is no such field; did you mean min_queries?"),
        ("scenari.qps=choice(1,2)", "can't be swept"),
        ("engine.arg.x=choice(1,2)", "engine.arg.x: there is no such field"),
        ("scenario.qps=choice(4,0)", "scenario.qps=0.0: write a number above 0"),
        ("scenario.qps=interval(-1,4)", "scenario.qps=-1.0: "),
        ("scenario.qps=interval(1,nan)", "write two numbers"),
        ("scenario.qps=glob(*)", "write choice(…), range(…) or interval(…)"),
        ("scenario.qps=interval(4,1)", "write the smaller number first"),
        ("scenario.qps=range(4,1)", "write the smaller number first"),
        ("scenario.qps=range(1,4,step=0)", "write a step above 0"),
        ("scenario.qps=tag(log,interval(0,1))", "a log scale begins above 0"),
        ("scenario.qps=tag(lg,interval(1,2))", "the only tag is log"),
        ("scenario.qps=tag(log,choice(1,2))", "write a log scale as tag(log, interval(…))"),
        ("scenario.qps=range(1,1e18)", "more than 1000000 steps"),
        ("scenario.min_queries=interval(1,9)", "scenario.min_queries=1.0: write a whole number from 1 to 2000000"),
        ("scenario.seed=range(-2,3)", "scenario.seed=-2: write a number from 0"),
        ("scenario.kind=choice(Server,Onlin)", "scenario.kind=Onlin: write one of Offline, Server, "),
        ("scenario.args.max_num_seqs=choice(1,2)", "can't be swept"),
        ("objective.metrics=choice(a,b)", "can't be swept"),
        ("launcher.n_jobs=choice(1,2)", "can't be swept"),
        ("dataset.path=choice(none.jsonl,b)", "dataset.path=none.jsonl: no such file"),
        ("dataset.path=choice(1,2)", "dataset.path=1: no such file"),
        ("model.path=choice(a,b)", "can't be swept"),
        ("backend._target_=choice(a,b)", "can't be swept"),
        ("backend.devic.tflops=choice(1,2)", "backend.devic.tflops: there is no such field"),
        ("backend.pac=choice(1,2)", "backend.pac: "),
        ("n_trials=choice(1,2)", "a study sweeps fields, not groups"),
    ],
)
def test_swept_field_is_checked_with_each_of_its_values(config: Config, sweep: str, words: str):
    with pytest.raises(InputError) as refused:
        check_space(space(sweep), config, StandIn, {})
    assert words in str(refused.value) and sweep.split("=")[0] in str(refused.value)


def test_field_is_swept_once():
    for twice in (f"{SEQS}=choice(4,8)", f"{SEQS}=7", "engine.args.max-num-seqs=choice(4,8)", f"+{SEQS}=choice(4,8)"):
        with pytest.raises(InputError, match="written twice"):
            space(f"{SEQS}=choice(1,2)", twice)
    with pytest.raises(InputError, match="written twice"):
        parse({SEQS: "choice(1,2)", "engine.args.max-num-seqs": "choice(4,8)"}, [], {}, {})
    assert parse({SEQS: "choice(1,2)"}, ["engine.args.max-num-seqs=choice(4,8)"], {}, {})[0].grid == {SEQS: (4, 8)}


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "../x", "/x", "a/b", "a?b", "a#b", "a%2f", "~x", "-x", "x.", "x ", " x", "", "a\nb", "x" * 300),
        *("trials", "mlflow.db"),  # what else is in multirun/
    ],
)
def test_study_name_that_is_no_folder_of_its_own_is_refused(config: Config, name: str):
    with pytest.raises(InputError, match="study="):
        bounds.check(with_fields(config, {"study": name}))


def test_study_name_of_letters_of_any_alphabet_is_fine(config: Config):
    for name in ("llama8b-offline-20260101-000000", "größe_2", "研究", "a b", "v1.2+x=3"):
        bounds.check(with_fields(config, {"study": name}))


def test_name_of_a_models_folder_is_made_fit_for_a_file(config: Config):
    for path in ("/models/My Llama (v2)?", "/models/..", None, "é" * 300):
        bounds.check(with_fields(config, {"model.name": model_name(path)}))


def test_study_with_a_bad_value_leaves_nothing_behind(tmp_path: Path):
    for bad in (
        ["scenario.mn_queries=choice(1,2)"],
        ["hydra.sweeper.sampler.n_startup_trials=-1"],
        ["hydra.sweeper.sampler.n_ei_candidates=0"],
        ["sampler=nsga2", "hydra.sweeper.sampler.population_size=0"],
        ["pruner=median", "pruner.n_startup_trials=abc"],
        ["pruner=hyperband", "pruner.min_resource=0"],
        ["pruner=patient", "pruner.wrapped_pruner=3"],
        ["pruner._target_=optuna.samplers.TPESampler"],
    ):
        with pytest.raises(InputError, match=re.escape(bad[-1].partition("=")[0].split(".")[0])):
            study(tmp_path, f"{SEQS}=choice(4,8)", *bad)
    assert not list(tmp_path.iterdir())
