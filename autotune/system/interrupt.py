"""SIGINT, SIGTERM and SIGHUP unwind every `with`, so that no server stays behind.

The exception comes in the midst of whatever runs (a database's transaction), and is lost where Python ignores
exceptions (in a destructor or a callback). So code that must not be cut short runs within `deferred`, and code that
waits for long calls `check`, which raises the exception again.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []
_deferred = False


def install(hangup: bool = True) -> None:
    """Raise an exception for SIGINT and SIGTERM; with `hangup` for SIGHUP, too, unless nohup has it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sets SIGINT, too: a shell's background job starts with it ignored
        signal.signal(number, _handle)
    if hangup and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _handle)
    sys.unraisablehook = _unraisable


@contextmanager
def deferred() -> Iterator[None]:
    """Let the first signal wait for the next `check` or the end of the block; a second one raises at once."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    check()


def check() -> None:
    """Raise the first signal's exception again, if there was a signal."""
    if _received:
        _raise(_received[0])


def _handle(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    if not _deferred or len(_received) > 1:
        _raise(number)


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """Report an exception that Python ignores, unless it is a signal's, which `check` raises again."""
    if not (_received and lost.exc_type in (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(lost)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
