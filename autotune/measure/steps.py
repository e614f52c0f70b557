"""Steps of a real engine as they were recorded: what was in each, when it was scheduled, when its result came."""

import json
import logging
import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from autotune.config.redact import redact
from autotune.errors import InputError
from autotune.measure import series
from autotune.measure.backend import Recording
from autotune.text import first_line

log = logging.getLogger(__name__)

# Times in seconds of one process' clock: schedule() began and ended, update_from_output() of the step began and ended.
TIMES = ("t0", "t1", "t2", "t3")
# decodes: sequences that generate from one token; context: their tokens in the KV cache, summed; chunks: requests in
# prefill; attended: tokens that each prefilled token attends to, summed; running, waiting: requests after schedule().
COUNTS = ("decodes", "context", "chunks", "prefill_tokens", "attended", "running", "waiting")
COLUMNS = (*TIMES, *COUNTS)
NAME = series.STEPS
FEWEST = 3  # steps that a file may hold
MOST = 1e12  # of a count, and of a clock's seconds
FACTS = b"autotune"  # key of the file's metadata

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The steps of one server, in order; `table` has a row for each and COLUMNS."""

    name: str
    table: Floats
    args: Mapping[str, Any] = field(default_factory=dict)  # vLLM's flags, resolved
    model: Mapping[str, Any] | None = None  # its config.json; None: not recorded
    kv_tokens: int | None = None  # that the KV cache holds, from vLLM's log

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> Floats:
        return self.table[:, COLUMNS.index(name)]

    @property
    def tokens(self) -> Floats:
        return self.column("decodes") + self.column("prefill_tokens")

    def save(self, path: Path) -> None:
        """Write a parquet file, with what is known of the server in its metadata."""
        columns = [self.column(name) if name in TIMES else self.column(name).astype(np.int64) for name in COLUMNS]
        facts = {"args": self.args, "model": self.model, "kv_tokens": self.kv_tokens}
        schema = pa.table(columns, names=COLUMNS).replace_schema_metadata({FACTS: json.dumps(facts, default=str)})
        # Times are never the same: split into bytes they take two thirds.
        pq.write_table(schema, path, compression="zstd", use_dictionary=list(COUNTS), use_byte_stream_split=list(TIMES))


def keep(recording: Recording, args: Mapping[str, Any], model: Mapping[str, Any], folder: Path) -> str:
    """Save a trial's recorded steps, and log what is missing; returns what became of them, in words."""
    missing = recording.missing
    count = len(recording.rows)
    if count >= FEWEST:
        try:
            Steps("", recording.rows, redact(args), model, recording.kv_tokens).save(folder / NAME)
        except (OSError, ValueError, pa.ArrowException) as error:
            (folder / NAME).unlink(missing_ok=True)
            count, missing = 0, f"{type(error).__name__}: {error}"
    elif not missing:
        missing = f"the engine made {count} steps"
    if missing:
        missing = " ".join(missing.split())
        log.warning("%s %s: %s", folder / NAME, "ends early" if count >= FEWEST else "is missing", missing)
    return f"{count:,} steps" + (f" ({missing})" if missing else "")


def read_all(given: Iterable[str]) -> list[Steps]:
    """The steps in each FILE, or FILE:flag=value,… with vLLM's flags of that server; a folder stands for its trials'.

    Raises InputError if one holds no steps.
    """
    found = []
    for word in given:
        path, flags = _parsed(word)
        files = sorted(path.rglob(NAME)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: no {NAME} below it; give files of recorded steps, or their folder")
        shared = path if path.is_dir() else path.parent
        for file in files:
            name = str(file.parent.relative_to(shared)) if path.is_dir() else file.name.split(".")[0]
            name = path.name if name == "." else name
            steps = read(file, name)
            found.append(replace(steps, args={**steps.args, **flags}))
    return found


def read(file: Path, name: str) -> Steps:
    """The steps in `file`: parquet, or lines of COLUMNS (.csv, .csv.xz). Raises InputError."""
    try:
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            facts = json.loads((table.schema.metadata or {}).get(FACTS, b"{}"))
            if not isinstance(facts, dict) or not isinstance(facts.get("args", {}), dict):
                raise ValueError("its metadata are none of autotune's")
            rows = np.column_stack([table.column(name).to_numpy().astype(float) for name in COLUMNS])
        else:
            with lzma.open(file, "rt") if file.suffix == ".xz" else file.open() as lines:
                facts, rows = {}, np.loadtxt(lines, delimiter=",", ndmin=2)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; give recorded steps ({NAME}, .csv or .csv.xz), or a folder") from None
    except (OSError, EOFError, ValueError, KeyError, lzma.LZMAError, pa.ArrowException) as error:
        raise InputError(f"{file}: not a file of recorded steps ({first_line(error)})") from None
    if rows.shape[1] != len(COLUMNS) or len(rows) < FEWEST or not np.isfinite(rows).all():
        raise InputError(
            f"{file}: {len(rows)} steps with {rows.shape[1]} columns; {len(COLUMNS)} are needed, all numbers"
        )
    steps = Steps(name, rows, facts.get("args", {}), facts.get("model"), facts.get("kv_tokens"))
    times = rows[:, : len(TIMES)]
    in_order = (np.diff(times) >= 0).all() and (np.diff(times[:, 0]) >= 0).all()
    if not (in_order and (rows >= 0).all() and (rows <= MOST).all() and (steps.tokens >= 1).all()):
        raise InputError(
            f"{file}: steps back in time, without a token or with negative or endless counts; record again"
        )
    return steps


def hold_steps(word: str) -> bool:
    """True if `word` names a file of recorded steps, or a folder with some below it."""
    path = _parsed(word)[0]
    return any(path.rglob(NAME)) if path.is_dir() else path.suffix in (".parquet", ".csv", ".xz")


def _parsed(word: str) -> tuple[Path, dict[str, Any]]:
    """The path, and the flags that stand behind its last colon."""
    path, colon, written = word.rpartition(":")
    if not colon or "=" not in written:
        return Path(word), {}
    pairs = [pair.partition("=") for pair in written.split(",")]
    if bad := [name for name, equals, _ in pairs if not equals or not name]:
        raise InputError(f"{word}: {bad[0]!r} is no flag; write FILE:max_num_batched_tokens=512,max_num_seqs=256")
    return Path(path), {name.strip().replace("-", "_"): yaml.safe_load(value) for name, _, value in pairs}
