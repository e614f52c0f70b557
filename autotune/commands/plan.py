"""What to expect of a study before it takes a GPU:

    python -m autotune.plan model=llama8b scenario=interactive scenario.qps=28 space=default n_trials=40

simulates the space and prints which share of it can run, what limits it, what there is to gain, and the hours it takes.
Everything it prints is an estimate. `backend/device@prior.backend.device=a100` names the device; h100 is the default.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import optuna

from autotune.config.command_line import compose, errors_in_one_line
from autotune.config.schema import Config
from autotune.measure import objective
from autotune.search.simulate import Estimate, estimate, search, search_best, simulation
from autotune.search.space import Space, parse
from autotune.text import shorten

DRAWS = 200  # random points of the space
SEARCHED = 200  # trials of the simulated study


@dataclass(frozen=True)
class Plan:
    config: Config
    space: Space
    device: str
    baseline: Estimate
    drawn: list[Estimate]  # over the whole space
    best: Estimate | None  # feasible, of a simulated study


def make(config: Config, space: Space) -> Plan:
    """Simulate `space`. Raises InputError."""
    simulated = simulation(config, config.prior.backend)
    drawn = list(search(simulated, space, optuna.samplers.RandomSampler(seed=config.seed), DRAWS))
    feasible = [found for found in search_best(simulated, space, SEARCHED) if found.result.feasible]
    sign = objective.sign(config.objective)
    best = max(feasible, key=lambda found: sign * found.result.values[0], default=None)
    return Plan(config, space, config.prior.backend["device"]["name"], estimate(simulated, {}), drawn, best)


def words(plan: Plan) -> str:
    """The plan for people."""
    runs = [found for found in plan.drawn if found.result.complete]
    feasible = [found for found in runs if found.result.feasible]
    lines = [
        f"Plan of {plan.config.model.name}, {plan.config.scenario.name}, on {plan.device}: estimates of a simulation",
        "",
        f"space     {len(plan.space.parameters)} parameters; {_share(runs, plan.drawn)} of it can run",
        *(f"            {count / len(plan.drawn):.0%}: {why}" for why, count in _reasons(plan.drawn)),
        f"limits    {_share(feasible, runs)} of what runs holds them{_binding(runs)}",
        f"bound by  {_bounds(runs)}",
        f"baseline  {_outcome(plan.baseline, plan.config)}",
    ]
    if plan.best:
        lines += [f"best      {_outcome(plan.best, plan.config)}", f"            {shorten(plan.best.params)}"]
        if plan.baseline.result.feasible:
            change = plan.best.result.values[0] / plan.baseline.result.values[0] - 1
            lines.append(f"gain      {change:+.1%} against vLLM's defaults")
    else:
        lines.append("best      nothing that holds the limits; loosen them, lower the load or widen the space")
    return "\n".join([*lines, f"time      {_time(plan, runs)}"])


def _share(part: Sequence[Estimate], whole: Sequence[Estimate]) -> str:
    return f"{len(part) / len(whole):.0%}" if whole else "none"


def _reasons(drawn: Sequence[Estimate]) -> list[tuple[str, int]]:
    """Why points of the space can't run, the most frequent first; numbers in a reason make no other of it."""
    kinds: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for found in drawn:
        if why := found.refused or found.failed:
            kind = "".join(letter for letter in why if not letter.isdigit())
            kinds.setdefault(kind, why)
            counts[kind] += 1
    return [(kinds[kind], count) for kind, count in counts.most_common(4)]


def _binding(runs: Sequence[Estimate]) -> str:
    broken = Counter(name for found in runs for name, value in found.result.constraints.items() if value > 0)
    if not broken:
        return ""
    name, count = broken.most_common(1)[0]
    return f"; the limit that binds is {name.replace('_', ' ')}, broken by {count / len(runs):.0%}"


def _bounds(runs: Sequence[Estimate]) -> str:
    """What requests wait for, by the share of the trials in which they do (docs/measuring.md has the rules)."""
    counts = Counter(found.result.bound for found in runs if found.result.bound)
    return ", ".join(f"{bound} {count / len(runs):.0%}" for bound, count in counts.most_common()) or "nothing seen"


def _outcome(found: Estimate, config: Config) -> str:
    if why := found.refused or found.failed:
        return why
    metrics = found.result.metrics
    latency = f"p99 TTFT {metrics['ttft_p99_ms']:.0f} ms, TPOT {metrics['tpot_p99_ms']:.1f} ms"
    values = [f"{name} {value:.4g}" for name, value in zip(config.objective.metrics, found.result.values, strict=True)]
    return f"{', '.join(values)}; {latency}{'' if found.result.feasible else '; over the limits'}"


def _time(plan: Plan, runs: Sequence[Estimate]) -> str:
    measured = [*runs, *([plan.baseline] if plan.baseline.result.complete else [])]
    if not measured:
        return "nothing to run"
    trial_s = sum(found.engine_s for found in measured) / len(measured)
    gpu_s = sum(found.engine_s * found.gpus for found in measured) / len(measured)
    trials = plan.config.n_trials + plan.config.baseline
    hours, gpu_hours = trials * trial_s / 3600, trials * gpu_s / 3600
    return f"{trials} trials of {trial_s:.0f} s: {hours:.1f} h one after another, {gpu_hours:.1f} GPU hours"


def main() -> None:
    with errors_in_one_line():
        config, params, sweeps = compose(["prior=sim", *sys.argv[1:]])
        space, _ = parse(params, sweeps, config.conditions, config.only_if)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        print(words(make(config, space)))


if __name__ == "__main__":
    main()
