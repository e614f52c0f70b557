"""The first trials of a study: another study's best, as far as they lie within this one's space."""

import logging

from autotune.errors import InputError
from autotune.measure.result import Result
from autotune.results.study import load
from autotune.search.prior import distinct
from autotune.search.space import Space, contains, describe

log = logging.getLogger(__name__)


def best(name: str, space: Space, count: int) -> list[Result]:
    """The `count` best distinct trials of study `name` that fit, their parameters cut to those of `space`.

    What does not fit is logged in one line. Raises InputError if there is no such study, or nothing of it fits.
    """
    study = load(name, "warm_start")
    left_out: dict[str, None] = {}
    fitting: list[Result] = []
    for trial in study.ranked:
        result = study.results[trial]
        shared = {key: value for key, value in result.params.items() if key in space.parameters}
        wrong = [key for key, value in shared.items() if not contains(space.parameters[key], value)]
        for key, value in result.params.items():
            if key not in shared:
                left_out[f"{key} is not swept here"] = None
            elif key in wrong:
                left_out[f"{trial}'s {key}={value} is outside {describe(space.parameters[key])}"] = None
        if shared and not wrong:
            result.params = shared
            fitting.append(result)
    found = distinct(fitting, space, count)
    if left_out:
        log.info("warm_start=%s: %s", name, "; ".join(left_out))
    if not found:
        raise InputError(f"warm_start={name}: none of its {len(study.ranked)} feasible trials lies within this space")
    return found
