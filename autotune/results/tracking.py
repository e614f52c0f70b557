"""MLflow: a parent run for a study, a child run for each trial, a registered model for the best configuration.

All that is logged is read from the trials' folders, so a study whose MLflow server was down can be logged later:
`autotune log multirun/<study> --uri http://…`. A study has `results.beside` log it meanwhile.
"""

import fcntl
import getpass
import json
import logging
import os
import sqlite3
import ssl
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from autotune.config.redact import redact
from autotune.config.schema import TrackingConfig
from autotune.errors import TrackingError
from autotune.measure import series
from autotune.measure.result import Result
from autotune.results import summary
from autotune.results.study import CANARY, result_in
from autotune.system.files import draft_of, left_in, write_whole
from autotune.text import one_line, shorten

# A server that is gone is reported in seconds, not after MLflow's default of minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # what it says it raises, too
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run, and a call for each

# Artifacts of a trial; everything else in its folder is a working file.
ARTIFACTS = (
    *("result.json", "config.yaml", "command.json", "vllm.log", "loadgen.log"),
    *("mlperf_log_summary.txt", "mlperf_log_detail.txt", "requests.csv", series.STEPS, series.SERVER, series.GPU),
)
STUDY_ARTIFACTS = ("summary.txt", "report.html", "pareto.json")
RUNS = "mlflow_run.json"  # in a trial's or a study's folder: its run's id, by tracking URI
CONFIGURATION = "configuration"  # artifacts of the best trial that a registered version holds
ANSWER_S = 5  # a server must answer within, before a study begins
# URIs that MLflow knows, by scheme; a database's with what makes its driver ask no longer than ANSWER_S.
FILES = ("sqlite", "file", "")
SERVERS: dict[str, dict[str, Any]] = {
    "postgresql": {"connect_timeout": ANSWER_S},
    "mysql": {"connect_timeout": ANSWER_S, "read_timeout": ANSWER_S},
    "mssql": {"timeout": ANSWER_S},
}
OTHERS = ("http", "https", "databricks", "databricks-uc", "uc")
# What SQLite says of a file that is in order; whatever else MLflow stumbles over when it opens one lies in its tables.
IN_ORDER = ("full", "locked", "readonly", "unable to open", "disk I/O")

log = logging.getLogger(__name__)


def check(config: TrackingConfig) -> None:
    """Raise TrackingError within seconds if nothing answers at tracking.uri, or no file can be there."""
    if not config.enabled:
        return
    where = f"tracking.uri={redact(config.uri)}"
    if not config.experiment.strip():
        raise TrackingError("tracking.experiment=: write a name")
    try:
        _check_at(config.uri)
    except ImportError as error:
        raise TrackingError(f"{where}: {error}; install it, or name another driver: postgresql+psycopg://…") from None
    except (OSError, HTTPException, ValueError, sqlite3.Error) as error:
        why = getattr(error, "reason", None) or error
        why = redact(one_line(getattr(why, "strerror", None) or why))
        said = f"no MLflow server answers ({why}); start it," if is_server(config.uri) else f"{why};"
        raise TrackingError(f"{where}: {said} write another tracking.uri, or tracking=none") from None


def is_server(uri: str) -> bool:
    """Tell whether `uri` is a server's, and not a file's."""
    return _kind(uri) not in FILES


def _kind(uri: str) -> str:
    return urlsplit(uri).scheme.partition("+")[0]


def _check_at(uri: str) -> None:
    kind = _kind(uri)
    if kind in ("http", "https"):
        at = urlsplit(uri)
        request = urllib.request.Request(f"{kind}://{at.netloc.rpartition('@')[2]}{at.path}", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=ANSWER_S).close()
        except HTTPError:
            pass
        except URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # MLflow has settings of its own for certificates
                raise
    elif kind in SERVERS:
        _check_database(uri, SERVERS[kind])
    elif kind == "sqlite":
        _check_sqlite(_file(uri))
    elif kind in FILES and uri != "databricks":
        from mlflow import environment_variables  # takes a while, too

        allowed = getattr(environment_variables, "MLFLOW_ALLOW_FILE_STORE", None)
        if allowed and not allowed.get():
            raise ValueError("this MLflow keeps no runs in a folder, but in sqlite:///<file>")
    elif kind and kind not in (*OTHERS, *(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))):
        raise TrackingError(f"tracking.uri={redact(uri)}: MLflow knows no {kind}://; write http://… or sqlite:///…")


