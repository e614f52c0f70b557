import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from autotune import tracking
from autotune.errors import TrackingError
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


@pytest.mark.slow
def test_study_is_logged_later_by_hand(tmp_path: Path, trial: Path):
    uri = f"sqlite:///{tmp_path}/later.db"
    command = [sys.executable, "-m", "autotune.tracking", str(trial.parent), "--uri", uri]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "1 trials of" in done.stdout, done.stderr
    assert len(MlflowClient(uri).search_runs(["1"])) == 2
