import json
import re
from pathlib import Path

import pytest

from autotune.config.redact import redact
from autotune.errors import InputError
from autotune.measure.result import Result
from autotune.results.study import results_in


def test_result_loads_as_it_was_saved(tmp_path: Path):
    result = Result(state="complete", values=[1.5], constraints={"ttft_p99": -0.5}, params={"a": None, "b": "[1]"})
    result.save(tmp_path)
    assert Result.load(tmp_path) == result
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_no_figure_of_a_gpu_is_taken_for_a_secret(tmp_path: Path):
    """gpu_j_per_token is no token: results of real GPUs are what they were once they are saved."""
    recorded = sorted((Path(__file__).parent.parent / "benchmarks/h100/data").rglob("baseline.json"))[:4]
    bodies = [json.loads(file.read_text()) for file in recorded]
    assert any("gpu_j_per_token" in body["metrics"] for body in bodies)
    for result in map(Result.of, bodies):
        result.save(tmp_path)
        assert Result.load(tmp_path) == result
    told = '"gpu_j_per_token": 0.53, gpu_j_per_token=2'
    assert redact(told) == told


@pytest.mark.parametrize(
    ("state", "over", "feasible"),
    [("complete", 0.0, True), ("complete", 0.01, False), ("failed", 0.0, False)],
)
def test_feasible_is_complete_and_within_every_limit(state: str, over: float, feasible: bool):
    assert Result(state=state, constraints={"ttft_p99": -0.5, "tpot_p99": over}).feasible is feasible


def test_trial_that_a_signal_failed_has_failed_when_it_is_read_again(tmp_path: Path):
    Result(reason="SystemExit: 143").save(tmp_path)
    assert Result.load(tmp_path).state == "failed"


def test_command_can_be_pasted_into_a_shell():
    result = Result(command=["vllm", "serve", "my model", "--compilation-config", '{"mode": 3}'])
    assert result.shell_command == """vllm serve 'my model' --compilation-config '{"mode": 3}'"""


BROKEN = ["", "{", "[]", "3", '{"state": "weird"}', '{"runs": [{"x": 1}]}', "\x00", "[" * 10**5, '{"values": "1"}']
BROKEN += [
    '{"state": "complete"}',
    '{"state": "complete", "values": [NaN]}',
    '{"metrics": {"a": "b"}}',
    '{"phases": {"run": 1%s}}' % ("0" * 400),  # no float holds it
    '{"constraints": {"a": NaN}}',
    '{"params": {"a": [1]}}',
    '{"ended_at": 1e308}',
    '{"state": []}',
    "null",
]


@pytest.mark.parametrize("body", BROKEN)
def test_broken_result_is_named_in_one_line(tmp_path: Path, body: str):
    (tmp_path / "result.json").write_text(body)
    with pytest.raises(InputError, match=r"result\.json: not the result of a trial") as error:
        Result.find(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"metrics": {"a": 1, "b": "x"}}', '`metrics.b` is "x"'),
        ('{"intervals": {"a": [1, null]}}', "`intervals.a.1` is null"),
        ('{"params": {"a": [1]}}', "`params.a` is [1]"),
        ('{"runs": [{"qps": "x"}]}', '`runs.0` is {"qps": "x"}'),
        ('{"values": {"a": 1}}', '`values` is {"a": 1}'),
        ('{"verdict": 3}', "`verdict` is 3"),
    ],
)
def test_broken_part_of_a_result_is_named(tmp_path: Path, body: str, said: str):
    (tmp_path / "result.json").write_text(body)
    with pytest.raises(InputError, match=re.escape(f"not the result of a trial ({said}); delete it")):
        Result.find(tmp_path)


def test_broken_result_costs_its_own_trial_only(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("trial-1", "trial-2"):
        (tmp_path / name).mkdir()
        Result(state="complete", values=[1.0]).save(tmp_path / name)
    (tmp_path / "trial-1/result.json").write_text("")
    assert list(results_in(tmp_path)) == ["trial-2"]
    assert "trial-1/result.json" in caplog.text


def test_result_with_more_values_than_others_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number, values in enumerate([[1.0], [2.0], [3.0, 4.0]]):
        (tmp_path / f"trial-{number}").mkdir()
        Result(state="complete", values=values).save(tmp_path / f"trial-{number}")
    assert set(results_in(tmp_path)) == {"trial-0", "trial-1"}
    assert "trial-2: 2 values, others have 1; left out" in caplog.text


def test_folder_with_a_number_that_no_study_gives_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("trial-1", "trial-01", "trial-1000", "trial-9999999999", "trial-²"):
        (tmp_path / name).mkdir()
        Result(state="complete", values=[1.0]).save(tmp_path / name)
    assert list(results_in(tmp_path)) == ["trial-1", "trial-1000"]
    assert caplog.messages == [f"{tmp_path}/trial-9999999999: no study gave a trial that number; left out"]