def _check_database(uri: str, driver: dict[str, Any]) -> None:
    """Raise ValueError unless a database answers at `uri`; `driver` is what its driver takes."""
    import sqlalchemy  # takes a while, and few trials ask a database

    try:
        engine = sqlalchemy.create_engine(uri, connect_args=driver)
        engine.connect().close()
        engine.dispose()
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise ValueError(getattr(error, "orig", None) or error) from None


def _check_sqlite(file: Path) -> None:
    """Raise OSError, sqlite3.Error or ValueError unless `file` is a database of MLflow's, or one can be made there."""
    if not file.exists():
        there = next(folder for folder in file.absolute().parents if folder.exists())
        try:
            TemporaryFile(dir=there).close()
        except OSError as error:
            raise ValueError(f"no file can be made in {there} ({error.strerror})") from None
        return
    if not file.is_file():
        raise ValueError("it is no file")
    with closing(sqlite3.connect(file, timeout=ANSWER_S)) as database:
        database.execute("BEGIN IMMEDIATE")
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    if tables and "experiments" not in tables:
        raise ValueError("it is another program's database")


class Tracker:
    """Logs trials, those of a study below one parent run."""

    def __init__(self, config: TrackingConfig, study: str | None, folder: Path) -> None:
        """Connect, and begin or find the parent run of `study`, which `folder` holds. Raises TrackingError."""
        self._uri, self._study = redact(config.uri), study or ""
        self._parent: str | None = None
        with self._errors():
            self._client, self._experiment = _connected(config)
            if study is not None:
                known = self._logged_run(folder)
                self._parent = known or self._create(study, {"autotune.study": study}, time.time())
                _remember(folder, self._uri, self._parent)

    def log_trial(self, folder: Path, result: Result) -> None:
        """Log a trial once, named by what it changed: parameters, metrics, series, data set, artifacts.

        Raises TrackingError.
        """
        from mlflow.entities import Metric, Param, RunTag

        with self._errors():
            if self._logged_run(folder):
                return
            tags = _tags(result, folder)
            if self._parent:
                tags |= {"mlflow.parentRunId": self._parent, "study": self._study}
            run = self._create(shorten(result.params) or folder.name, tags, result.started_at)
            ended = int(result.ended_at * 1000)
            figures = result.metrics | {f"phase_{phase}_s": value for phase, value in result.phases.items()}
            figures |= {f"start_{part}_s": value for part, value in result.start.items()}
            for metric, (low, high) in result.intervals.items():
                figures |= {f"{metric}_low": low, f"{metric}_high": high}
            defaults = {key: value for key, value in result.defaults.items() if value is not None}
            flags = defaults | {f"engine.args.{flag}": value for flag, value in result.args.items()}
            metrics = [Metric(key, value, ended, 0) for key, value in figures.items()]
            points = series.read(folder, result.started_at)
            metrics += [Metric(one.metric, one.value, int(one.time * 1000), one.second) for one in points]
            params = [Param(key, str(value)) for key, value in (flags | result.params).items()]
            self._client.log_batch(run, metrics, params, [RunTag("command", result.shell_command[:5000])])
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

        run = known_run(folder, self._uri)
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
        """Log a study's summary from `folder` on the parent run. Raises TrackingError."""
        if not self._parent or not (body := left_in(folder / summary.FILE)):
            return
        from mlflow.entities import Metric, RunTag

        best = Result.find(folder / body["best"]) if body["best"] else None
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
        if best and (run := known_run(folder / body["best"], self._uri)):
            try:
                with self._errors():
                    self._register(body["study"], best, run)
            except TrackingError as error:  # not every server has a registry
                log.info("the best configuration is not registered: %s", error)

    def _register(self, study: str, best: Result, run: str) -> None:
        """The best configuration as a version of the registered model `study`, under the alias `best`.

        A registered model is what MLflow finds by name (models:/<study>@best) and deploys; its versions keep what was
        best before, and the run that measured it.
        """
        from mlflow.exceptions import MlflowException

        name = study.replace("/", "-").replace(":", "-")
        about = f"vLLM's configuration that study {study} found best"
        try:
            self._client.create_registered_model(name, best.config, about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            known = self._client.get_registered_model(name)
            versions = [self._client.get_model_version(name, version) for version in known.aliases.values()]
            if any(version.run_id == run for version in versions):
                return
        self._client.log_text(run, best.shell_command + "\n", f"{CONFIGURATION}/command.txt")
        self._client.log_dict(run, best.args, f"{CONFIGURATION}/args.json")
        source, command = f"runs:/{run}/{CONFIGURATION}", best.shell_command
        tags = {"feasible": str(best.feasible).lower(), "estimated": str(best.estimated).lower(), **best.facts}
        version = self._client.create_model_version(
            name, source, run, tags=tags, description=command, await_creation_for=0
        )
        self._client.set_registered_model_alias(name, "best", version.version)

    def end(self, status: str) -> None:
        """End the parent run. Raises TrackingError."""
        if self._parent:
            with self._errors():
                self._client.set_terminated(self._parent, status)

    def _create(self, name: str, tags: dict[str, str], started: float) -> str:
        """The id of a new run."""
        own = {"mlflow.user": getpass.getuser(), "mlflow.source.name": "autotune", "mlflow.source.type": "LOCAL"}
        own |= {"mlflow.runName": name[:250]}
        texts = {key: str(value)[:5000] for key, value in (own | tags).items() if value}
        run = self._client.create_run(self._experiment, start_time=int(started * 1000), tags=texts)
        return str(run.info.run_id)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise TrackingError for whatever MLflow raises: what it stores in decides that, and each has its own."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            raise TrackingError(f"MLflow at {self._uri} refused: {_why(error)}") from None


def _why(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]  # SQLAlchemy's
    return str(redact((lines or [type(error).__name__])[0][:200]))


def _connected(config: TrackingConfig) -> tuple[Any, str]:
    """MLflow's client and the experiment's id; makes the database and the experiment when they are missing."""
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)  # each migration of a new database
    artifacts = None if _kind(config.uri) in ("http", "https") else Path("multirun/mlartifacts").resolve().as_uri()
    with _sole_maker(config.uri):
        try:
            client = MlflowClient(tracking_uri=config.uri)
            experiment = client.get_experiment_by_name(config.experiment)
        except Exception as error:
            if _kind(config.uri) != "sqlite" or any(words in str(error) for words in IN_ORDER):
                raise
            raise TrackingError(
                f"{_file(config.uri)} is half made, or another version of MLflow's ({_why(error)}): delete it, and "
                f"`autotune log` logs each of its studies again; or run `mlflow db upgrade {config.uri}`"
            ) from None
        if experiment:
            return client, str(experiment.experiment_id)
        return client, str(client.create_experiment(config.experiment, artifact_location=artifacts))


