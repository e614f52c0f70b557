"""Records of a user's file, whatever form it has."""

import csv
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from autotune.errors import InputError
from autotune.text import first_line

Record = dict[str, Any]

CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}  # by a file's first bytes
FORMS = "write JSON, JSON lines, CSV, TSV or Parquet, as it is or as gz, zst or bz2"
LISTS = ("data", "records", "examples", "samples", "rows", "items")  # names of a file's one list
TIME = "at_s"  # the field with the time of a request, s
MOST = 1e15  # of a number: seconds or milliseconds of some thousand years
BLANK = re.compile(r"\s*")
WHOLE = re.compile(r"\s*([0-9]{1,12})(\.0*)?\s*")


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a file of any of FORMS, as they are read; a request of OpenAI's batches is its `body`.

    Its time, TIME, may stand beside the body. Raises InputError, naming the file and the record.
    """
    for record in _records(path):
        request = record.get("body") if isinstance(record, dict) else None
        if isinstance(request, dict):
            yield {TIME: record[TIME], **request} if TIME in record else request
        else:
            yield record


def _records(path: Path) -> Iterator[Any]:
    codec, head = _checked(path)
    if head == b"PAR1":
        yield from _from_parquet(path, codec)
        return
    table = re.search(r"\.(csv|tsv)(\.\w+)?$", path.name.lower())
    try:
        with _opened(path, codec) as file, io.TextIOWrapper(file, json.detect_encoding(head), newline="") as lines:
            yield from _from_csv(lines, path, "\t" if table[1] == "tsv" else ",") if table else _from_json(lines, path)
    except UnicodeDecodeError:
        with _opened(path, codec) as file:
            raise _not_text(file.read(), json.detect_encoding(head), path) from None
    except OSError as error:
        raise _broken(path, codec, error) from None


def digest(path: Path) -> bytes:
    """A hash of the file at `path`. Raises InputError."""
    with _given(path) as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _given(path: Path) -> Iterator[io.BufferedReader]:
    """The user's file, to be read as it is. Raises InputError."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"dataset.path={path}: not a file; {FORMS}")
        with path.open("rb") as file:
            yield file
    except (OSError, ValueError) as error:
        raise InputError(f"dataset.path={path}: {getattr(error, 'strerror', None) or error}") from None


def _checked(path: Path) -> tuple[str | None, bytes]:
    """The way in which the file is packed, None if it is not, and the first bytes of its content. Raises InputError."""
    with _given(path) as file:
        head = file.read(4)
    codec = next((codec for first, codec in CODECS.items() if head.startswith(first)), None)
    if codec:
        try:
            with _opened(path, codec) as file:
                head = file.read(4)
        except (OSError, ValueError) as error:
            raise _broken(path, codec, error) from None
    return codec, head


def _opened(path: Path, codec: str | None) -> BinaryIO:
    if codec is None:
        return path.open("rb")
    import pyarrow  # takes a while, as for Parquet, and few files need it

    unpacked: BinaryIO = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)
    return unpacked


def _broken(path: Path, codec: str | None, error: Exception) -> InputError:
    return InputError(f"{path}: broken {codec or 'text'} file ({error}); make it again")


def _not_text(body: bytes, encoding: str, path: Path) -> InputError:
    """The error that says where `body` is no text."""
    try:
        body.decode(encoding)
    except UnicodeDecodeError as error:
        line = body[: error.start].count(b"\n") + 1
        return InputError(f"{path}, line {line}, byte {error.start + 1}: not {error.encoding} text; {FORMS}")
    return InputError(f"{path}: changed while it was read")


def text_field(record: Record, name: str, where: str) -> str | None:
    """The text in the field `name`; None if it is missing or null. Raises InputError if it is no text."""
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: `{name}` must be a text, and is {type(value).__name__}")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: `{name}`, character {error.start + 1}: half of a surrogate pair, no text") from None
    return value


def number_field(record: Record, name: str, where: str) -> float | None:
    """The number in the field `name`; None if it is missing. Raises InputError if it is none, or beyond MOST."""
    written = record.get(name)
    if written is None:
        return None
    try:
        number = math.nan if isinstance(written, bool) else float(written)
    except (ValueError, TypeError, OverflowError):
        number = math.nan
    if not abs(number) <= MOST:
        raise InputError(f"{where}: `{name}` must be a number, and is {str(written)[:40]!r}")
    return number


def count_field(record: Record, name: str, where: str, least: int = 0) -> int:
    """The whole number in the field `name`; a table's may be texts, or floats. Raises InputError if it is none."""
    written = record.get(name)
    if type(written) is int and least <= written < 10**12:
        return written
    if written is None:
        raise InputError(f"{where}: no `{name}`")
    found = None if isinstance(written, bool) else WHOLE.fullmatch(str(written))
    if not found or int(found[1]) < least:
        raise InputError(f"{where}: `{name}` must be a whole number from {least}, and is {str(written)[:40]!r}")
    return int(found[1])


def _from_json(lines: Iterator[str], path: Path) -> Iterator[Any]:
    """Values one after another, on lines of their own or not; a list is its items."""
    values, count = _values(lines), 0
    try:
        for value in values:
            if count == 0 and isinstance(value, dict) and any(isinstance(value.get(name), list) for name in LISTS):
                following = list(values)  # if nothing follows, the file is this list
                value = (
                    [value, *following]
                    if following
                    else next(value[name] for name in LISTS if isinstance(value.get(name), list))
                )
            elif value == []:
                value = [value]
            for record in value if isinstance(value, list) else [value]:
                count += 1
                if record in (None, []):
                    raise InputError(f"{path}, record {count}: {json.dumps(record)} instead of an object; leave it out")
                yield record
    except NotJsonError as error:
        raise InputError(f"{path}, record {count + 1}: not JSON ({error})") from None


class NotJsonError(Exception):
    """Text that is no JSON."""


def _values(lines: Iterator[str]) -> Iterator[Any]:
    """Yield JSON values that stand one after another, as soon as their line is read if it has the whole of them."""
    decoder = json.JSONDecoder()
    for line in lines:
        text, at, whole = line, _skip_blank(line, 0), False
        while at < len(text):
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if whole:
                    raise NotJsonError(error) from None
                text, at, whole = text[at:] + "".join(lines), 0, True  # a value that goes on in the next line
                continue
            yield value
            at = _skip_blank(text, end)


def _skip_blank(text: str, at: int) -> int:
    blank = BLANK.match(text, at)
    return blank.end() if blank else at


def _from_csv(lines: Iterator[str], path: Path, delimiter: str) -> Iterator[Record]:
    """Rows below a header; an empty cell is a missing field."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        names = rows.fieldnames or ()
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise InputError(f"{path}, line 1: two columns are called {twice[0]!r}; leave one out")
        for number, row in enumerate(rows, 1):
            if None in row:
                raise InputError(f"{path}, record {number}: more cells than the header has names")
            yield {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not CSV ({error})") from None


def _from_parquet(path: Path, codec: str | None) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with _opened(path, codec) as file:
            body = pyarrow.BufferReader(file.read()) if codec else str(path)
            for batch in parquet.ParquetFile(body).iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)}); make it again") from None
