"""Studies that version 0.1 measured, as it left them: this version reads, shows and repeats them."""

import re
import shutil
from pathlib import Path

import pytest

from autotune.commands import compare, export, verify
from autotune.measure.prepare import prepare
from autotune.measure.result import Result, State
from autotune.results import report, summary
from autotune.results.study import Study, load

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(params=["interactive", "pareto"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Study:
    return load(str(shutil.copytree(RECORDED / f"study-0.1-{request.param}", tmp_path / request.param)))


def test_summary_tells_what_it_told_then(study: Study):
    then = (study.folder / "summary.txt").read_text()
    now = summary.render(study)
    table = re.compile(r"^(?:baseline|\s*trial-\d+) .*VALID$", re.MULTILINE)
    assert set(table.findall(now)) <= set(table.findall(then)) and table.findall(now)
    commands = re.compile(r"^ +vllm serve .*$", re.MULTILINE)
    assert set(commands.findall(now)) <= set(commands.findall(then)) and commands.findall(now)


def test_best_and_gain_are_those_of_then(tmp_path: Path):
    study = load(str(RECORDED / "study-0.1-interactive"))
    assert (study.best, study.served) == ("trial-0", "baseline")
    assert study.gain("trial-0") == pytest.approx(0, abs=1e-3)
    assert study.results["trial-3"].duplicate_of == "trial-0"
    assert load(str(RECORDED / "study-0.1-pareto")).front == ["trial-1", "trial-3"]


def test_its_report_is_written(study: Study):
    assert "baseline" in report.write(study).read_text()


def test_it_is_compared_exported_and_repeated(study: Study):
    ran = [name for name, one in study.swept.items() if not one.duplicate_of and one.state is not State.refused]
    trial, column = ran[0], compare.column_of(study)
    assert column.trials == len(ran)
    assert export.deployment(study, trial).flags
    settings = verify.Verify(study.name, trials=[trial], n=2)
    repeats = verify.plan(study, settings, verify.configurations(study, settings, []), [])
    assert {one.name for one in repeats} == {"baseline", trial}
    assert prepare(repeats[0].trial.config).args["max_model_len"] == 4096


@pytest.mark.parametrize(
    ("state", "reason", "now"),
    [
        ("failed", "StoppedError: stopped by the study", State.interrupted),
        ("failed", "KeyboardInterrupt", State.interrupted),
        ("failed", "StartError: out of memory", State.failed),
    ],
)
def test_trial_that_was_stopped_is_told_from_one_that_failed(state: str, reason: str, now: State):
    assert Result.of({"state": state, "reason": reason}).state is now
