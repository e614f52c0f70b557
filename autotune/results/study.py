"""A study, read from its folder: the result of each trial, the best of them, what it gains."""

import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from autotune.config.overrides import read, with_fields
from autotune.config.schema import DEFAULTS, Config, ObjectiveConfig, baselines
from autotune.config.schema import RECIPE as RECIPE
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure import objective
from autotune.measure.result import Result, State

log = logging.getLogger(__name__)

MULTIRUN = Path("multirun")
BASELINE = "baseline"
REFERENCES = {BASELINE: "vLLM's defaults", RECIPE: "the recipe"}  # what trials are compared with, in words
TRIAL = "trial-"  # then its number, in Optuna's study too
MOST_LOST = 1000  # trials without a result, beside nine for each with one: what draws them counts up to the last
CANARY = "canary-"  # then the node's name
FRESH = "fresh-"  # then the name of a trial on a shared server, which this one measured again on a server of its own
ON_SHARED = "on_shared_server"  # fact of a trial that was measured again: its values on the shared server
VERIFY = "verify"  # folder of the repeats of `autotune verify`
TIE = 0.005  # share of a reference's value by which a trial has to be better: less is noise, and nothing to deploy for
FINALISTS = 3  # trials on a shared server that are measured again, at most
SPACE = "space.json"  # in a study's folder: Optuna's distribution of each parameter, by configuration key
TWIN = "twin.json"  # there: what recorded steps say of the baseline and the best trial (search/account.py)


@dataclass(frozen=True)
class Study:
    """The trials of a study that have ended."""

    folder: Path
    config: Config  # what its trials share
    results: dict[str, Result]  # by the trial's folder: REFERENCES, then trials by number
    canaries: dict[str, Result] = field(default_factory=dict)  # short baselines, by node

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def objective(self) -> ObjectiveConfig:
        return self.config.objective

    @property
    def baseline(self) -> Result | None:
        """vLLM's defaults, whether they completed or not."""
        return self.results.get(BASELINE)

    @property
    def references(self) -> list[str]:
        """Names of REFERENCES that are feasible."""
        return [name for name in REFERENCES if name in self.results and self.results[name].feasible]

    @cached_property
    def swept(self) -> dict[str, Result]:
        """The trials whose parameters a sampler chose, without those that were interrupted."""
        ended = {name: one for name, one in self.results.items() if one.state is not State.interrupted}
        return {name: one for name, one in ended.items() if name not in REFERENCES}

    @property
    def counts(self) -> Counter[State]:
        """Number of those of `swept` that ended in each state, without those that were looked up."""
        return Counter(result.state for result in self.swept.values() if not result.duplicate_of)

    @cached_property
    def complete(self) -> dict[str, Result]:
        return {name: result for name, result in self.results.items() if result.complete}

    @cached_property
    def ranked(self) -> list[str]:
        """The feasible trials but REFERENCES, the best in the first objective first; equal parameters once.

        Once FINALISTS were measured again, those that have only shared a server come last.
        """
        return self.ranked_by(0)

    def ranked_by(self, metric: int) -> list[str]:
        """The same by the metric with this index among the objective's."""
        # A trial that repeats another keeps what a shared server told, whatever the other one shows on its own.
        feasible = [name for name, one in self.swept.items() if one.feasible and one.duplicate_of not in self.swept]
        sign = objective.sign(self.objective, metric)
        again = sum(ON_SHARED in one.facts for one in self.results.values())
        last = {name for name in feasible if again >= FINALISTS and self.results[name].shared_server}
        ordered = sorted(feasible, key=lambda name: (name in last, -sign * self.results[name].values[metric]))
        unique: dict[str, str] = {}
        for name in ordered:
            unique.setdefault(json.dumps(self.results[name].params, sort_keys=True), name)
        return list(unique.values())

    @property
    def best(self) -> str | None:
        """The best feasible trial but the baseline; of several objectives, the best in the first."""
        return self.ranked[0] if self.ranked else None

    @property
    def served(self) -> str | None:
        """The configuration to serve: the best trial, or what none of them beats; None if none is feasible."""
        return self._highest([*self.references, *self.ranked[:1]])

    def _highest(self, names: Iterable[str]) -> str | None:
        """The best of these; one of REFERENCES unless another is better by more than TIE."""

        def worth(name: str) -> float:
            value = self.results[name].values[0]
            return objective.sign(self.objective) * value + (TIE * abs(value) if name in REFERENCES else 0.0)

        return max(names, key=worth, default=None)

    def uncertified(self) -> str | None:
        """The trial to be measured on a server of its own: what has the best value, if it shared one."""
        highest = self._highest([*self.references, *self.ranked]) if len(self.objective.metrics) == 1 else None
        return highest if highest and self.results[highest].shared_server else None

    def gain(self, name: str, metric: int = 0, over: str = BASELINE) -> float | None:
        """The share by which `name` is better than `over`; None without one that completed, or if that is 0."""
        if not (over in self.complete and self.results[name].complete):
            return None
        values = self.results[name].values[metric], self.results[over].values[metric]
        return objective.gain(self.objective, *values, metric)

    @cached_property
    def front(self) -> list[str]:
        """The Pareto front: those of `ranked` that no other beats in every objective."""
        signs = [objective.sign(self.objective, metric) for metric in range(len(self.objective.metrics))]
        points = np.array([self.results[name].values for name in self.ranked]).reshape(-1, len(signs)) * signs
        beaten = [np.any((points >= point).all(axis=1) & (points != point).any(axis=1)) for point in points]
        return [name for name, is_beaten in zip(self.ranked, beaten, strict=True) if not is_beaten]

    def config_of(self, trial: str, overrides: Sequence[str] = ()) -> Config:
        """The configuration of `trial` on its own, secrets hidden, changed by `overrides` (backend.env.HF_TOKEN=…).

        Raises InputError.
        """
        config = read(_config_file(self.folder, trial), overrides)
        # What the study told it of others: with whom it shares a server, the best load before it.
        told = {"backend.bounds": None, "scenario.search.best": None} if "bounds" in config.backend else {}
        return with_fields(config, told)

    def chosen(self, trial: str | None) -> str:
        """`trial`, or the best one. Raises InputError if there is no such trial, or no best one."""
        if trial is not None:
            if trial not in self.results:
                names = list(self.complete)
                has = ", ".join([*names[:5], "…", names[-1]] if len(names) > 6 else names)
                raise InputError(f"trial={trial}: {self.name} has no such trial; it has {has}")
            if not self.results[trial].complete:
                state, reason = self.results[trial].state, self.results[trial].reason
                raise InputError(f"trial={trial}: it is {state} ({reason}); choose another")
            return trial
        if not self.best:
            raise InputError(f"study={self.name}: no trial is feasible; name one: trial=baseline, trial=trial-3, …")
        if len(self.objective.metrics) > 1 and len(self.front) > 1:
            raise InputError(f"study={self.name} has a Pareto front; choose from it: trial={' | '.join(self.front)}")
        return self.best


