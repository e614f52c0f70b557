"""Optuna's storage of a study, open to one process at a time."""

import fcntl
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from autotune.config.redact import redact
from autotune.errors import InputError
from autotune.search.optuna_private import SingleWriterStorage
from autotune.text import one_line

KEPT = "what was measured is kept, and the same command continues the study"
LOCKED_S = 60.0  # for which SQLite waits for another process that holds its file
JOURNAL = "journal://"
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}  # the extras' ones, for a URL that names none
DELETED = "; a broken file can be deleted: the study goes on from its results"
# One row with true for whoever gets the lock; the server frees it with the connection.
LOCKS = {"postgresql": "SELECT pg_try_advisory_lock(:number)", "mysql": "SELECT GET_LOCK(:name, 0)"}


@contextmanager
def opened(url: str, study: str) -> Iterator[Any]:
    """Optuna's storage at `url` (SQLAlchemy's, or journal://<file>), with `study` in it for this process alone.

    Raises InputError.
    """
    with _errors(url, f"; {KEPT}"), ExitStack() as held:
        if url.startswith(JOURNAL):
            path = Path(url.removeprefix(JOURNAL))
            held.enter_context(_lock_beside(path, study, url))
            try:
                journal = optuna.storages.JournalStorage(Journal(path))
            except (ValueError, LookupError, TypeError, AssertionError) as error:
                raise InputError(
                    f"hydra.sweeper.storage={url}: not a journal of Optuna's ({error!r}){DELETED}"
                ) from None
            yield journal
        else:
            with _errors(url, DELETED * url.startswith("sqlite")):
                database = _database(url, study, held)
            yield database


class Journal(JournalFileBackend):
    """Optuna's journal; a line that a full disk or a crash cut off is removed before another would be glued to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._path.open("rb+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        super().append_logs(logs)


def _database(url: str, study: str, held: ExitStack) -> SingleWriterStorage:
    at = _with_driver(url)
    kind = at.get_backend_name()
    engine: dict[str, Any] = {"pool_pre_ping": True}
    if kind in LOCKS:
        held.enter_context(_lock_on_server(at, kind, study))
    elif kind == "sqlite":
        engine = {"connect_args": {"timeout": LOCKED_S}}
        if at.database:
            held.enter_context(_lock_beside(Path(at.database), study, url))
    try:
        backend = RDBStorage(at.render_as_string(hide_password=False), engine)
    except RuntimeError as error:  # the tables of another version of Optuna
        raise InputError(f"hydra.sweeper.storage={redact(url)}: {one_line(error)}") from None
    held.callback(backend.engine.dispose)
    return SingleWriterStorage(backend)


def _with_driver(url: str) -> sqlalchemy.URL:
    try:
        at = sqlalchemy.make_url(url)
        at.get_dialect()  # postgres:// has none
    except (ValueError, sqlalchemy.exc.ArgumentError):  # which may quote a part of the password
        where = f"hydra.sweeper.storage={redact(url)}"
        raise InputError(
            f"{where}: not a URL; write sqlite:///<file>, journal://<file> or "
            "postgresql://<user>:<password>@<host>/<name>; write %2F, %3A and %40 for a password's /, : and @"
        ) from None
    return at.set(drivername=f"{at.drivername}+{DRIVERS[at.drivername]}") if at.drivername in DRIVERS else at


@contextmanager
def _errors(url: str, more: str = "") -> Iterator[None]:
    where = f"hydra.sweeper.storage={redact(url)}"
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{where}: {error}; install that database's driver "
            f"(for PostgreSQL and MySQL: uv pip install -e '.[databases]')"
        ) from None
    except (SQLAlchemyError, StorageInternalError) as error:
        why = error.__cause__ if isinstance(error, StorageInternalError) else error
        why = getattr(why, "orig", None) or why  # without the SQL
        raise InputError(f"{where}: {redact(one_line(why or error))}{more}") from None


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise InputError for what a disk does amid the study in `folder`: it is full, read-only, or gone."""
    try:
        yield
    except OSError as error:
        kept = KEPT if folder.is_dir() else "write another study=… or hydra.sweep.dir=…"
        raise InputError(f"{error.filename or folder}: {error.strerror or error}; {kept}") from None


@contextmanager
def _lock_on_server(url: sqlalchemy.URL, kind: str, study: str) -> Iterator[None]:
    digest = hashlib.sha256(f"{url.database}\0{study}".encode())
    names = {"name": digest.hexdigest()[:32], "number": int.from_bytes(digest.digest()[:8], signed=True)}
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")  # else it would idle in a transaction
    try:
        with engine.connect() as connection:
            if kind == "mysql":  # which ends idle connections after eight hours
                connection.execute(sqlalchemy.text("SET SESSION wait_timeout = 31536000"))
            if not connection.execute(sqlalchemy.text(LOCKS[kind]), names).scalar():
                where = f"hydra.sweeper.storage={redact(url.render_as_string())}"
                raise InputError(f"{where}: another process works on study={study} in it; wait for it, or end it")
            yield
    finally:
        engine.dispose()


def _lock_beside(path: Path, study: str, url: str) -> AbstractContextManager[None]:
    name = hashlib.sha256(study.encode()).hexdigest()[:12]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}-{name}.lock")
        file.touch()
        if path.is_dir():
            raise ValueError("a folder")
    except (OSError, ValueError) as error:  # also a path without a name
        why = getattr(error, "strerror", None) or error
        raise InputError(f"hydra.sweeper.storage={url}: no file can be made there ({why}); write another one") from None
    return lock(file, f"study={study} in {path}")


@contextmanager
def lock(file: Path, what: str) -> Iterator[None]:
    """`what` for this process alone; the kernel frees it however the process ends. Raises InputError."""
    with file.open("a+") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            raise InputError(
                f"{what}: another process works on this study ({held.read().strip()}); "
                f"wait for it, end it, or write another study=…"
            ) from None
        held.truncate(0)
        held.write(f"process {os.getpid()} on {platform.node()}")
        held.flush()
        yield
