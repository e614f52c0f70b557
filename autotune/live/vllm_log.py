"""vLLM's own log: the seconds of a start by part, and the reason why one failed."""

import re
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from autotune.system.files import last_line

# The words in the first line after each part of a start; vLLM 0.26 to 0.32.
ENDS = {
    "import": "",  # the API server's first line
    "engine": "Initializing a V1 LLM engine",  # in a process of its own, which imports vLLM again
    "weights": "Model loading took",
    "compile": "torch.compile took",
    "profile": "KV cache size",
    "graphs": "Graph capturing finished",
    "warmup": "init engine (",
}
LAST = "serve"  # from the last of these lines until the server is healthy
# (APIServer pid=1) INFO 11-24 08:20:25 [core.py:1] …
STAMPED = re.compile(r"^\(\S+ pid=\d+\) [A-Z]+ (\d\d-\d\d \d\d:\d\d:\d\d) \[[^]]+\](.*)")


def parts(log: Path, ready: datetime, start_s: float) -> dict[str, float]:
    """Seconds by part of a start that took `start_s` and ended at `ready`, to about a second, as vLLM's log has them.

    A part that has no line in the log (graphs with enforce_eager) is counted in the part after it.
    """
    lines = map(STAMPED.match, log.read_text(errors="replace").splitlines())
    stamped = [line.groups() for line in lines if line]
    ends = [(LAST, ready)]
    for part, words in reversed(ENDS.items()):
        before = [stamp for stamp, text in stamped if words in text and moment(stamp, ready) <= ends[0][1]]
        if before:
            ends.insert(0, (part, moment(before[0], ready)))
    later = {part: (end - begun).total_seconds() for (_, begun), (part, end) in pairwise(ends)}
    return {ends[0][0]: start_s - sum(later.values()), **later}


def moment(stamp: str, near: datetime) -> datetime:
    """The time of a line, whose `stamp` lacks the year: that of `near`."""
    return datetime.strptime(f"{near.year}-{stamp}", "%Y-%m-%d %H:%M:%S")


KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")


def kv_tokens(log: Path) -> int | None:
    """Tokens that the KV cache of an engine holds, as it said when it started; None if it did not."""
    found = KV_TOKENS.search(log.read_text(errors="replace"))
    return int(found[1].replace(",", "")) if found else None


# (EngineCore pid=1) ERROR 11-24 08:20:25 [core.py:1] …
PREFIX = re.compile(r"^\([\w-]+ pid=\d+\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^]]+\] ?)?")
ERROR_LINE = re.compile(r"(?:^|\s|\.)(\w*(?:Error|Exception|error)): (.+)$")
# Errors that only follow from another.
ECHOES = ("initialization failed", "cancelled", "EngineDeadError")


def reason(log: Path) -> str:
    """The root cause in vLLM's log, in one line: the last error that is not the echo of another."""
    lines = [PREFIX.sub("", line.rstrip()) for line in log.read_text(errors="replace").splitlines()]
    for number in range(len(lines) - 1, -1, -1):
        match = ERROR_LINE.search(lines[number])
        if not match or any(echo in lines[number] for echo in ECHOES):
            continue
        kind, text = match.groups()
        if kind == "ValidationError" and number + 2 < len(lines):  # pydantic's message is on the next lines
            text = lines[number + 1].strip() + " " + lines[number + 2].strip()
            text = re.sub(r"\s*\[type=.*", "", text).strip()
        return f"{kind}: {text}"[:240]
    return f"no error in {log}; its last line: {last_line(log, '(empty)')}"
