"""What a study starts with where a simulation was asked first."""

from dataclasses import asdict

import numpy as np
import pytest

from autotune.config.command_line import compose
from autotune.config.schema import FITTED, HOST
from autotune.search import prior
from autotune.search.prior import _complementary, perturbed
from autotune.search.simulate import estimate, simulation
from autotune.search.space import parse
from tests.studies import configured


def test_perturbed_device_differs_in_what_is_fitted_and_in_nothing_else():
    device = compose(["model=llama8b", "prior=sim"])[0].prior.backend["device"]
    one, other = perturbed(device, 0.2, 0.5, 0), perturbed(device, 0.2, 0.5, 1)
    for name, value in device.items():
        assert (len({value, one[name], other[name]}) == 3) == (name in FITTED)
    assert perturbed(device, 0, 0, 0) == device


def test_hosts_constants_are_off_together():
    device = compose(["model=llama8b", "prior=sim"])[0].prior.backend["device"]
    slower = perturbed(device, 0, 0.5, 0)
    factors = [slower[name] / device[name] for name in HOST]
    assert factors[0] != 1 and factors == pytest.approx([factors[0]] * len(HOST))
    assert {name: slower[name] for name in device if name not in HOST} == {
        name: device[name] for name in device if name not in HOST
    }


def test_choice_is_the_best_on_average_then_what_it_lacks():
    """The bold candidate is best on two devices of three; the safe one, not the second boldest, covers the third."""
    scores = np.array([[1.0, 0.9, 0.5], [1.0, 0.9, 0.5], [0.0, 0.0, 1.0]])
    assert _complementary(scores, 2) == [0, 2]
    assert _complementary(scores, 5) == [0, 2, 1]


def test_variable_that_is_swept_is_passed_over_by_the_simulation():
    config = configured("model=llama8b", "prior=sim", "scenario=offline", "scenario.min_queries=8")
    params = {"backend.env.X": "1", "engine.args.max_num_seqs": 8}
    found = estimate(simulation(config, config.prior.backend), params)
    assert found.complete and (found.params, found.args["max_num_seqs"]) == (params, 8)


@pytest.mark.slow
def test_choice_is_spread_from_bold_to_safe_where_the_load_is_swept():
    config, params, sweeps = compose(
        [
            *("model=llama8b", "backend=sim", "prior=sim", "space=none", "scenario=interactive", "objective=goodput"),
            *("scenario.min_duration_s=15", "prior.trials=40", "prior.devices=4", "scenario.qps=range(16,40,step=2)"),
        ]
    )
    space, _ = parse(params, sweeps, config.conditions, config.only_if)
    found = prior.best(config, space)
    loads = [one.params["scenario.qps"] for one in found]
    assert len(set(loads)) == len(loads) == config.prior.keep
    assert min(loads) < loads[0] < max(loads)
    assert all(asdict(one)["values"] for one in found)
