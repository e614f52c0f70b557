import json
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from omegaconf import OmegaConf

from autotune.commands import log
from autotune.config.schema import Config, DatasetConfig, ModelConfig, TrackingConfig
from autotune.errors import TrackingError
from autotune.live.gpu import GpuState
from autotune.measure import series
from autotune.measure.result import Result, RunRecord
from autotune.results import beside, tracking
from autotune.system.files import write_rows
from autotune.system.host import recorded
from tests.conftest import Main
from tests.slurm_cluster import wait_for


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
    """By the trial's folder, or the study's name."""
    return {run.data.tags.get("trial", run.info.run_name): run for run in all_runs(uri)}


def follow(uri: str, folder: Path, *trials: Path) -> int:
    """What the process beside a study does, in this one: with no `trials`, which it then finds by itself."""
    messages = [{"trial": str(trial)} for trial in trials]
    return beside.follow(config(uri), "s", folder, [*messages, {"status": "FINISHED"}])


def test_trial_is_logged_once_below_its_study(uri: str, trial: Path):
    assert follow(uri, trial.parent, trial, trial) == 0
    logged = runs(uri)
    assert len(all_runs(uri)) == 2
    child = logged["trial-0"].data
    assert child.tags["mlflow.parentRunId"] == logged["s"].info.run_id
    assert child.tags["mlflow.runName"] == "max_num_seqs=8"
    assert child.metrics["tokens_per_s"] == 5 and child.metrics["phase_start_s"] == 30
    assert child.params == {"engine.args.max_num_seqs": "8"}
    assert (child.tags["feasible"], child.tags["vllm"], child.tags["command"]) == ("true", "0.32.0", "vllm serve x")
    artifacts = {file.path for file in MlflowClient(uri).list_artifacts(logged["trial-0"].info.run_id)}
    assert artifacts == {"result.json", "vllm.log"}


def test_what_a_trial_showed_over_time_is_a_series_by_second(uri: str, trial: Path):
    began = 1000.0
    entries = [{"time": began, "phase": "run"}, {"time": began + 2, "step": 0, "values": {"tokens_per_s": 7.0}}]
    (trial / "progress.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (trial / "server.csv").write_text("time_s,running,kv_use\n0.5,3,0.25\n1.5,4,\n")
    state = GpuState(1.0, 0, 310.0, 60, 1980, 1.0, 5000.0, slowed=False, power_capped=True)
    write_rows(trial / "gpu.csv", GpuState, [state])
    (trial / "system.jsonl").write_text(json.dumps({"time": began - 20, "cpu_utilization_percentage": 12.0}) + "\n")
    follow(uri, trial.parent)
    client, run = MlflowClient(uri), runs(uri)["trial-0"].info.run_id

    def series(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run, name)]

    assert series("run/tokens_per_s") == [(2, 7.0)]
    assert series("server/running") == [(0, 3.0), (2, 4.0)] and series("server/kv_use") == [(0, 0.25)]
    assert series("gpu/power_w") == [(1, 310.0)] and series("gpu/power_capped") == [(1, 1.0)]
    assert series("system/cpu_utilization_percentage") == [(-20, 12.0)]


def test_long_series_is_thinned(trial: Path):
    rows = "".join(f"{second},{second}\n" for second in range(5000))
    (trial / "server.csv").write_text(f"time_s,running\n{rows}")
    assert 100 < len(series.read(trial, 0.0)) <= series.MOST


def test_several_runs_of_a_trial_keep_their_logs_apart(uri: str, trial: Path):
    (trial / "qps-8").mkdir()
    (trial / "qps-8/mlperf_log_summary.txt").write_text("VALID")
    result = Result.load(trial)
    result.runs, result.bound = [RunRecord("qps-8", "repeat", 8.0, "VALID")], "kv"
    result.intervals = {"tokens_per_s": [4.0, 6.0]}
    result.save(trial)
    follow(uri, trial.parent)
    run = runs(uri)["trial-0"]
    logged = MlflowClient(uri).list_artifacts(run.info.run_id, "qps-8")
    assert [file.path for file in logged] == ["qps-8/mlperf_log_summary.txt"]
    assert run.data.tags["bound"] == "kv"
    assert (run.data.metrics["tokens_per_s_low"], run.data.metrics["tokens_per_s_high"]) == (4, 6)


