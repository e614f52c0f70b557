"""What a step consists of: parts that sum to what was measured, in twin.json for the report."""

import json
from pathlib import Path

import numpy as np
import pytest

from autotune.config.schema import Config, PriorConfig
from autotune.measure.result import Result
from autotune.measure.steps import NAME, Steps
from autotune.results import sections
from autotune.results.study import TWIN, Study
from autotune.search import account as of_study
from autotune.search.device import device_of
from autotune.sim import account
from autotune.sim.cost import CONSTANTS, Work, seconds
from autotune.sim.shape import Shape
from autotune.sim.twin import longest_run, unfitted
from tests.test_report import config, result
from tests.test_twin import prior_of, recorded


def shares(steps: Steps) -> dict[str, account.Share]:
    """The account of a server by the device's YAML alone, which takes no time to fit."""
    assert steps.model
    return account.account(unfitted(prior_of(), Shape.of(steps.model), 0.1, 0.1), steps)


def test_parts_of_the_gpu_sum_to_a_step():
    random = np.random.default_rng(0)
    work, constants = Work(*random.uniform(0, 1, (8, 5))), random.uniform(0, 1, len(CONSTANTS))
    assert sum(account.gpu_seconds(constants, work).values()) == pytest.approx(seconds(constants, work).gpu_s)


@pytest.mark.parametrize("name", ["qwen3moe-defaults", "llama8b-512"])
def test_parts_sum_to_the_time_between_results(name: str):
    steps = recorded(name)
    run = steps.table[longest_run(steps)]
    took = account.between_results(Steps(name, run))
    found = shares(steps)
    assert sum(share.steps for share in found.values()) == len(run)
    assert sum(sum(share.parts.values()) for share in found.values()) == pytest.approx(took.sum(), rel=0.02)
    assert took.sum() <= run[-1, 2] - run[0, 0]


def test_gpu_waits_for_launches_only_where_no_graph_holds_a_step():
    eager, graphs = (shares(recorded(name))["prefill"] for name in ("qwen3moe-defaults", "llama8b-512"))
    assert eager.parts["launch"] > 0.4 * sum(eager.parts.values()) and eager.in_graphs < 0.02 * eager.tokens
    assert graphs.parts["launch"] < 0.1 * sum(graphs.parts.values()) and graphs.in_graphs == graphs.tokens


def test_delay_counts_for_the_step_whose_launch_it_was():
    """The second step was launched for 60 ms, so that the first one's result was late, and its own early."""
    waited = account.waits(np.array([0.055, -0.020, 0.001]), np.array([True, True, False]))
    assert waited == pytest.approx([0.0, 0.035, 0.001])


def test_idle_server_waits_for_no_host():
    table = np.zeros((3, 11))
    table[:, :4] = [[0.0, 0.1, 1.0, 1.1], [1.2, 1.3, 2.0, 2.1], [9.0, 9.1, 9.5, 9.6]]
    table[:2, 4] = 1  # the last step decodes nothing: it came with a new request
    assert account.between_results(Steps("", table)) == pytest.approx([1.0, 1.0, 0.5])


def left(folder: Path, steps: dict[str, Steps], **results: Result) -> Study:
    """A study whose trials have left `steps`."""
    for name, one in steps.items():
        (folder / name).mkdir()
        one.save(folder / name / NAME)
    found = {name.replace("_", "-"): one for name, one in results.items()}
    made = config(["tokens_per_s"], ["maximize"])
    made.prior = PriorConfig(backend={"device": vars(prior_of())})
    return Study(folder, made, found)


def test_model_that_is_not_simulated_is_said_in_one_line(tmp_path: Path):
    one = recorded("llama8b-512")
    foreign = Steps("", one.table[:50], one.args, {"model_type": "mamba"})
    study = left(tmp_path, {"baseline": foreign}, baseline=result(5.0))
    of_study.write(study)
    (section,) = sections.steps(study)
    assert "backend=sim knows decoders" in section.missing[0] and not section.plots
    assert sections.expectations(study) == []
    (tmp_path / "baseline" / NAME).write_text("broken")
    of_study.write(study)
    assert "not a file of recorded steps" in sections.steps(study)[0].missing[0]


def test_study_without_recorded_steps_has_no_such_section(tmp_path: Path):
    (tmp_path / TWIN).write_text("{}")  # of an earlier one in this folder
    study = left(tmp_path, {}, baseline=result(5.0))
    of_study.write(study)
    assert not (tmp_path / TWIN).exists() and not sections.steps(study)


def test_device_is_the_priors_then_the_simulated_one_then_the_machines():
    device = vars(prior_of())
    live = Config(backend={"_target_": "autotune.live.backend.LiveBackend"})
    assert device_of(Config(prior=PriorConfig(backend={"device": device})), {})[1] == "prior.backend.device"
    assert device_of(Config(backend={"device": device}), {})[0] == prior_of()
    for facts, name, named_by in (
        ({"gpu": "NVIDIA H200", "cpu": "Xeon"}, "H200", "NVIDIA H200"),
        ({"gpu": "NVIDIA A100-SXM4-80GB", "cpu": "Xeon"}, "A100", "NVIDIA A100-SXM4-80GB"),
        ({"gpu": "NVIDIA B200", "cpu": "Xeon"}, "H100", ""),
        ({"cpu": "Xeon"}, "CPU", "no GPU"),
        ({}, "H100", ""),
    ):
        found, whose = device_of(live, facts)
        assert (found.name, whose) == (name, named_by)


@pytest.mark.slow
def test_report_says_why_the_winner_wins(tmp_path: Path):
    slow, fast = recorded("qwen3moe-host9-defaults"), recorded("qwen3moe-host9-1024")
    words = {"values": [8.0], "feasible": True}
    best = result(9.0, params={"engine.args.max_num_seqs": 22}, values=[9.0], expected=words)
    study = left(tmp_path, {"baseline": slow, "trial-0": fast}, baseline=result(5.0, values=[5.0]), trial_0=best)
    of_study.write(study)
    told = json.loads((tmp_path / TWIN).read_text())
    assert set(told["errors"]) == set(told["accounts"]) == {"baseline", "trial-0"} and told["device"] == "H200"
    (section,) = sections.steps(study)
    assert "In steps with prefill the largest is launches (the GPU waits)" in section.text
    assert "CUDA graphs hold 100% of their tokens" in section.text
    assert len(section.plots) == 2 and not section.missing
    (section,) = sections.expectations(study)
    assert "1 trial, off by 12.5%" in section.text and len(section.plots) == 2
