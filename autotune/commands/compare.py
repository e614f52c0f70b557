"""Studies side by side: another model, GPU, vLLM or sampler.

    autotune compare llama8b-h100 llama8b-h200

names two or more studies below multirun/, or their folders. format=json prints the same for programs, output=<file>
writes it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from autotune.config.command_line import errors_in_one_line, options, write_out
from autotune.config.schema import Config
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure.objective import offered_load
from autotune.measure.result import State
from autotune.results.study import Study, load
from autotune.text import aligned

NOTHING = "–"


class Format(Enum):
    text = "text"
    json = "json"


@dataclass
class Compare:
    format: Format = Format.text
    output: str | None = None


@dataclass(frozen=True)
class Column:
    """One study. Values are of the objective's first metric; null where there is none."""

    study: str
    objective: str  # metrics and directions
    model: str
    dataset: str
    scenario: str
    device: str
    vllm: str
    sampler: str
    trials: int  # that completed, the baseline not counted
    failed: int
    baseline: float | None
    best: float | None
    best_trial: str | None
    gain: float | None  # of the best against the baseline, positive where it is better
    engine_s_to_best: float | None  # start and run of all trials until the best had ended, s
    params: dict[str, Any]  # of the best


def column(study: Study) -> Column:
    config, best = study.config, study.best
    states = [result.state for result in study.swept.values()]
    facts = next((result.facts for result in study.complete.values()), {})
    baseline = study.baseline if study.baseline and study.baseline.feasible else None
    pairs = zip(study.objective.metrics, study.objective.directions, strict=True)
    return Column(
        study=study.name,
        objective=", ".join(f"{direction} {metric}" for metric, direction in pairs),
        model=config.model.name,
        dataset=config.dataset.name,
        scenario=_scenario(config),
        device=f"{facts['simulated']}, simulated" if "simulated" in facts else facts.get("gpu", facts.get("cpu", "")),
        vllm=facts.get("vllm", ""),
        sampler=config.sampler,
        trials=states.count(State.complete),
        failed=states.count(State.failed),
        baseline=baseline.values[0] if baseline else None,
        best=study.results[best].values[0] if best else None,
        best_trial=best,
        gain=study.gain(best) if best and baseline else None,
        engine_s_to_best=_engine_s(study, best) if best else None,
        params=study.results[best].params if best else {},
    )


def _scenario(config: Config) -> str:
    scenario = config.scenario
    limits = [f"{name.upper()} {value:g} ms" for name in ("ttft", "tpot") if (value := getattr(scenario, f"{name}_ms"))]
    return ", ".join(filter(None, [scenario.name, offered_load(config.objective, scenario), *limits]))


def _engine_s(study: Study, until: str) -> float:
    """Seconds of start and run of everything that ended before `until` did, and of it."""
    last = study.results[until].ended_at
    return sum(result.engine_s for result in study.results.values() if result.ended_at <= last)


def render(columns: Sequence[Column]) -> str:
    """The studies beside each other, what is not the same marked with ≠."""
    lines = [["", "", *(one.study for one in columns)]]

    def row(name: str, cells: Sequence[str]) -> None:
        lines.append(["≠" if len(set(cells)) > 1 else "", name, *cells])

    for name in ("objective", "model", "dataset", "scenario", "device", "vllm", "sampler"):
        row(name, [getattr(one, name) or NOTHING for one in columns])
    lines.append([])
    figures = {
        "trials": [f"{one.trials}, {one.failed} failed" for one in columns],
        "baseline": [_number(one.baseline) for one in columns],
        "best": [_number(one.best) for one in columns],
        "gain": [f"{one.gain:+.1%}" if one.gain is not None else NOTHING for one in columns],
        "engine time to best": [
            f"{one.engine_s_to_best / 60:.1f} min" if one.engine_s_to_best is not None else NOTHING for one in columns
        ],
    }
    lines += [["", name, *cells] for name, cells in figures.items()]
    lines.append([])
    lines.append(["", "best configuration", *(one.best_trial or NOTHING for one in columns)])
    for name in dict.fromkeys(name for one in columns for name in one.params):
        row(
            f"  {name.removeprefix(FLAG)}",
            [_value(one.params[name]) if name in one.params else NOTHING for one in columns],
        )
    return "\n".join([*aligned(lines, left=True), *_different(columns)]) + "\n"


def _different(columns: Sequence[Column]) -> list[str]:
    if len({one.objective for one in columns}) == 1:
        return []
    return ["", "The objectives differ: the values of these studies can't be compared, only what each gained."]


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.4g}"


def main() -> None:
    with errors_in_one_line():
        names = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
        chosen = options(Compare, [word for word in sys.argv[1:] if word not in names], __doc__)
        if len(names) < 2:
            raise InputError("name two studies or more: autotune compare A B")
        columns = [column(load(name)) for name in names]
        as_json = json.dumps([asdict(one) for one in columns], indent=1) + "\n"
        write_out(as_json if chosen.format is Format.json else render(columns), chosen.output)


if __name__ == "__main__":
    main()
