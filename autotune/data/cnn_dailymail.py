"""MLPerf's data set for llama3.1-8b: the validation split of CNN/DailyMail 3.0.0, from the Hugging Face Hub."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
from huggingface_hub import dataset_info, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from pyarrow import parquet
from tokenizers import Tokenizer

from autotune.errors import InputError
from autotune.system.files import expanded
from autotune.text import first_line

log = logging.getLogger(__name__)

REPOSITORY, SHARDS = "abisee/cnn_dailymail", "3.0.0/validation-*.parquet"

# From mlcommons/inference, language/llama3.1-8b/download_cnndm.py, which computes a maximum length but cuts no prompt.
TEMPLATE = (
    "Summarize the following news article in 128 tokens. Please output the summary only, without any other text."
    "\n\nArticle:\n{input}\n\nSummary:"
)


def records(tokenizer: Tokenizer, folder: str, revision: str | None, expected: int) -> Iterator[dict[str, Any]]:
    """Yield MLPerf's `expected` records in their order, their prompts as token ids of `tokenizer`.

    They are kept in `folder` as `cnn_eval-<hash of the tokenizer>.json`, with its sha256 in a file beside it, and made
    again if the two disagree. Raises InputError.
    """
    home = expanded(folder)
    path = home / f"cnn_eval-{hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]}.json"
    if not _is_intact(path):
        _write(path, tokenizer, _shards(home / "cnn_dailymail", revision), expected)
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("{"):  # each record is one line, and so is each of the list's brackets
                yield json.loads(line.rstrip(",\n"))


def _checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256_line(path: Path) -> str:
    """The line that `sha256sum` prints for `path` in its folder."""
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"


def _is_intact(path: Path) -> bool:
    if not (path.exists() and _checksum(path).exists()):
        return False
    intact = _checksum(path).read_text() == _sha256_line(path)
    if not intact:
        log.warning("%s is not what its sha256 says; making it again", path)
    return intact


def _shards(local: Path, revision: str | None) -> list[Path]:
    """Locate the Parquet files in `local` or in the Hub's cache, else download them; a broken download resumes."""
    if shards := sorted(local.glob(SHARDS)):
        return shards
    with suppress(LocalEntryNotFoundError):
        if shards := _snapshot(revision, local_files_only=True):
            return shards
    try:
        dataset_info(REPOSITORY, revision=revision, timeout=15)  # fails at once; the download retries for a minute
        return _snapshot(revision, local_files_only=False)
    except Exception as error:  # its class depends on the HTTP library, which differs between versions
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"dataset=cnn_dailymail: no download from the Hub ({type(error).__name__}: {reason}); go online once, "
            f"or put {SHARDS} of {REPOSITORY} into {local}/3.0.0, "
            f"or give MLPerf's own file: dataset.path=<cnn_eval.json>"
        ) from None


def _snapshot(revision: str | None, local_files_only: bool) -> list[Path]:
    folder = snapshot_download(
        REPOSITORY, repo_type="dataset", revision=revision, allow_patterns=SHARDS, local_files_only=local_files_only
    )
    return sorted(Path(folder).glob(SHARDS))


def _write(path: Path, tokenizer: Tokenizer, shards: list[Path], expected: int) -> None:
    """Write the JSON list and its checksum, both whole or not at all; only a batch of articles is in memory."""
    log.info("making %s, once for this tokenizer", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        count = 0
        with draft.open("w", encoding="utf-8") as file:
            for record in _from_parquet(tokenizer, shards):
                file.write(("[\n" if count == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
                count += 1
            file.write("\n]\n")
        if count != expected:
            where = ", ".join(map(str, shards)) or "the Hub's snapshot"
            raise InputError(
                f"dataset=cnn_dailymail: {count} records in {where}, not {expected}; "
                f"delete it to download it again, or set dataset.records.expected"
            )
        _checksum(draft).write_text(_sha256_line(draft))
        draft.rename(path)
        _checksum(draft).rename(_checksum(path))


def _from_parquet(tokenizer: Tokenizer, shards: list[Path]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        try:
            batches = parquet.ParquetFile(shard).iter_batches(batch_size=256, columns=["article", "highlights"])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                for column in ("article", "highlights"):
                    if not row.get(column):
                        raise InputError(f"{shard}, record {number}: no `{column}`; download the file again")
                yield {
                    "instruction": {"llama": TEMPLATE},
                    "input": row["article"],
                    "tok_input": tokenizer.encode(TEMPLATE.replace("{input}", row["article"])).ids,
                    "output": row["highlights"],
                }
        except pyarrow.ArrowException as error:
            raise InputError(f"{shard}: not a readable Parquet file ({error}); download it again") from None
