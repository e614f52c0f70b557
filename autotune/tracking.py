"""The only home of MLflow: a parent run for a study, a child run for a trial.

Everything logged is read from the trials' folders, so a study whose MLflow server was down can be logged
later:  python -m autotune.tracking multirun/<study> --uri http://…
"""

import argparse
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autotune.errors import TrackingError
from autotune.redact import redact
from autotune.result import Result
from autotune.schema import TrackingConfig

# A server that is gone is reported in seconds, not after MLflow's default of minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Artifacts of a trial; everything else in its folder is a working file.
ARTIFACTS = (
    "result.json",
    "config.yaml",
    "command.json",
    "vllm.log",
    "loadgen.log",
    "mlperf_log_summary.txt",
    "mlperf_log_detail.txt",
    "requests.csv",
)


def check(config: TrackingConfig) -> None:
    """Raise TrackingError if the MLflow server does not answer; a file always does."""
    address = urlsplit(config.uri)
    if not config.enabled or address.scheme not in ("http", "https"):
        return
    try:
        port = address.port or {"http": 80, "https": 443}[address.scheme]
    except ValueError:
        raise TrackingError(f"tracking.uri={redact(config.uri)}: the port is not a number") from None
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError as error:
        raise TrackingError(
            f"tracking.uri={redact(config.uri)}: no MLflow server answers ({error.strerror or error}); start it "
            f"(`mlflow server --port {port}`), or write tracking=none"
        ) from None


class Tracker:
    """Logs trials below one parent run, or does nothing when tracking is off."""

    def __init__(self, config: TrackingConfig, study: str | None, folder: Path) -> None:
        self._enabled = config.enabled
        self._uri = redact(config.uri)
        self._parent: str | None = None
        if not self._enabled:
            return
        with self._errors():
            self._client, self._experiment = _connect(config)
            if study is not None:
                known = _known_run(folder, self._uri)
                self._parent = known or self._create(folder, study, {"autotune.study": study}, time.time())

    def log_trial(self, folder: Path, name: str, result: Result) -> None:
        """Log a trial's parameters, metrics, tags and artifacts once. Raises TrackingError."""
        if not self._enabled or _known_run(folder, self._uri):
            return
        from mlflow.entities import Metric, Param, RunTag

        with self._errors():
            tags = {
                "state": result.state,
                "feasible": str(result.feasible).lower(),
                "verdict": result.verdict,
                "reason": result.reason or "; ".join(result.reasons),
                "estimated": str(result.estimated).lower(),
                **result.config,
                **result.facts,
            }
            if self._parent:
                tags["mlflow.parentRunId"] = self._parent
            run = self._create(folder, name, tags, result.started_at, keep=False)
            ended = int(result.ended_at * 1000)
            figures = result.metrics | {f"phase_{phase}_s": value for phase, value in result.phases.items()}
            flags = {f"engine.args.{flag}": value for flag, value in result.args.items()}
            self._client.log_batch(
                run,
                metrics=[Metric(key, value, ended, 0) for key, value in figures.items()],
                params=[Param(key, str(value)) for key, value in (flags | result.params).items()],
                tags=[RunTag("command", result.shell_command[:5000])],
            )
            for file in ARTIFACTS:
                if (folder / file).exists():
                    self._client.log_artifact(run, str(folder / file))
            self._client.set_terminated(run, "FINISHED" if result.complete else "FAILED", ended)
            _remember(folder, self._uri, run)

    def summarise(self, folder: Path, figures: dict[str, float]) -> None:
        """Put the study's figures and summary on the parent run; a server that is down is no reason to fail."""
        if not self._parent:
            return
        try:
            with self._errors():
                for name, value in figures.items():
                    self._client.log_metric(self._parent, name, value)
                self._client.log_artifact(self._parent, str(folder / "summary.txt"))
        except TrackingError:
            pass  # each trial has already said so

    def end(self, status: str) -> None:
        if self._parent:
            try:
                with self._errors():
                    self._client.set_terminated(self._parent, status)
            except TrackingError:
                pass

    def _create(self, folder: Path, name: str, tags: dict[str, str], started: float, keep: bool = True) -> str:
        tags = {"mlflow.runName": name, **{key: str(value)[:5000] for key, value in tags.items() if value}}
        run = self._client.create_run(self._experiment, start_time=int(started * 1000), tags=tags)
        if keep:
            _remember(folder, self._uri, run.info.run_id)
        run_id: str = run.info.run_id
        return run_id

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
            raise TrackingError(
                f"MLflow at {self._uri} refused ({str(error).splitlines()[0][:200]}); nothing is lost, log it later: "
                f"python -m autotune.tracking <study's folder> --uri {self._uri}"
            ) from None


@contextmanager
def study(config: TrackingConfig, name: str, folder: Path) -> Iterator[Tracker]:
    """A parent run for the study `name`, ended with the study."""
    tracker = Tracker(config, name, folder)
    status = "KILLED"
    try:
        yield tracker
        status = "FINISHED"
    finally:
        tracker.end(status)


def _connect(config: TrackingConfig) -> tuple[Any, str]:
    """MLflow's client and the experiment's id; makes the database and the experiment when they are missing."""
    for noisy in ("alembic", "mlflow.store.db.utils"):  # each migration of a new database
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    address = urlsplit(config.uri)
    if address.scheme == "sqlite":
        Path(address.path.removeprefix("/")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment:
        return client, experiment.experiment_id
    local = address.scheme not in ("http", "https")
    artifacts = Path("multirun/mlartifacts").resolve().as_uri() if local else None
    return client, client.create_experiment(config.experiment, artifact_location=artifacts)


def _known_run(folder: Path, uri: str) -> str | None:
    """The run that `folder` was logged as at `uri`."""
    file = folder / "mlflow_run.json"
    found: str | None = json.loads(file.read_text()).get(uri) if file.exists() else None
    return found


def _remember(folder: Path, uri: str, run: str) -> None:
    file = folder / "mlflow_run.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {uri: run}))


def main() -> None:
    """Log what is missing of a study, or of a single trial."""
    parser = argparse.ArgumentParser(prog="python -m autotune.tracking", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="multirun/<study>, or one trial's folder")
    parser.add_argument("--uri", default="sqlite:///multirun/mlflow.db", help="MLflow tracking URI")
    parser.add_argument("--experiment", default="autotune", help="MLflow experiment")
    options = parser.parse_args()
    trials = sorted(path.parent for path in options.folder.glob("**/result.json"))
    if not trials:
        sys.exit(f"{options.folder}: no result.json below it")
    single = trials == [options.folder]
    try:
        config = TrackingConfig(uri=options.uri, experiment=options.experiment)
        check(config)
        tracker = Tracker(config, None if single else options.folder.name, options.folder)
        for folder in trials:
            tracker.log_trial(folder, folder.name, Result.load(folder))
        tracker.end("FINISHED")
    except TrackingError as error:
        sys.exit(str(error))
    print(f"{len(trials)} trials of {options.folder} are in MLflow at {redact(options.uri)}")


if __name__ == "__main__":
    main()
