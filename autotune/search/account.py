"""twin.json in a study's folder: what its recorded steps say of the baseline and of the best trial, for the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from autotune.config.schema import Config
from autotune.errors import InputError
from autotune.measure.series import STEPS
from autotune.results.study import BASELINE, TWIN, Study
from autotune.search.device import device_of
from autotune.sim.shape import Shape
from autotune.system.files import write_whole
from autotune.text import one_line

if TYPE_CHECKING:
    from autotune.measure.steps import Steps  # pyarrow and SciPy take a while to import, and not all studies have steps

MOST = 100_000  # steps of a trial that are looked at: the first ones


def write(study: Study) -> None:
    """Write twin.json, if a trial of `study` has recorded steps; it says why nothing can be told of them."""
    names = recorded(study)
    if not names:
        (study.folder / TWIN).unlink(missing_ok=True)
        return
    try:
        from autotune.measure.steps import read

        whole = [read(study.folder / name / STEPS, name) for name in names]
        steps = [replace(one, table=one.table[:MOST]) for one in whole]
        body = told(steps, study.config, study.results[names[0]].facts)
    except Exception as error:  # a model that is not simulated, a fit that does not end: the report goes without
        body = {"missing": one_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"}
    write_whole(study.folder / TWIN, json.dumps(body, indent=1))


def recorded(study: Study) -> list[str]:
    """The trials that are told of: the baseline and the best one, as far as their steps were recorded."""
    by_rank = [BASELINE, *(name for name in study.ranked if not study.results[name].duplicate_of)]
    found = [name for name in by_rank if (study.folder / name / STEPS).exists()]
    return found[: 2 if BASELINE in found else 1]


def told(recordings: Sequence["Steps"], config: Config, facts: Mapping[str, str]) -> dict[str, Any]:
    """The twin's errors for `recordings`, fitted to the first, and accounts of a twin that is fitted to all.

    `facts` are of the machine.
    """
    from autotune.sim.account import account
    from autotune.sim.twin import errors, fit

    device, whose = device_of(config, facts)
    model = next((steps.model for steps in recordings if steps.model), None)
    if model is None:
        raise InputError("the recorded steps do not say which model was served")
    shape = Shape.of(model)
    twin = fit(recordings[:1], device, shape)
    off = {steps.name: [asdict(one) for one in errors(twin, steps)] for steps in recordings}
    of_all = fit(recordings, device, shape) if len(recordings) > 1 else twin
    shares = {steps.name: account(of_all, steps) for steps in recordings}
    accounts = {name: {kind: asdict(one) for kind, one in found.items()} for name, found in shares.items()}
    return {"device": device.name, "device_of": whose, "errors": off, "accounts": accounts}
