"""GPUs and costs of a load, from a study's results."""

from dataclasses import replace

import pytest

from autotune.config.schema import Config
from autotune.measure import metrics
from autotune.measure.result import Result, State
from autotune.results import fleet
from tests.studies import configured

RATES = {"tokens_per_s": 1000.0, "prompt_tokens_per_s": 4000.0}


def config(*more: str) -> Config:
    return configured("model=llama8b", "scenario=interactive", "objective=max_qps", "backend=sim", *more)


def result(qps: float, broken: float = -0.1, **args: int) -> Result:
    metrics = {"max_qps": qps, **RATES}
    params = {f"engine.args.{name}": value for name, value in args.items()}
    return Result(
        State.complete, values=[qps], constraints={"tpot_p99": broken}, metrics=metrics, args=args, params=params
    )


RESULTS = [
    ("baseline", result(7.0)),
    ("trial-0", result(9.0, max_num_seqs=64)),
    ("trial-1", result(50.0, broken=0.1)),
    ("trial-2", result(26.0, tensor_parallel_size=2, max_num_seqs=64)),
    ("trial-3", result(0.0, data_parallel_size=2)),
]


def test_a_million_tokens_cost_what_the_gpus_do_while_they_come():
    found = metrics.per_million(RATES, gpus=2, per_gpu_hour=3.6)
    assert found == pytest.approx({"cost_per_million_output_tokens": 2.0, "cost_per_million_input_tokens": 0.5})
    assert metrics.per_million({"tokens_per_s": 0.0}, 1, 1.0) == {}


def test_each_parallelism_serves_the_load_with_its_best_feasible_trial():
    two, one = fleet.fleets(RESULTS, config("price_per_gpu_hour=3"), 50.0)
    assert (two.name, two.parallelism, two.servers, two.gpus, two.per_hour) == ("trial-2", "TP 2", 2, 4, 12.0)
    assert (one.name, one.parallelism, one.servers, one.gpus, one.per_hour) == ("trial-0", "one GPU", 6, 6, 18.0)
    assert two.params == {"engine.args.max_num_seqs": 64}


def test_without_a_price_there_is_no_cost():
    lines = fleet.render(fleet.fleets(RESULTS, config(), 50.0), config(), 50.0)
    assert lines[0] == "To serve 50 queries/s within the limits:" and "cost" not in "".join(lines)


def test_a_study_at_one_load_says_that_a_server_may_hold_more():
    at_one_load = config("objective=throughput", "scenario.qps=4")
    served = replace(result(0.0), metrics={"samples_per_s": 3.9, **RATES})
    (found,) = fleet.fleets([("baseline", served)], at_one_load, 10.0)
    assert found.servers == 3 and "at least (a server was tried at one load" in fleet.caption(at_one_load, 10.0)


def test_load_that_nothing_serves_is_said():
    assert fleet.render([], config(), 5.0) == ["Nothing that was tried serves 5 queries/s within the limits."]
