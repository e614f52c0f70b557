import contextlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from autotune import tracking
from autotune.errors import TrackingError
from autotune.process import GuardedProcess
from autotune.result import Result
from autotune.schema import TrackingConfig


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


def test_trial_is_logged_once_below_its_study(tmp_path: Path, trial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with tracking.study(config(uri), "s", trial.parent) as tracker:
        for _ in range(2):
            tracker.log_trial(trial, "trial-0", Result.load(trial))
    client = MlflowClient(uri)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("e").experiment_id])}
    assert set(runs) == {"s", "trial-0"}
    child = runs["trial-0"].data
    assert child.tags["mlflow.parentRunId"] == runs["s"].info.run_id
    assert child.metrics["tokens_per_s"] == 5 and child.metrics["phase_start_s"] == 30
    assert child.params == {"engine.args.max_num_seqs": "8"}
    assert (child.tags["feasible"], child.tags["vllm"], child.tags["command"]) == ("true", "0.32.0", "vllm serve x")
    artifacts = {file.path for file in client.list_artifacts(runs["trial-0"].info.run_id)}
    assert artifacts == {"result.json", "vllm.log"}


def test_server_that_goes_away_costs_a_line_and_no_result(trial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"nothing is lost, log it later: python -m autotune.tracking"):
        tracking.Tracker(config("http://127.0.0.1:9"), "s", trial.parent)
    assert Result.load(trial).complete
    assert not (trial / "mlflow_run").exists()


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
    assert not list(trial.parent.glob("**/mlflow_run"))


def all_runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("e")
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def runs(uri: str) -> dict[str, Run]:
    return {run.info.run_name: run for run in all_runs(uri)}


def test_failed_trial_is_logged_as_failed_with_its_reason(tmp_path: Path, trial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with tracking.study(config(uri), "s", trial.parent) as tracker:
        tracker.log_trial(trial, "trial-0", Result(reason="StartError: no memory"))
    logged = runs(uri)
    assert logged["trial-0"].info.status == "FAILED" and logged["s"].info.status == "FINISHED"
    assert logged["trial-0"].data.tags["reason"] == "StartError: no memory"


def test_stopped_study_is_logged_as_killed(tmp_path: Path, trial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(KeyboardInterrupt), tracking.study(config(uri), "s", trial.parent):
        raise KeyboardInterrupt
    assert runs(uri)["s"].info.status == "KILLED"


def test_only_what_is_missing_is_logged_later(tmp_path: Path, trial: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
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


def test_folder_without_a_trial_is_said_to_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["autotune.tracking", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no result.json below it"):
        tracking.main()


@pytest.mark.slow
def test_study_whose_server_dies_is_logged_later_by_hand(tmp_path: Path, trial: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    arguments = ["--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *arguments, "--artifacts-destination", str(tmp_path / "kept")]
    with GuardedProcess(command, tmp_path / "server.log", {}, stop_timeout_s=5) as server:
        answers(uri, server)
        with tracking.study(config(uri), "s", trial.parent) as tracker:
            tracker.log_trial(trial, "trial-0", Result.load(trial))
            server.stop()
            late = trial.with_name("trial-1")
            shutil.copytree(trial, late, ignore=shutil.ignore_patterns("mlflow_run"))
            with pytest.raises(TrackingError, match=f"nothing is lost, log it later: .* --uri {uri}"):
                tracker.log_trial(late, "trial-1", Result.load(late))
    with GuardedProcess(command, tmp_path / "server.log", {}, stop_timeout_s=5) as server:
        answers(uri, server)
        later = [sys.executable, "-m", "autotune.tracking", str(trial.parent), "--uri", uri, "--experiment", "e"]
        done = subprocess.run(later, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout == f"2 trials of {trial.parent} are in MLflow at {uri}\n", done.stderr
        assert sorted(run.info.run_name for run in all_runs(uri)) == ["s", "trial-0", "trial-1"]


def answers(uri: str, server: GuardedProcess) -> None:
    while server.wait(0.2) is None:
        with contextlib.suppress(TrackingError):
            return tracking.check(config(uri))
    raise AssertionError("mlflow server ended")
