"""The gate: a trial whose numerics differ from the baseline's can be the best only if its answers got no worse."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotune.config.schema import RECIPE, AccuracyConfig, Check, Config, baselines
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure import accuracy
from autotune.measure.prepare import Prepared
from autotune.measure.result import Result
from autotune.results.study import BASELINE, reference_params
from autotune.search.space import VARIABLE, Space, swept_flags, value_of

log = logging.getLogger(__name__)


def decided(config: Config, space: Space, prepared: Prepared, folder: Path) -> AccuracyConfig:
    """The check that the trials of the study in `folder` make. Raises InputError for one that can't be made."""
    recipe = config.model.recipe.args if RECIPE in baselines(config) else {}
    swept = {key.removeprefix(FLAG): one for key, one in space.parameters.items() if key.startswith((FLAG, VARIABLE))}
    deciding = [name for name in [*swept, *recipe] if name.startswith(VARIABLE) or accuracy.is_numeric(name)]
    deciding += [name for name, one in swept.items() if name == accuracy.SPECULATION and accuracy.LOSSY in str(one)]
    asked, none = config.accuracy.check, replace(config.accuracy, check=Check.none)
    if asked is Check.none or (asked is Check.auto and not deciding):
        return none
    simulated = "simulated" in prepared.backend.facts
    why_not = accuracy.impossible(prepared.args, simulated)
    if why_not and asked is not Check.auto and not simulated:
        raise InputError(f"accuracy={asked.value}: there are no answers to check, as {why_not}; write accuracy=none")
    if why_not:
        log.warning("answers are not checked: %s", why_not)
        return none
    check = Check.nll if asked is Check.auto else asked
    return replace(config.accuracy, check=check, kept_in=str(folder / accuracy.FOLDER))


class Gate:
    """Judges the trials of one study."""

    def __init__(self, config: Config, prepared: Prepared, texts: Sequence[accuracy.Text], folder: Path) -> None:
        self._config = config
        self._prepared = prepared
        self._folder = folder / accuracy.FOLDER
        self._on = accuracy.is_on(config.accuracy)
        self._alone = config.accuracy.check is Check.mlperf  # no baseline is needed: the bounds are MLPerf's
        self._texts = accuracy.digest(texts, config.accuracy)
        if self._on:
            self._folder.mkdir(exist_ok=True)
        self._found: dict[str, accuracy.Scores] = {}  # by numerics
        self._refused: dict[str, str] = {}  # trial whose answers were refused, by numerics

    def refusal(self, params: Mapping[str, Any]) -> str:
        """The reason why a trial with these parameters can't be the best, whatever it measures; empty if it may be."""
        trial = self._refused.get(self._numerics(params)) if self._on and self._refused else None
        return f"accuracy: its numerics are those of {trial}, whose answers were refused" if trial else ""

    def awaits(self, result: Result, results: Mapping[str, Result], running: Collection[str]) -> bool:
        """True if the baseline is among the trials that run, and `result` can't be judged before it has ended."""
        name, numerics = self._reference(results) if self._on and not self._alone else ("", "")
        return name in running and result.complete and result.facts.get(accuracy.NUMERICS, numerics) != numerics

    def judge(self, results: Mapping[str, Result], anew: bool = False) -> list[str]:
        """Judge those of `results` that have no verdict yet, or all of them `anew`; returns whose verdict changed."""
        changed = []
        for name, result in results.items():
            before = result.accuracy, result.constraints.get(accuracy.CONSTRAINT)
            if result.complete and (anew or not result.accuracy or self.waits(result)):
                self._judge(name, result, results)
                changed += [name] if (result.accuracy, result.constraints.get(accuracy.CONSTRAINT)) != before else []
        return changed

    def waits(self, result: Result) -> bool:
        """True if the verdict on `result` may still change, as that on the baseline does."""
        return result.accuracy.startswith(accuracy.UNKNOWN)

    def _judge(self, name: str, result: Result, results: Mapping[str, Result]) -> None:
        result.constraints.pop(accuracy.CONSTRAINT, None)
        if not self._on:
            result.accuracy = ""
            return
        known = result.facts.get(accuracy.NUMERICS)
        numerics = self._numerics(result.params) if known is None else known
        name_of_reference, reference = self._reference(results)
        if numerics == reference and not self._alone:
            result.accuracy = accuracy.SAME
            return
        scores, baseline = self._scores(numerics), self._scores(reference)
        if scores and self._alone and self._config.benchmark.scores.keys() <= scores.by_text.keys():
            self._note(name, numerics, result, accuracy.within(scores, self._config.benchmark))
            return
        if scores and baseline and scores.compares_with(baseline):
            self._note(name, numerics, result, accuracy.judged(scores, baseline, self._config.accuracy.margin))
            return
        own = self._alone or baseline
        lacking = result if own else results.get(name_of_reference)
        why = lacking.facts.get(accuracy.NOT_SCORED, "") if lacking else ""
        what = "its answers" if own else "the baseline's answers"
        result.accuracy = f"{accuracy.UNKNOWN}: {what} have no scores{why and f' ({why})'}"
        result.constraints[accuracy.CONSTRAINT] = 1.0

    def _note(self, name: str, numerics: str, result: Result, found: accuracy.Judgement) -> None:
        result.metrics |= found.metrics
        result.intervals |= found.intervals
        result.constraints[accuracy.CONSTRAINT] = found.over
        result.accuracy = f"{accuracy.REFUSED if found.over > 0 else accuracy.PASSED}: {found.words}"
        if found.over > 0:
            self._refused.setdefault(numerics, name)

    def _reference(self, results: Mapping[str, Result]) -> tuple[str, str]:
        """The baseline's name and numerics: vLLM's defaults, unless the recipe alone stands for them."""
        name = RECIPE if baselines(self._config) == [RECIPE] else BASELINE
        if name in results and accuracy.NUMERICS in results[name].facts:
            return name, results[name].facts[accuracy.NUMERICS]
        return name, self._numerics(reference_params(self._config).get(name, {}))

    def _scores(self, numerics: str) -> accuracy.Scores | None:
        file = self._folder / accuracy.file_name(numerics, self._texts)
        if numerics not in self._found and (scores := accuracy.Scores.load(file)):
            self._found[numerics] = scores
        return self._found.get(numerics)

    def _numerics(self, params: Mapping[str, Any]) -> str:
        """The numerics of a trial with these parameters, as vLLM resolves its flags here."""
        flags = self._prepared.dry_run(swept_flags(params, self._prepared.args)).resolved
        variables = {name.removeprefix(VARIABLE): value_of(one) for name, one in params.items() if VARIABLE in name}
        return accuracy.numerics(flags, {**(self._config.backend.get("env") or {}), **variables})
