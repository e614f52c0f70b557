"""A live table of a study that runs, in a terminal; elsewhere the log's plain lines are enough."""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autotune.results.study import Study
from autotune.text import rounded, shorten

EVERY_S = 0.5


class Display:
    """Trials that run with their phase, the best so far beside the baseline, the rate, the time that is left."""

    def __init__(self, n_trials: int) -> None:
        self._n_trials = n_trials
        self._began = self._shown = time.monotonic()
        self._ended_before: int | None = None
        self._live = Live(console=Console(), auto_refresh=False, transient=True) if sys.stdout.isatty() else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
            _log_to_stdout()  # the table's, so that lines scroll by above it
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            with suppress(OSError):  # the terminal is gone
                self._live.stop()
            _log_to_stdout()

    def show(self, running: Sequence[Any], study: Study, asked: int) -> None:
        """`running` as the sweep keeps them, what has ended; `asked` of n_trials are in flight or ended."""
        if not self._live or time.monotonic() - self._shown < EVERY_S:
            return
        self._shown = time.monotonic()
        with suppress(OSError):  # the terminal is gone, and the study goes on
            self._live.update(self._table(running, study, asked), refresh=True)

    def _table(self, running: Sequence[Any], study: Study, asked: int) -> Group:
        ended = asked - sum(one.pending.trial is not None for one in running)  # the baseline is none of n_trials
        if self._ended_before is None:
            self._ended_before = ended
        elapsed_s = time.monotonic() - self._began
        done = ended - self._ended_before
        left = f"{elapsed_s / done * (self._n_trials - ended) / 60:.0f} min left" if done > 0 else ""
        rate = f"{done / elapsed_s * 3600:.3g} trials/h" if done > 0 else ""
        metric, best, baseline = study.objective.metrics[0], study.best, study.baseline
        leader = f"best {metric} {rounded(study.results[best].values[0])} ({best})" if best else "nothing feasible yet"
        against = f", baseline {rounded(baseline.values[0])}" if baseline and baseline.complete else ""
        words = [f"{ended} of {self._n_trials}", rate, left, leader + against]
        table = Table(box=None)
        for heading in ("trial", "phase", "s", "node", "parameters"):
            table.add_column(heading, no_wrap=True)
        for one in running:
            age = f"{time.monotonic() - one.since:.0f}"
            table.add_row(one.pending.name, one.phase, age, one.job.node, shorten(one.pending.params))
        return Group(Text("  ".join(word for word in words if word)), table)


def _log_to_stdout() -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(sys.stdout)
