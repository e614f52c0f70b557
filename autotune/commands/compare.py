"""Show studies side by side, of different models, GPUs, versions of vLLM or samplers:

    autotune compare llama8b-h100 llama8b-h200

Name two or more studies below multirun/, or their folders.

format  text, or json for programs
output  a file; without it the terminal
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from autotune.config.command_line import errors_in_one_line, options, write_out
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure.limits import limits_of
from autotune.measure.objective import offered_load
from autotune.measure.result import State
from autotune.results.study import BASELINE, RECIPE, Study, load
from autotune.text import aligned, rounded

ABSENT = "–"


class Format(Enum):
    text = "text"
    json = "json"


@dataclass
class Compare:
    format: Format = Format.text
    output: str | None = None


@dataclass(frozen=True)
class Column:
    """One study. Values are of the objective's first metric; null if there is none."""

    study: str
    objective: str  # metrics and directions
    model: str
    dataset: str
    scenario: str
    limits: str
    device: str
    vllm: str
    sampler: str
    trials: int  # that took an engine, without the baseline
    failed: int
    baseline: float | None
    recipe: float | None
    best: float | None
    best_trial: str | None
    gain: float | None  # of the best against the baseline, positive where it is better
    gain_over_recipe: float | None
    engine_s_to_best: float | None  # start and run of all trials until the best had ended, s
    params: dict[str, Any]  # of the best


def column_of(study: Study) -> Column:
    config, best, counts = study.config, study.best, study.counts
    facts = next((result.facts for result in study.complete.values()), {})
    reference = {name: study.results[name].values[0] for name in study.references}
    gains = {name: study.gain(best, over=name) if best else None for name in reference}
    last = study.results[best].ended_at if best else 0.0
    spent = [result.engine_s for result in study.results.values() if result.ended_at <= last]
    pairs = zip(study.objective.metrics, study.objective.directions, strict=True)
    return Column(
        study=study.name,
        objective=", ".join(f"{direction} {metric}" for metric, direction in pairs),
        model=config.model.name,
        dataset=config.dataset.name,
        scenario=", ".join(filter(None, [config.scenario.name, offered_load(config.objective, config.scenario)])),
        limits=", ".join(map(str, limits_of(config.scenario))),
        device=f"{facts['simulated']}, simulated" if "simulated" in facts else facts.get("gpu", facts.get("cpu", "")),
        vllm=facts.get("vllm", ""),
        sampler=config.sampler,
        trials=counts.total() - counts[State.refused],
        failed=counts[State.failed],
        baseline=reference.get(BASELINE),
        recipe=reference.get(RECIPE),
        best=study.results[best].values[0] if best else None,
        best_trial=best,
        gain=gains.get(BASELINE),
        gain_over_recipe=gains.get(RECIPE),
        engine_s_to_best=sum(spent) if best else None,
        params=study.results[best].params if best else {},
    )


def render(columns: Sequence[Column]) -> str:
    """A table with a column for each study; ≠ marks a row where they differ."""
    lines = [["", "", *(column.study for column in columns)]]

    def row(name: str, cells: Sequence[str]) -> None:
        lines.append(["≠" if len(set(cells)) > 1 else "", name, *cells])

    def figure(name: str, values: Sequence[float | None], show: Callable[[float], str]) -> None:
        if "recipe" not in name or any(value is not None for value in values):
            lines.append(["", name, *(ABSENT if value is None else show(value) for value in values)])

    for name in ("objective", "model", "dataset", "scenario", "limits", "device", "vllm", "sampler"):
        row(name, [getattr(column, name) or ABSENT for column in columns])
    lines += [[], ["", "trials", *(f"{column.trials}, {column.failed} failed" for column in columns)]]
    for name in ("baseline", "recipe", "best"):
        figure(name, [getattr(column, name) for column in columns], rounded)
    figure("gain", [column.gain for column in columns], "{:+z.1%}".format)
    figure("gain over the recipe", [column.gain_over_recipe for column in columns], "{:+z.1%}".format)
    minutes = [column.engine_s_to_best and column.engine_s_to_best / 60 for column in columns]
    figure("engine time to best", minutes, "{:.1f} min".format)
    lines += [[], ["", "best configuration", *(column.best_trial or ABSENT for column in columns)]]
    for name in dict.fromkeys(name for column in columns for name in column.params):
        values = [column.params.get(name, ABSENT) for column in columns]
        cells = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
        row(f"  {name.removeprefix(FLAG)}", cells)
    text = aligned(lines, left=True)
    if len({column.objective for column in columns}) > 1:
        text += ["", "The objectives differ: the values of these studies can't be compared, only what each gained."]
    return "\n".join(text) + "\n"


def main() -> None:
    with errors_in_one_line():
        names = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
        chosen = options(Compare, [word for word in sys.argv[1:] if word not in names])
        if len(names) < 2:
            raise InputError("name two studies or more: autotune compare A B")
        columns = [column_of(load(name)) for name in names]
        as_json = json.dumps([asdict(column) for column in columns], indent=1) + "\n"
        write_out(as_json if chosen.format is Format.json else render(columns), chosen.output)


if __name__ == "__main__":
    main()
