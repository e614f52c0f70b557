"""SIGINT and SIGTERM unwind every `with`, so that no server stays behind.

The exception can be lost where Python ignores exceptions (a destructor, a callback), and comes amid whatever runs (a
database's transaction). So whoever waits for long calls `check`, which raises it again, and whoever must not be cut
anywhere else is `held`.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []
_held = False


def install() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _handle)


@contextmanager
def held() -> Iterator[None]:
    """The first signal raises nothing until the next `check`, or the end of this; a second one does so at once."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False
    check()


def check() -> None:
    """Raise what the first signal raised, if there was one."""
    if _received:
        _raise(_received[0])


def _handle(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    if not _held or len(_received) > 1:
        _raise(number)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