def reference_params(config: Config) -> dict[str, dict[str, Any]]:
    """The parameters of what a study runs first, to compare with, by the trial's name. Raises InputError."""
    recipe = {f"{FLAG}{flag}": value for flag, value in config.model.recipe.args.items()}
    return {BASELINE if word == DEFAULTS else word: recipe if word == RECIPE else {} for word in baselines(config)}


def load(name: str, key: str = "study") -> Study:
    """The study of this name below multirun/, or in the folder of this path; a single trial is one, too.

    Raises InputError, which says `key`, if there is none, or nothing has ended in it.
    """
    folder = MULTIRUN / name if (MULTIRUN / name).is_dir() else Path(name)
    if folder.is_file():
        raise InputError(f"{key}={name}: a file; write the name of a study below {MULTIRUN}/, or its folder")
    if not folder.is_dir():
        known = sorted(path.name for path in MULTIRUN.glob("*") if any(path.glob("*/result.json")))
        close = difflib.get_close_matches(name, known, n=3) or known[-3:]
        hint = f"; there {'is' if len(close) == 1 else 'are'} {', '.join(close)}" if close else ""
        raise InputError(f"{key}={name}: no such folder below {MULTIRUN}/{hint}")
    single = Result.find(folder)
    results = {folder.resolve().name: single} if single else results_in(folder)
    if not results:
        raise InputError(f"{key}={name}: no trial has ended in {folder}")
    config = config_in(folder, first_in(folder, results))
    objective.check(config.objective)  # the file may have been changed by hand
    return Study(folder, config, results, canaries_in(folder))


def first_in(folder: Path, results: Mapping[str, Result]) -> str:
    """The first trial of the study in `folder` that has a configuration, or the first of all."""
    left = [trial for trial in results if _config_file(folder, trial).exists()]
    return (left or list(results))[0]


def config_in(folder: Path, trial: str) -> Config:
    """The configuration of `trial` of the study in `folder`. Raises InputError."""
    return read(_config_file(folder, trial))


def results_in(folder: Path) -> dict[str, Result]:
    """The results of a study's trials, by folder: REFERENCES, then trials by number.

    One with more or fewer values than most is left out, and named in the log; so is one whose number no study gave it.
    """
    trials = {path.parent.name.removeprefix(TRIAL): path.parent for path in folder.glob(f"{TRIAL}*/result.json")}
    numbered = {int(name): path for name, path in trials.items() if re.fullmatch(r"0|[1-9][0-9]*", name)}
    for number in [number for number in numbered if number > MOST_LOST + 10 * len(numbered)]:
        log.warning("%s: no study gave a trial that number; left out", numbered.pop(number))
    paths = [*(folder / name for name in REFERENCES), *(numbered[number] for number in sorted(numbered))]
    found = {path.name: result for path in paths if (result := result_in(path))}
    for name in found:
        if (folder / f"{FRESH}{name}").exists() and (fresh := result_in(folder / f"{FRESH}{name}")):
            found[name] = certified(found[name], fresh)
    usual = mode([len(result.values) for result in found.values() if result.complete] or [0])
    for name in [name for name, result in found.items() if result.complete and len(result.values) != usual]:
        log.warning("%s: %d values, others have %d; left out", folder / name, len(found.pop(name).values), usual)
    return found


def certified(shared: Result, fresh: Result) -> Result:
    """The result of a trial on a shared server that was measured again on a `fresh` one, whose result counts."""
    if fresh.state is State.interrupted:
        return shared
    facts = fresh.facts | {ON_SHARED: json.dumps(shared.values)}
    return replace(fresh, params=shared.params, expected=shared.expected, facts=facts)


def result_in(folder: Path) -> Result | None:
    """The result of a trial; a broken one is left out, and named in the log."""
    try:
        return Result.find(folder)
    except InputError as error:
        log.warning("%s; left out", error)
        return None


def canaries_in(folder: Path) -> dict[str, Result]:
    """The short baselines of a study, by node."""
    paths = [path.parent for path in sorted(folder.glob(f"{CANARY}*/result.json"))]
    return {path.name.removeprefix(CANARY): result for path in paths if (result := result_in(path))}


def _config_file(folder: Path, trial: str) -> Path:
    return (folder if trial == folder.resolve().name else folder / trial) / "config.yaml"
