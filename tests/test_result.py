from pathlib import Path

import pytest

from autotune.measure.result import Result


def test_result_loads_as_it_was_saved(tmp_path: Path):
    result = Result(state="complete", values=[1.5], constraints={"ttft_p99": -0.5}, params={"a": None, "b": [1, "x"]})
    result.save(tmp_path)
    assert Result.load(tmp_path) == result
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("state", "over", "feasible"),
    [("complete", 0.0, True), ("complete", 0.01, False), ("failed", 0.0, False)],
)
def test_feasible_is_complete_and_within_every_limit(state: str, over: float, feasible: bool):
    assert Result(state=state, constraints={"ttft_p99": -0.5, "tpot_p99": over}).feasible is feasible


def test_command_can_be_pasted_into_a_shell():
    result = Result(command=["vllm", "serve", "my model", "--compilation-config", '{"mode": 3}'])
    assert result.shell_command == """vllm serve 'my model' --compilation-config '{"mode": 3}'"""
