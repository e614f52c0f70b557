"""Files: written whole, as CSV, or as a copy of the log."""

import csv
import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autotune.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)

LOG, LOCK = "autotune.log", ".lock"  # in the folder of a trial or a study, before anything else

Row = TypeVar("Row", bound="DataclassInstance")


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file that takes the place of `path` when the block ends, so that readers see its old content or its new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def expanded(path: str) -> Path:
    """`path` with its ~ resolved; that of a user who does not exist stays."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises InputError, naming it."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise InputError(f"{path}: not JSON ({error}); it may be cut off: get or make it again") from None
    if not isinstance(body, dict):
        raise InputError(f"{path}: a JSON {type(body).__name__}, not an object; get or make it again")
    return body


def last_line(log: Path, otherwise: str) -> str:
    """The last line of a `log`, or `otherwise` if it is empty or missing."""
    return ((log.read_text(errors="replace") if log.exists() else "").strip().splitlines() or [otherwise])[-1]


def left_in(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; empty if there is none, or if it is broken, which the log says."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except InputError as error:
        log.warning("%s; left out", error)
        return {}


@contextmanager
def unless_refused(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block ends with an error, and nothing was done in it."""
    try:
        yield
    except Exception:
        left = list(folder.iterdir()) if folder.is_dir() else []
        if left and {path.name for path in left} <= {LOG, LOCK}:
            for path in left:
                path.unlink()
            folder.rmdir()
        raise


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` by way of `draft_of`, and wait for the disk; its folder is made if missing."""
    with draft_of(path) as draft, draft.open("w", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a crash can leave an empty file under the new name


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    """Write dataclasses of `kind` as CSV: a header with the fields' names, then a line for each."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([field.name for field in dataclasses.fields(kind)])
        table.writerows(dataclasses.astuple(row) for row in rows)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The dataclasses of `kind` in a file of `write_rows`; columns that it lacks, or has empty, have their defaults."""
    types: list[tuple[str, Any]] = [(field.name, field.type) for field in dataclasses.fields(kind)]
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return [kind(**{name: of(row[name]) for name, of in types if row.get(name)}) for row in rows]


@contextmanager
def log_to(path: Path, pattern: str = "%(message)s") -> Iterator[None]:
    """Copy everything that is logged within the block to `path`."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(pattern))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: the terminal has it, too
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
