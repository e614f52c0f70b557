"""Words for people."""

from collections.abc import Mapping, Sequence
from typing import Any


def one_line(error: object) -> str:
    """An exception's message on one line, without what Hydra adds for its own developers."""
    cause = error.__cause__ if isinstance(error, BaseException) else None
    text = str(error).split("Config search path:")[0] + (f"\n{cause}" if cause else "")
    noise = ("full_key:", "object_type=", "reference_type=", "Set the environment variable")
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(noise)]
    return "; ".join(kept).replace(":; ", ": ").replace("'; '", "', '")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, each cell as wide as its column."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def shorten(params: Mapping[str, Any]) -> str:
    """`max_num_seqs=64 block_size=32`: what a trial changed, without prefixes."""
    return " ".join(f"{name.removeprefix('engine.args.')}={_short(value)}" for name, value in params.items())


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
