"""A study goes on only with what its measurements depend on, and only where its results and its storage agree."""

from pathlib import Path

import pytest

from autotune.errors import InputError
from tests.studies import SEQS, asked, study

SWEEP = [f"{SEQS}=choice(16,32,64,128)", "sampler=random"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    study(folder, *SWEEP, "n_trials=1")
    return folder


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ("dataset=synthetic", "dataset.name="),
        ("scenario.qps=9", "scenario.qps=1.0 (now 9.0)"),
        ("scenario.ttft_ms=100", "scenario.ttft_ms=unset (now 100.0)"),
        ("scenario.seed=3", "scenario.seed=1 (now 3)"),
        ("model.revision=other", "model.revision=unset (now other)"),
        ("engine.args.dtype=half", "engine.args.dtype=unset (now half)"),
    ],
)
def test_study_does_not_go_on_with_what_can_not_be_compared(begun: Path, changed: str, key: str):
    with pytest.raises(InputError, match="was measured with") as refused:
        study(begun, *SWEEP, "n_trials=3", changed)
    assert key in str(refused.value)
    assert len(asked(begun)) == 1


def test_simulated_study_does_not_go_on_with_measurements(tmp_path: Path):
    study(tmp_path, *SWEEP, "n_trials=1", simulated=True)
    with pytest.raises(InputError, match=r"backend\._target_=autotune\.sim\.backend\.SimBackend"):
        study(tmp_path, *SWEEP, "n_trials=3")


def test_study_goes_on_with_more_trials_another_sampler_and_a_budget(tmp_path: Path):
    study(tmp_path, *SWEEP, "n_trials=1")
    study(tmp_path, f"{SEQS}=choice(16,32,64,128)", "sampler=tpe", "seed=4", "n_trials=2", "budget=1h")


@pytest.mark.parametrize("lost", ["gone", "empty"])
def test_results_that_the_storage_does_not_know_are_not_measured_over(tmp_path: Path, lost: str):
    study(tmp_path, *SWEEP, "n_trials=2")
    folder = tmp_path / "multirun/s"
    before = {path: path.read_text() for path in folder.glob("*/result.json")}
    (folder / "study.log").unlink()
    if lost == "empty":
        (folder / "study.log").touch()
    with pytest.raises(InputError, match=r"holds results that the study's storage does not know"):
        study(tmp_path, *SWEEP, "n_trials=2")
    assert {path: path.read_text() for path in folder.glob("*/result.json")} == before


def test_broken_result_does_not_end_the_study(tmp_path: Path):
    study(tmp_path, *SWEEP, "n_trials=2")
    (tmp_path / "multirun/s/trial-1/result.json").write_text("")
    said = study(tmp_path, *SWEEP, "n_trials=3")
    assert "trial-1/result.json: not the result of a trial" in said and "Study s: 2 trials, 0 failed" in said
