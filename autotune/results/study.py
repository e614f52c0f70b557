"""A study that has run, as its folder has it: the configuration of each trial, and what it measured."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from autotune.config.overrides import read
from autotune.config.schema import Config, ObjectiveConfig
from autotune.errors import InputError
from autotune.measure.result import Result

MULTIRUN = Path("multirun")
BASELINE = "baseline"


@dataclass(frozen=True)
class FinishedStudy:
    folder: Path
    results: dict[str, Result]  # by the trial's folder, the baseline first; whatever has no result is left out

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def baseline(self) -> Result | None:
        return self.results.get(BASELINE)

    @cached_property
    def base(self) -> Config:
        """What its trials share: the baseline's configuration, or another's. Raises InputError."""
        left = [name for name in self.results if self._config_of(name).exists()]
        return self.config((left or list(self.results))[0])

    @cached_property
    def objective(self) -> ObjectiveConfig:
        return self.base.objective

    def config(self, trial: str, overrides: Sequence[str] = ()) -> Config:
        """What `trial` ran with, secrets hidden, changed by `overrides` (backend.env.HF_TOKEN=…). Raises InputError."""
        return read(self._config_of(trial), overrides)

    def _config_of(self, trial: str) -> Path:
        return (self.folder if trial == self.name else self.folder / trial) / "config.yaml"

    @property
    def ranked(self) -> list[str]:
        """The feasible trials but the baseline, the best in the first objective first; equal ones once."""
        return self.ranked_by(0)

    def ranked_by(self, metric: int) -> list[str]:
        """The same by the metric with this index among the objective's."""
        sign = -1 if self.objective.directions[metric] == "maximize" else 1
        feasible = [name for name, result in self.results.items() if result.feasible and name != BASELINE]
        found: list[str] = []
        for name in sorted(feasible, key=lambda name: sign * self.results[name].values[metric]):
            if all(self.results[name].params != self.results[other].params for other in found):
                found.append(name)
        return found

    @cached_property
    def front(self) -> list[str]:
        """Those of `ranked` that no other beats in every objective."""
        signs = [1 if direction == "maximize" else -1 for direction in self.objective.directions]

        def better(one: str, other: str) -> bool:
            pairs = zip(signs, self.results[one].values, self.results[other].values, strict=True)
            gains = [sign * (mine - theirs) for sign, mine, theirs in pairs]
            return min(gains) >= 0 and max(gains) > 0

        return [name for name in self.ranked if not any(better(other, name) for other in self.ranked)]

    def chosen(self, trial: str | None) -> str:
        """`trial`, or the best one. Raises InputError if there is no such trial, or no best one."""
        if trial is not None:
            if trial not in self.results:
                raise InputError(f"trial={trial}: {self.name} has no such trial; it has {', '.join(self.results)}")
            if not self.results[trial].complete:
                raise InputError(f"trial={trial}: it failed ({self.results[trial].reason}); choose another")
            return trial
        if not self.ranked:
            raise InputError(f"study={self.name}: no trial is feasible; name one: trial=baseline, trial=trial-3, …")
        if len(self.front) > 1 and len(self.objective.metrics) > 1:
            raise InputError(f"study={self.name} has a Pareto front; choose from it: trial={' | '.join(self.front)}")
        return self.ranked[0]


def load(name: str, key: str = "study") -> FinishedStudy:
    """The study of this name below multirun/, or in the folder of this path; a single trial is one, too.

    Raises InputError, which says `key`, if there is none, or nothing has ended in it.
    """
    folder = MULTIRUN / name if (MULTIRUN / name).is_dir() else Path(name)
    if not folder.is_dir():
        known = sorted(path.name for path in MULTIRUN.glob("*") if any(path.glob("*/result.json")))
        close = difflib.get_close_matches(name, known, n=3) or known[-3:]
        hint = f"; there {'is' if len(close) == 1 else 'are'} {', '.join(close)}" if close else ""
        raise InputError(f"{key}={name}: no such folder below {MULTIRUN}/{hint}")
    paths = sorted(folder.glob("*/result.json"), key=lambda path: _place(path.parent.name))
    results = {path.parent.name: Result.load(path.parent) for path in paths}
    results = {trial: result for trial, result in results.items() if _place(trial)[0] < 2}
    if single := Result.find(folder):
        results = {folder.resolve().name: single}
    if not results:
        raise InputError(f"{key}={name}: no trial has ended in {folder}")
    return FinishedStudy(folder, results)


def _place(trial: str) -> tuple[int, int]:
    """Order among a study's folders: the baseline, trials by number, others (canaries)."""
    number = re.fullmatch(r"trial-(\d+)", trial)
    return (0, 0) if trial == BASELINE else (1, int(number[1])) if number else (2, 0)
