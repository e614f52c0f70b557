"""Text for people to read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def one_line(error: object) -> str:
    """An exception's message on one line, without what Hydra adds for its developers, or wrongly advises."""
    cause = str(error.__cause__ or "") if isinstance(error, BaseException) else ""
    text = str(error).split("Config search path:")[0]
    text += f"\n{cause}" if cause != "None" and cause not in text else ""
    text = text.removeprefix("InputError raised while resolving interpolation: ")
    noise = ["full_key:", "object_type=", "reference_type=", "Set the environment variable", "LexerNoViable"]
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(tuple(noise))]
    return "; ".join(kept).replace(":; ", ": ").replace("'.; ", "': ").replace("'; '", "', '")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def count(number: int, word: str) -> str:
    """`1 trial`, `21 trials`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def rounded(value: Any) -> str:
    """A number with four significant digits, or all before its point; anything else as it is, None as nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def by_kind(reasons: Iterable[str]) -> list[list[int]]:
    """Places of `reasons` that differ in nothing but digits, the most frequent kind first."""
    kinds: dict[str, list[int]] = {}
    for at, reason in enumerate(reasons):
        kinds.setdefault(re.sub(r"\d", "", reason), []).append(at)
    return sorted(kinds.values(), key=len, reverse=True)


def mostly(reasons: Sequence[str]) -> str:
    """The most frequent kind of `reasons` by its first one, and how often it occurs: `too large (98 of 100)`."""
    places = by_kind(reasons)[0]
    return reasons[places[0]] + (f" ({len(places)} of {len(reasons)})" if len(places) < len(reasons) else "")


def aligned(rows: Sequence[Sequence[str]], left: bool = False) -> list[str]:
    """Rows of a table, each cell as wide as its column; a row without cells is a blank line."""
    full = [row for row in rows if row]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=False)
        lines.append("  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width in cells).rstrip())
    return lines


def shorten(params: Mapping[str, Any]) -> str:
    """A trial's parameters in short: `max_num_seqs=64 block_size=32`."""
    return " ".join(f"{name.removeprefix('engine.args.')}={_short(value)}" for name, value in params.items())


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
