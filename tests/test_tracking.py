import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from autotune import tracking
from autotune.errors import TrackingError
from autotune.result import Result
from autotune.schema import TrackingConfig


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take it seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of the test's own, in its working folder."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{shutil.copy(empty, tmp_path / 'mlflow.db')}"


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    folder = tmp_path / "multirun/s/trial-0"
    folder.mkdir(parents=True)
    (folder / "vllm.log").write_text("a log")
    Result(
        state="complete",
        values=[5.0],
        metrics={"tokens_per_s": 5.0, "ttft_p99.9_ms": 2.0},
        phases={"start": 30.0},
        params={"engine.args.max_num_seqs": 8},
        command=["vllm", "serve", "x"],
        facts={"vllm": "0.32.0"},
        verdict="VALID",
    ).save(folder)
    return folder


def config(uri: str) -> TrackingConfig:
    return TrackingConfig(uri=uri, experiment="e")


def all_runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("e")
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def runs(uri: str) -> dict[str, Run]:
    return {run.info.run_name: run for run in all_runs(uri)}


def test_trial_is_logged_once_below_its_study(uri: str, trial: Path):
    with tracking.study(config(uri), "s", trial.parent) as tracker:
        for _ in range(2):
            tracker.log_trial(trial, "trial-0", Result.load(trial))
    logged = runs(uri)
    assert len(all_runs(uri)) == 2
    child = logged["trial-0"].data
    assert child.tags["mlflow.parentRunId"] == logged["s"].info.run_id
    assert child.metrics["tokens_per_s"] == 5 and child.metrics["phase_start_s"] == 30
    assert child.params == {"engine.args.max_num_seqs": "8"}
    assert (child.tags["feasible"], child.tags["vllm"], child.tags["command"]) == ("true", "0.32.0", "vllm serve x")
    artifacts = {file.path for file in MlflowClient(uri).list_artifacts(logged["trial-0"].info.run_id)}
    assert artifacts == {"result.json", "vllm.log"}


def test_server_that_goes_away_costs_a_line_and_no_result(trial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"nothing is lost, log it later: python -m autotune.tracking"):
        tracking.Tracker(config("http://127.0.0.1:9"), "s", trial.parent)
    assert Result.load(trial).complete
    assert not (trial / "mlflow_run.json").exists()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "http://127.0.0.1:9",
            r"^tracking.uri=http://127.0.0.1:9: no MLflow server answers \(Connection refused\); .*$",
        ),
        ("http://me:pw@127.0.0.1:9", r"^tracking.uri=http://me:\*\*\*@127.0.0.1:9: no MLflow server answers"),
    ],
)
def test_server_that_is_not_there_is_one_line_and_shows_no_password(uri: str, message: str):
    with pytest.raises(TrackingError, match=message):
        tracking.check(config(uri))


def test_a_file_needs_no_server():
    tracking.check(config("sqlite:///none.db"))


def test_tracking_that_is_off_asks_no_server_and_logs_nothing(trial: Path):
    off = TrackingConfig(enabled=False, uri="http://127.0.0.1:9", experiment="e")
    tracking.check(off)
    with tracking.study(off, "s", trial.parent) as tracker:
        tracker.log_trial(trial, "trial-0", Result.load(trial))
    assert not list(trial.parent.glob("**/mlflow_run.json"))


def test_failed_trial_is_logged_as_failed_with_its_reason(uri: str, trial: Path):
    with tracking.study(config(uri), "s", trial.parent) as tracker:
        tracker.log_trial(trial, "trial-0", Result(reason="StartError: no memory"))
    logged = runs(uri)
    assert logged["trial-0"].info.status == "FAILED" and logged["s"].info.status == "FINISHED"
    assert logged["trial-0"].data.tags["reason"] == "StartError: no memory"


def test_stopped_study_is_logged_as_killed(uri: str, trial: Path):
    with pytest.raises(KeyboardInterrupt), tracking.study(config(uri), "s", trial.parent):
        raise KeyboardInterrupt
    assert runs(uri)["s"].info.status == "KILLED"


def test_only_what_is_missing_is_logged_later(uri: str, trial: Path, monkeypatch: pytest.MonkeyPatch):
    with tracking.study(config(uri), "s", trial.parent) as tracker:
        tracker.log_trial(trial, "trial-0", Result.load(trial))
    late = trial.with_name("trial-1")
    late.mkdir()
    Result.load(trial).save(late)
    command = ["autotune.tracking", str(trial.parent), "--uri", uri, "--experiment", "e"]
    monkeypatch.setattr(sys, "argv", command)
    for _ in range(2):
        tracking.main()
    assert sorted(run.info.run_name for run in all_runs(uri)) == ["s", "trial-0", "trial-1"]


def test_trial_logged_at_one_server_can_be_logged_at_another(
    tmp_path: Path, trial: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        uri = f"sqlite:///{tmp_path}/{name}.db"
        with tracking.study(config(uri), "s", trial.parent) as tracker:
            tracker.log_trial(trial, "trial-0", Result.load(trial))
        assert set(runs(uri)) == {"s", "trial-0"}


def test_port_that_is_no_number_is_one_line():
    with pytest.raises(TrackingError, match="the port is not a number"):
        tracking.check(config("http://localhost:abc"))


def test_folder_without_a_trial_is_said_to_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["autotune.tracking", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no result.json below it"):
        tracking.main()


@pytest.mark.slow
def test_study_is_logged_later_by_hand(tmp_path: Path, trial: Path):
    uri = f"sqlite:///{tmp_path}/later.db"
    command = [sys.executable, "-m", "autotune.tracking", str(trial.parent), "--uri", uri]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "1 trials of" in done.stdout, done.stderr
    assert len(MlflowClient(uri).search_runs(["1"])) == 2