def test_data_set_is_logged_with_its_checksum(uri: str, trial: Path):
    made = Config(model=ModelConfig(name="m"), dataset=DatasetConfig(name="mine", path="mine.jsonl"))
    (trial / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(made)))
    result = Result.load(trial)
    result.facts |= {"dataset_checksum": "a" * 64, "dataset_samples": "12"}
    result.save(trial)
    follow(uri, trial.parent)
    (used,) = runs(uri)["trial-0"].inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.dataset.source_type) == ("mine", "a" * 36, "local")
    assert json.loads(used.dataset.profile) == {"samples": 12}


def ended(folder: Path, best: str | None) -> None:
    """What a study leaves at its end."""
    body = {"study": "s", "best": best, "figures": {"trials": 1.0}}
    (folder / "summary.json").write_text(json.dumps(body))
    (folder / "summary.txt").write_text("Study s: 1 trial")
    (folder / "report.html").write_text("<!doctype html>")


def test_best_configuration_is_registered_under_the_studys_name(uri: str, trial: Path):
    client = MlflowClient(uri)
    ended(trial.parent, "trial-0")
    for _ in range(2):  # a study that goes on finds the same again
        follow(uri, trial.parent, trial)
    logged = runs(uri)
    version = client.get_model_version_by_alias("s", "best")
    assert (int(version.version), version.run_id) == (1, logged["trial-0"].info.run_id)
    command = mlflow.artifacts.download_artifacts("models:/s@best/command.txt", tracking_uri=uri, registry_uri=uri)
    assert Path(command).read_text() == "vllm serve x\n"
    parent = logged["s"]
    assert "Study s: 1 trial" in parent.data.tags["mlflow.note.content"] and parent.data.metrics["trials"] == 1
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"report.html", "summary.txt"}


