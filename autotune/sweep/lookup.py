"""Configurations that a study has measured, or is measuring: none is run twice."""

import json
from collections.abc import Mapping
from typing import Any

from autotune.config.vllm_flags import FLAG
from autotune.measure.prepare import Prepared
from autotune.search.space import Space, swept_flags


class Lookup:
    """The trials of a study by their points: two combinations that vLLM would run alike have the same point."""

    def __init__(self, prepared: Prepared, space: Space, known: Mapping[str, Any]) -> None:
        """`known` has the values of flags that are not swept."""
        self._prepared = prepared
        self._space = space
        self._known = known
        self._names: dict[str, str] = {}  # of the first trial at each point

    def check(self, params: Mapping[str, Any]) -> tuple[str, str]:
        """The reason why a combination can't run, empty if it can, and its point.

        The space's conditions refuse, and vLLM's own check.
        """
        if broken := self._space.violated(params, self._known):
            return broken, ""
        outcome = self._prepared.dry_run(swept_flags(params, self._prepared.args))
        others = {name: value for name, value in params.items() if not name.startswith(FLAG)}
        return outcome.refusal, json.dumps([outcome.resolved, others], sort_keys=True, default=str)

    def trial_at(self, point: str) -> str | None:
        """The name of the trial that has measured `point`, or is measuring it."""
        return self._names.get(point)

    def add(self, name: str, params: Mapping[str, Any]) -> None:
        """Note that the trial `name` measures `params`, unless an earlier one does."""
        self._names.setdefault(self.check(params)[1], name)

    def remove(self, name: str) -> None:
        """Forget the trial `name`, which has measured nothing."""
        self._names = {point: other for point, other in self._names.items() if other != name}
