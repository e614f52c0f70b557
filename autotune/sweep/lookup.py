"""Configurations that a study has measured, or is measuring: none is run twice."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.config.vllm_flags import FLAG
from autotune.measure.prepare import Prepared
from autotune.search.space import Space, swept_flags


@dataclass(frozen=True)
class Lookup:
    """The trials of a study by their points: two combinations that vLLM would run alike have the same point."""

    prepared: Prepared
    space: Space
    known: Mapping[str, Any]  # values of flags that are not swept
    names: dict[str, str] = field(default_factory=dict)  # of the first trial at each point

    def check(self, params: Mapping[str, Any]) -> tuple[str, str]:
        """The reason why a combination can't run, empty if it can, and its point.

        The space's conditions refuse, and vLLM's own check.
        """
        if broken := self.space.violated(params, self.known):
            return broken, ""
        outcome = self.prepared.dry_run(swept_flags(params, self.prepared.args))
        others = {name: value for name, value in params.items() if not name.startswith(FLAG)}
        return outcome.refusal, json.dumps([outcome.resolved, others], sort_keys=True, default=str)

    def add(self, name: str, params: Mapping[str, Any]) -> None:
        """Note that the trial `name` measures `params`, unless an earlier one does."""
        self.names.setdefault(self.check(params)[1], name)

    def remove(self, name: str) -> None:
        """Forget the trial `name`, which has measured nothing."""
        for point in [point for point, other in self.names.items() if other == name]:
            del self.names[point]