def test_server_without_a_registry_costs_nothing(uri: str, trial: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("no registry here")

    monkeypatch.setattr(MlflowClient, "create_registered_model", refuse)
    ended(trial.parent, "trial-0")
    follow(uri, trial.parent)
    assert runs(uri)["s"].data.metrics["trials"] == 1


def test_machine_is_sampled_while_a_trial_runs(tmp_path: Path):
    with recorded(tmp_path / series.SYSTEM, 0.1):
        wait_for(lambda: (tmp_path / series.SYSTEM).exists() and len(series.read(tmp_path, 0.0)) > 8, "samples", 60)
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= {
        point.metric for point in series.read(tmp_path, 0.0)
    }


def test_server_that_goes_away_costs_a_line_and_no_result(
    trial: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert follow("http://127.0.0.1:9", trial.parent, trial) > 0
    assert "MLflow at http://127.0.0.1:9 refused" in caplog.text
    assert Result.load(trial).complete
    assert not (trial / "mlflow_run.json").exists()


@pytest.fixture
def mute() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://127.0.0.1:9", "no MLflow server answers (Connection refused); start it, write another"),
        ("http://me:***@127.0.0.1:9/x", "no MLflow server answers (Connection refused); start it, write another"),
        ("http://127.0.0.1:{mute}", "no MLflow server answers (timed out); start it, write another"),
        ("http://localhost:abc", "no MLflow server answers (nonnumeric port: 'abc'); start it, write another"),
        ("postgresql+psycopg://me:***@127.0.0.1:9/x", "no MLflow server answers (connection failed: "),
        ("mysql+pymysql://me:***@127.0.0.1:{mute}/x", "no MLflow server answers ("),
        ("mssql+none://x/y", "Can't load plugin"),
        ("htp://host", "MLflow knows no htp://; write http://… or sqlite:///…"),
        ("sqlite:////proc/mlflow.db", "no file can be made in /proc"),
        ("sqlite:////proc/none/mlflow.db", "no file can be made in /proc"),
        ("sqlite:////dev/full", "it is no file; write another"),
        ("sqlite:///notes.txt", "file is not a database; write another"),
        ("mlruns", "this MLflow keeps no runs in a folder, but in sqlite:///<file>; write another"),
        ("file:///tmp/mlruns", "this MLflow keeps no runs in a folder, but in sqlite:///<file>; write another"),
        ("sqlite:///others.db", "it is another program's database; write another"),
    ],
)
def test_uri_where_nothing_can_be_logged_is_one_line_before_a_study(
    uri: str, said: str, mute: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "ANSWER_S", 0.1)
    monkeypatch.setitem(tracking.SERVERS, "mysql", {"connect_timeout": 1, "read_timeout": 0.1})
    Path("notes.txt").write_text("a text, and no database " * 50)
    with closing(sqlite3.connect("others.db")) as database:
        database.execute("CREATE TABLE things (name)")
    uri = uri.format(mute=mute)
    with pytest.raises(TrackingError) as error:
        tracking.check(config(uri.replace("***", "pw")))
    assert str(error.value).startswith(f"tracking.uri={uri}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["sqlite:///new/mlflow.db", "databricks"])
def test_what_needs_no_server_is_not_asked(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tracking.check(config(uri))


def test_experiment_has_a_name():
    with pytest.raises(TrackingError, match=r"tracking\.experiment=: write a name"):
        tracking.check(TrackingConfig(uri="sqlite:///x.db", experiment=" "))


def test_tracking_that_is_off_asks_no_server_and_logs_nothing(trial: Path):
    off = TrackingConfig(enabled=False, uri="http://127.0.0.1:9", experiment="e")
    tracking.check(off)
    with beside.study(off, "s", trial.parent) as process:
        process.log_trial(trial)
    assert not list(trial.parent.glob("**/mlflow_run.json"))


def test_failed_trial_is_logged_as_failed_with_its_reason(uri: str, trial: Path):
    Result(reason="StartError: no memory").save(trial)
    follow(uri, trial.parent)
    logged = runs(uri)
    assert logged["trial-0"].info.status == "FAILED" and logged["s"].info.status == "FINISHED"
    assert logged["trial-0"].data.tags["reason"] == "StartError: no memory"


@pytest.mark.slow
def test_trial_that_fails_alone_is_logged_too(main: Main, tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    small = ["model=llama8b", "backend=sim", "engine.args.gpu_memory_utilization=0.1"]
    assert main(*small, f"tracking.uri={uri}", "tracking.experiment=e").returncode == 1
    (run,) = all_runs(uri)
    assert run.info.status == "FAILED" and run.data.tags["reason"].startswith("StartError: no memory is left")


def test_stopped_study_is_logged_as_killed(uri: str, trial: Path):
    beside.follow(config(uri), "s", trial.parent, [])
    assert runs(uri)["s"].info.status == "KILLED"


def test_only_what_is_missing_is_logged_later(uri: str, trial: Path, monkeypatch: pytest.MonkeyPatch):
    """Repeats have a study of their own, canaries are no trials, and a broken result costs no other."""
    follow(uri, trial.parent)
    for name in ("trial-1", "canary-n1", "verify/trial-0-1", "trial-2"):
        (trial.parent / name).mkdir(parents=True)
        Result.load(trial).save(trial.parent / name)
    (trial.parent / "trial-2/result.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["log", str(trial.parent), "--uri", uri, "--experiment", "e"])
    for _ in range(2):
        log.main()
    assert len(all_runs(uri)) == 5
    found = runs(uri)
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in found.items()}
    study, repeats = found["s"].info.run_id, found["s-verify"].info.run_id
    assert parents == {"s": None, "trial-0": study, "trial-1": study, "s-verify": None, "trial-0-1": repeats}
    assert [found[name].data.tags["study"] for name in ("trial-0", "trial-0-1")] == ["s", "s-verify"]


def test_database_that_was_deleted_since_gets_all_of_it_again(
    uri: str, empty: Path, trial: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["log", str(trial.parent), "--uri", uri, "--experiment", "e"])
    log.main()
    shutil.copy(empty, uri.removeprefix("sqlite:///"))
    log.main()
    assert set(runs(uri)) == {"s", "trial-0"}


@pytest.mark.parametrize("run", [3, None, [], {"a": 1}, "", "é\0", "a" * 32])
def test_note_of_a_run_holds_an_id(tmp_path: Path, run: object):
    (tmp_path / tracking.RUNS).write_text(json.dumps({"sqlite:///a.db": run}))
    assert tracking.known_run(tmp_path, "sqlite:///a.db") == (run if run == "a" * 32 else None)


def test_broken_note_of_a_run_costs_a_second_run_and_no_traceback(uri: str, trial: Path):
    (trial / "mlflow_run.json").write_text("{")
    follow(uri, trial.parent)
    assert set(runs(uri)) == {"s", "trial-0"}


def test_trial_logged_at_one_server_can_be_logged_at_another(
    empty: Path, tmp_path: Path, trial: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        uri = f"sqlite:///{shutil.copy(empty, tmp_path / f'{name}.db')}"
        follow(uri, trial.parent)
        assert set(runs(uri)) == {"s", "trial-0"}


def test_folder_without_a_trial_is_said_to_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["log", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no result.json of a trial that ran below it"):
        log.main()


@pytest.mark.parametrize("missing", [[], ["webhook_events", "webhooks"]])
def test_half_made_database_is_named_as_what_to_delete(
    missing: list[str], uri: str, trial: Path, caplog: pytest.LogCaptureFixture
):
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'c48cb773bb87'")
        for table in missing:
            database.execute(f"DROP TABLE {table}")
        database.commit()
    assert follow(uri, trial.parent, trial) > 0
    assert "mlflow.db is half made" in caplog.text and "delete it" in caplog.text


def test_new_database_that_can_t_be_finished_leaves_none(
    trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(_: object, tracking_uri: str) -> None:
        Path(tracking_uri.removeprefix("sqlite:///")).write_text("half of it")
        raise OSError("database or disk is full")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MlflowClient, "__init__", fail)
    assert follow("sqlite:///mlflow.db", trial.parent, trial) > 0
    assert "database or disk is full" in caplog.text
    assert not list(tmp_path.glob("*mlflow.db*"))


def test_server_that_never_answers_is_left_and_named_with_the_command_that_logs_later(
    mute: int, trial: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(beside, "SERVER_QUIET_S", 0.1)
    uri = f"http://127.0.0.1:{mute}"
    with beside.study(config(uri), "s", trial.parent) as process:
        for _ in range(1000):  # more than the pipe holds
            process.log_trial(trial)
    (said,) = caplog.messages
    assert said.startswith(f"MLflow lacks 1000 of 1000 trials ({uri} does not answer); nothing is lost, log it later")
    assert said.endswith(f"autotune log {trial.parent} --uri {uri} --experiment e")


@pytest.mark.slow
def test_process_beside_a_study_logs_its_trials(uri: str, trial: Path, caplog: pytest.LogCaptureFixture):
    with beside.study(config(uri), "s", trial.parent) as process:
        process.log_trial(trial)
    assert set(runs(uri)) == {"s", "trial-0"} and runs(uri)["s"].info.status == "FINISHED"
    assert (trial.parent / beside.LOG).read_text() == "" and not caplog.messages


@pytest.mark.slow
def test_reason_of_the_process_reaches_the_study(uri: str, trial: Path, caplog: pytest.LogCaptureFixture):
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'c48cb773bb87'")
        database.commit()
    with beside.study(config(uri), "s", trial.parent) as process:
        process.log_trial(trial)
    (said,) = caplog.messages
    assert said.startswith("MLflow lacks 1 of 1 trials") and "delete it" in said


@pytest.mark.slow
def test_full_disk_is_told_and_not_what_follows_from_it(trial: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with beside.study(config(f"sqlite:///{tmp_path}/new.db"), "s", trial.parent) as process:
            process.log_trial(trial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (said,) = caplog.messages
    assert said.startswith("MLflow lacks 1 of 1 trials") and "disk" in said


def test_check_makes_neither_a_folder_nor_a_file(tmp_path: Path):
    tracking.check(config(f"sqlite:///{tmp_path}/none/such/mlflow.db"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_study_is_logged_later_by_hand(tmp_path: Path, trial: Path):
    uri = f"sqlite:///{tmp_path}/later.db"
    command = [sys.executable, "-m", "autotune.tracking", str(trial.parent), "--uri", uri]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "1 trial of" in done.stdout, done.stderr
    assert len(MlflowClient(uri).search_runs(["1"])) == 2


@pytest.mark.slow
def test_two_studies_that_start_together_make_one_database(tmp_path: Path) -> None:
    connect = (
        "from autotune.config import schema; from autotune.results import tracking; "
        "print(tracking._connected(schema.TrackingConfig(uri='sqlite:///new/mlflow.db', experiment='e'))[1])"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", connect], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = [(one.communicate(), one.returncode) for one in both]
    assert [code for _, code in ends] == [0, 0], ends
    assert len({said for (said, _), _ in ends}) == 1