@contextmanager
def _sole_maker(uri: str) -> Iterator[None]:
    """A SQLite database is made whole, or not at all, and studies that start at the same moment take turns."""
    from mlflow import MlflowClient

    if _kind(uri) != "sqlite":
        yield
        return
    file = _file(uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (file.exists() and file.stat().st_size):
            with draft_of(file) as draft:  # a process that dies midway would leave what MLflow can't go on with
                MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments()
        yield
    finally:
        os.close(held)


def _file(uri: str) -> Path:
    return Path(urlsplit(uri).path.removeprefix("/"))


def trials_in(folder: Path) -> dict[Path, Result]:
    """The trials that ran in a study's `folder`, by their own, or the one that it is; canaries are none."""
    paths = [path.parent for path in (*folder.glob("result.json"), *sorted(folder.glob("*/result.json")))]
    found = {path: result_in(path) for path in paths if not path.name.startswith(CANARY)}
    return {path: result for path, result in found.items() if result and result.ran}


def known_run(folder: Path, uri: str) -> str | None:
    """The run that `folder` was logged as at `uri`, which hides its password; None also if its file is damaged."""
    run = left_in(folder / RUNS).get(uri)
    return run if isinstance(run, str) and run.isalnum() else None


def _remember(folder: Path, uri: str, run: str) -> None:
    write_whole(folder / RUNS, json.dumps(left_in(folder / RUNS) | {uri: run}))


def _tags(result: Result, folder: Path) -> dict[str, str]:
    """Tags of a trial's run."""
    return {
        "trial": folder.name,
        "state": result.state,
        "feasible": str(result.feasible).lower(),
        "verdict": result.verdict,
        "verdict_by": result.verdict_by,
        "bound": result.bound,
        "reason": result.reason or "; ".join(result.reasons),
        "estimated": str(result.estimated).lower(),
        "accuracy": result.accuracy,
        **result.config,
        **result.facts,
    }
