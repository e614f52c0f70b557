"""autotune's command line in this process: an error in a tenth of the time that a process of its own takes."""

import io
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from autotune.system import interrupt, leases


@dataclass(frozen=True)
class Done:
    """What `subprocess.run` says of a process."""

    returncode: int
    stdout: str
    stderr: str


def autotune(folder: Path, *arguments: str, **env: str) -> Done:
    """`python -m autotune …` as if it were started in `folder`, and as if its process ended."""
    main = import_module("autotune.__main__").main
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, as_it_was(), redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["autotune", *arguments])
        patch.setattr(leases, "FOLDER", folder / "leases")
        patch.setenv("HYDRA_FULL_ERROR", "1")  # as main sets it
        for name, value in env.items():
            patch.setenv(name, value)
        code = exit_code(main)
    return Done(code, out.getvalue(), err.getvalue())


def exit_code(main: Callable[[], None]) -> int:
    """What the interpreter makes of how `main` ends; its last words go to standard error."""
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    return 0


@contextmanager
def as_it_was() -> Iterator[None]:
    """Begins without handlers of logs, as a process does, and restores what a process of autotune's sets for itself."""
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for handler in handlers:
        root.removeHandler(handler)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            handler.close()
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
        interrupt._received.clear()
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
