"""Where a study's trials are kept, and that one process at a time works on them."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from autotune.errors import InputError
from autotune.redact import redact

JOURNAL = "journal://"


def make(url: str) -> Any:
    """Optuna's storage for `url`: one of SQLAlchemy's, or journal://<file> for a journal file."""
    if url.startswith(JOURNAL):
        path = Path(url.removeprefix(JOURNAL))
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    try:
        return optuna.storages.get_storage(url)
    except (ImportError, ModuleNotFoundError) as error:
        raise InputError(f"hydra.sweeper.storage={redact(url)}: {error}; install that database's driver") from None
    except SQLAlchemyError as error:
        raise InputError(f"hydra.sweeper.storage: {str(error).splitlines()[0]}") from None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """`folder`'s study for this process alone; the kernel frees it however the process ends. Raises InputError."""
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{folder}: another process works on this study ({file.read().strip()}); "
                f"wait for it, end it, or write another study=…"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
