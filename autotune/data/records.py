"""Records of a user's file, whatever form it has."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autotune.errors import InputError

Record = dict[str, Any]

CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}  # by a file's first bytes
FORMS = "write JSON, JSON lines, CSV, TSV or Parquet, as it is or as gz, zst or bz2"
LISTS = ("data", "records", "examples", "samples", "rows", "items")  # names of a file's one list
BLANK = re.compile(r"\s*")


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a file of any of FORMS; a request of OpenAI's batches is its `body`.

    Raises InputError, naming the file and the record.
    """
    body = _unpacked(path)
    if body.startswith(b"PAR1"):
        records: Iterator[Any] = _from_parquet(body, path)
    elif table := re.search(r"\.(csv|tsv)(\.\w+)?$", path.name.lower()):
        records = _from_csv(_text(body, path), path, "\t" if table[1] == "tsv" else ",")
    else:
        records = _from_json(_text(body, path), path)
    for record in records:
        request = record.get("body") if isinstance(record, dict) else None
        yield request if isinstance(request, dict) else record


def read_bytes(path: Path) -> bytes:
    """Bytes of a file. Raises InputError."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"dataset.path={path}: not a file; {FORMS}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"dataset.path={path}: {getattr(error, 'strerror', None) or error}") from None


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


def _unpacked(path: Path) -> bytes:
    body = read_bytes(path)
    codec = next((codec for first, codec in CODECS.items() if body.startswith(first)), None)
    if not codec:
        return body
    import pyarrow  # takes a while, as for Parquet, and few files need it

    try:
        unpacked: bytes = pyarrow.CompressedInputStream(pyarrow.BufferReader(body), codec).read()
        return unpacked
    except OSError as error:
        raise InputError(f"{path}: broken {codec} file ({error}); make it again") from None


def _text(body: bytes, path: Path) -> str:
    try:
        return body.decode(json.detect_encoding(body))
    except UnicodeDecodeError as error:
        line = body[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}, byte {error.start + 1}: not {error.encoding} text; {FORMS}") from None


def _from_json(text: str, path: Path) -> Iterator[Any]:
    """Values one after another, on lines of their own or not; a list is its items."""
    decoder, count, at = json.JSONDecoder(), 0, _skip_blank(text, 0)
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, record {count + 1}: not JSON ({error})") from None
        at = _skip_blank(text, end)
        if isinstance(value, dict) and count == 0 and at == len(text):
            value = next((value[name] for name in LISTS if isinstance(value.get(name), list)), value)
        for record in value if isinstance(value, list) else [value]:
            count += 1
            yield record


def _skip_blank(text: str, at: int) -> int:
    blank = BLANK.match(text, at)
    return blank.end() if blank else at


def _from_csv(text: str, path: Path, delimiter: str) -> Iterator[Record]:
    """Rows below a header; an empty cell is a missing field."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for number, row in enumerate(rows, 1):
            if None in row:
                raise InputError(f"{path}, record {number}: more cells than the header has names")
            yield {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not CSV ({error})") from None


def _from_parquet(body: bytes, path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(pyarrow.BufferReader(body)).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); make it again") from None
