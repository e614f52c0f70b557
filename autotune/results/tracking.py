"""MLflow: a parent run for a study, a child run for each trial, a registered model for the best configuration.

All that is logged is read from the trials' folders, so a study whose MLflow server was down can be logged later:
`autotune log multirun/<study> --uri http://…`
"""

import fcntl
import getpass
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from autotune.config.redact import redact
from autotune.config.schema import TrackingConfig
from autotune.errors import TrackingError
from autotune.measure import series
from autotune.measure.result import Result
from autotune.system.files import write_whole
from autotune.text import shorten

# A server that is gone is reported in seconds, not after MLflow's default of minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run, and a call for each

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
    series.SERVER,
    series.GPU,
)
STUDY_ARTIFACTS = ("summary.txt", "report.html", "pareto.json")
RUNS = "mlflow_run.json"  # in a trial's or a study's folder: its run's id, by tracking URI
CONFIGURATION = "configuration"  # artifacts of the best trial that a registered version holds
BATCH = 1000  # metrics that MLflow takes in one call

log = logging.getLogger(__name__)


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
                known = self._logged_run(folder)
                self._parent = known or self._create(folder, study, {"autotune.study": study}, time.time())

    def log_trial(self, folder: Path, name: str, result: Result) -> None:
        """Log a trial once, named by what it changed: parameters, metrics, series, data set, artifacts.

        Raises TrackingError.
        """
        if not self._enabled:
            return
        from mlflow.entities import Metric, Param, RunTag

        with self._errors():
            if self._logged_run(folder):
                return
            tags = {
                "trial": name,
                "state": result.state,
                "feasible": str(result.feasible).lower(),
                "verdict": result.verdict,
                "bound": result.bound,
                "reason": result.reason or "; ".join(result.reasons),
                "estimated": str(result.estimated).lower(),
                **result.config,
                **result.facts,
            }
            if self._parent:
                tags |= {"mlflow.parentRunId": self._parent, "study": folder.parent.name}
            run = self._create(folder, shorten(result.params) or name, tags, result.started_at, keep=False)
            ended = int(result.ended_at * 1000)
            figures = result.metrics | {f"phase_{phase}_s": value for phase, value in result.phases.items()}
            figures |= {f"start_{part}_s": value for part, value in result.start.items()}
            for metric, (low, high) in result.intervals.items():
                figures |= {f"{metric}_low": low, f"{metric}_high": high}
            defaults = {key: value for key, value in result.defaults.items() if value is not None}
            flags = defaults | {f"engine.args.{flag}": value for flag, value in result.args.items()}
            metrics = [Metric(key, value, ended, 0) for key, value in figures.items()]
            metrics += [
                Metric(point.metric, point.value, int(point.time * 1000), point.second)
                for point in series.read(folder, result.started_at)
            ]
            params = [Param(key, str(value)) for key, value in (flags | result.params).items()]
            self._client.log_batch(run, metrics[:BATCH], params, [RunTag("command", result.shell_command[:5000])])
            for at in range(BATCH, len(metrics), BATCH):
                self._client.log_batch(run, metrics[at : at + BATCH])
            self._log_dataset(run, folder, result)
            for one in ["", *(several.folder for several in result.runs)]:
                for file in ARTIFACTS:
                    if (folder / one / file).exists():
                        self._client.log_artifact(run, str(folder / one / file), one or None)
            self._client.set_terminated(run, "FINISHED" if result.complete else "FAILED", ended)
            _remember(folder, self._uri, run)

    def _logged_run(self, folder: Path) -> str | None:
        """The run that `folder` was logged as, if the store still has it."""
        from mlflow.exceptions import MlflowException

        run = _known_run(folder, self._uri)
        try:
            return run if run and self._client.get_run(run).info.lifecycle_stage == "active" else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _log_dataset(self, run: str, folder: Path, result: Result) -> None:
        """The data set as MLflow knows one; its digest is the first 36 digits of the samples' checksum."""
        checksum = result.facts.get("dataset_checksum")
        if not checksum or not (folder / "config.yaml").exists():
            return
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.entities import Dataset, DatasetInput, InputTag

        written: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        dataset = written["dataset"]
        if dataset["path"]:
            kind, source = "local", json.dumps({"uri": dataset["path"]})
        else:
            kind, source = "code", CodeDatasetSource(tags=dataset["records"] or {}).to_json()
        profile = json.dumps({"samples": int(result.facts.get("dataset_samples", 0))})
        made = Dataset(dataset["name"], checksum[:36], kind, source, profile=profile)
        self._client.log_inputs(run, [DatasetInput(made, [InputTag("mlflow.data.context", "evaluation")])])

    def summarise(self, folder: Path) -> None:
        """Log a study's summary from `folder` on the parent run; a server that is down is no reason to fail."""
        if not self._parent or not (folder / "summary.json").exists():
            return
        from mlflow.entities import Metric, RunTag

        body = json.loads((folder / "summary.json").read_text())
        best = Result.find(folder / body["best"]) if body["best"] else None
        try:
            with self._errors():
                now = int(time.time() * 1000)
                words = (folder / "summary.txt").read_text()
                tags = {"mlflow.note.content": f"```\n{words}```", "best": body["best"] or ""}
                if best:
                    tags |= {"command": best.shell_command[:5000], **best.config}
                self._client.log_batch(
                    self._parent,
                    metrics=[Metric(key, value, now, 0) for key, value in body["figures"].items()],
                    tags=[RunTag(key, value) for key, value in tags.items() if value],
                )
                for file in STUDY_ARTIFACTS:
                    if (folder / file).exists():
                        self._client.log_artifact(self._parent, str(folder / file))
        except TrackingError:
            return  # each trial has already said so
        if best and (run := _known_run(folder / body["best"], self._uri)):
            try:
                with self._errors():
                    self._register(body["study"], best, run)
            except TrackingError as error:
                log.info("the best configuration is not registered: %s", error)

    def _register(self, study: str, best: Result, run: str) -> None:
        """The best configuration as a version of the registered model `study`, under the alias `best`.

        A registered model is what MLflow finds by name (models:/<study>@best) and deploys; its versions keep what was
        best before, and the run that measured it.
        """
        from mlflow.exceptions import MlflowException

        name = study.replace("/", "-").replace(":", "-")
        try:
            self._client.create_registered_model(
                name, best.config, f"vLLM's configuration that study {study} found best"
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            known = self._client.get_registered_model(name)
            versions = [self._client.get_model_version(name, version) for version in known.aliases.values()]
            if any(version.run_id == run for version in versions):
                return
        self._client.log_text(run, best.shell_command + "\n", f"{CONFIGURATION}/command.txt")
        self._client.log_dict(run, best.args, f"{CONFIGURATION}/args.json")
        source = f"runs:/{run}/{CONFIGURATION}"
        tags = {"feasible": str(best.feasible).lower(), "estimated": str(best.estimated).lower(), **best.facts}
        version = self._client.create_model_version(
            name, source, run, tags=tags, description=best.shell_command, await_creation_for=0
        )
        self._client.set_registered_model_alias(name, "best", version.version)

    def end(self, status: str) -> None:
        if self._parent:
            try:
                with self._errors():
                    self._client.set_terminated(self._parent, status)
            except TrackingError:
                pass

    def _create(self, folder: Path, name: str, tags: dict[str, str], started: float, keep: bool = True) -> str:
        source = {"mlflow.user": getpass.getuser(), "mlflow.source.name": "autotune", "mlflow.source.type": "LOCAL"}
        tags = {"mlflow.runName": name[:250], **source, **{key: str(value) for key, value in tags.items() if value}}
        tags = {key: value[:5000] for key, value in tags.items()}
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
                f"autotune log <study's folder> --uri {self._uri}"
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

    local = urlsplit(config.uri).scheme not in ("http", "https")
    artifacts = Path("multirun/mlartifacts").resolve().as_uri() if local else None
    with _sole_maker(config.uri):
        client = MlflowClient(tracking_uri=config.uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment:
            return client, experiment.experiment_id
        return client, client.create_experiment(config.experiment, artifact_location=artifacts)


@contextmanager
def _sole_maker(uri: str) -> Iterator[None]:
    """Studies that start at the same moment take turns: MLflow can't make one SQLite database twice."""
    address = urlsplit(uri)
    if address.scheme != "sqlite":
        yield
        return
    folder = Path(address.path.removeprefix("/")).parent
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _known_run(folder: Path, uri: str) -> str | None:
    """The run that `folder` was logged as at `uri`."""
    run: str | None = _runs(folder).get(uri)
    return run


def _remember(folder: Path, uri: str, run: str) -> None:
    write_whole(folder / RUNS, json.dumps(_runs(folder) | {uri: run}))


def _runs(folder: Path) -> dict[str, str]:
    """The runs that `folder` was logged as, by URI; none if the file that says so is broken."""
    try:
        known = json.loads((folder / RUNS).read_text())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}
