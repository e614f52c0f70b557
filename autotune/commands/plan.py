"""Simulate a study before it takes a GPU:

    autotune plan model=llama8b scenario=interactive scenario.qps=28 space=default n_trials=40

Prints the share of the space that can run, what limits it, the gain to expect and the hours that the study will take;
all are estimates. The device is an H100; backend/device@prior.backend.device=a100 names another. twin=<a study's name>
simulates the server whose steps that study recorded, in place of a device.

--load 200 says how many GPUs of each parallelism serve 200 queries/s (with load=concurrency: users) within the limits,
and with price_per_gpu_hour=2.5 what they cost. It looks for each configuration's highest load unless objective= says
otherwise.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna

from autotune.config import vllm_flags
from autotune.config.command_line import compose, errors_in_one_line, load_as_key
from autotune.config.schema import Config, baselines
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure import objective
from autotune.measure.result import Result
from autotune.results import fleet, summary
from autotune.results.study import BASELINE, RECIPE, TRIAL, Study, load
from autotune.search.checks import check_space
from autotune.search.device import device_of
from autotune.search.simulate import estimate, search, search_best, simulation
from autotune.search.space import Space, parse
from autotune.text import by_kind, rounded, shorten

MOST, LEAST = 200, 15  # random points of the space, and as many trials of the simulated study
LONG_S = 35.0  # of CPU that either may take; then they are fewer
TWIN = "twin="


@dataclass(frozen=True)
class Plan:
    space: Space
    device: str
    baseline: Result
    drawn: list[Result]  # over the whole space
    study: Study  # simulated


def make(config: Config, space: Space) -> Plan:
    """Simulate `space`. Raises InputError."""
    if config.prior.backend is None:
        raise InputError("prior=none: a plan needs a device to simulate; leave it out, or write prior=sim")
    simulated = simulation(config, config.prior.backend)
    recipe = config.model.recipe.args if RECIPE in baselines(config) else {}
    with vllm_flags.written_in("model.recipe.args"):
        recipe = {f"{FLAG}{flag}": value for flag, value in simulated.prepared.backend.read(recipe).items()}
    space = check_space(space, config, simulated.prepared.backend, simulated.known)
    began = time.process_time()
    baseline = estimate(simulated, {})
    count = min(MOST, max(LEAST, int(LONG_S / max(1e-3, time.process_time() - began))))
    drawn = in_time(search(simulated, space, optuna.samplers.RandomSampler(seed=config.seed), count))
    trials = in_time(search_best(simulated, space, count))
    results = {BASELINE: baseline} | ({RECIPE: estimate(simulated, recipe)} if recipe else {})
    results |= {f"{TRIAL}{number}": result for number, result in enumerate(trials)}
    study = Study(Path(config.study), config, results)
    device, twin = config.prior.backend["device"]["name"], config.prior.backend.get("twin")
    return Plan(space, f"{device}, a twin of {', '.join(twin)}" if twin else device, baseline, drawn, study)


def in_time(results: Iterator[Result]) -> list[Result]:
    """The `results` that are there within LONG_S, and the one that is simulated then."""
    end, found = time.process_time() + LONG_S, []
    for result in results:
        found.append(result)
        if time.process_time() > end:
            break
    return found


def on_twin_of(name: str, config: Config, keep_device: bool) -> None:
    """Simulate `config` on the twin of the study `name`, with its device unless `keep_device`. Raises InputError."""
    from autotune.measure.steps import NAME, hold_steps  # pyarrow takes a while to import

    study = load(name, "twin")
    if not hold_steps(str(study.folder)):
        raise InputError(f"twin={name}: no trial of it has recorded its steps ({NAME}); backend.steps=true does")
    if config.prior.backend is None:
        return
    config.prior.backend["twin"] = [str(study.folder)]
    facts = next((result.facts for result in study.complete.values()), {})  # a refused trial has none
    device, named_by = device_of(study.config, facts)
    if named_by and not keep_device:
        config.prior.backend["device"] = asdict(device)


def render(plan: Plan) -> str:
    """The plan as text."""
    study = plan.study
    runs = [result for result in plan.drawn if result.complete]
    feasible, drawn = [result for result in runs if result.feasible], len(plan.drawn)
    lines = [
        f"Plan of {study.config.model.name}, {study.config.scenario.name}, on {plan.device}: estimates of a simulation",
        "",
        f"space     {len(plan.space.parameters)} parameters; {_share(runs, plan.drawn)} of {drawn} points can run",
        *(f"            {count / drawn:.0%}: {why}" for why, count in _reasons(plan.drawn)),
        f"limits    {_share(feasible, runs)} of what runs holds them{_binding(runs)}",
        f"bound by  {_bottlenecks(runs)}",
        f"baseline  {plan.baseline.reason or _outcome(plan.baseline, study.config)}",
    ]
    if recipe := study.results.get(RECIPE):
        lines.append(f"recipe    {recipe.reason or _outcome(recipe, study.config)}")
    if study.best:
        best = study.results[study.best]
        lines += [f"best      {_outcome(best, study.config)}", f"            {shorten(best.params)}"]
        lines += [f"gain      {', '.join(summary.gains(study, study.best))}"] if study.references else []
    else:
        lines.append(f"best      nothing holds the limits; {objective.way_out(study.config)}")
    if words := summary.unloaded(study):
        lines.append(f"note      {words}")
    if load := study.config.target_load:
        tried = [*study.results.items(), *((f"draw-{number}", result) for number, result in enumerate(plan.drawn))]
        lines += ["", *fleet.render(fleet.fleets(tried, study.config, load), study.config, load), ""]
    return "\n".join([*lines, f"time      {_time(plan, runs)}"])


def _share(part: Sequence[Result], whole: Sequence[Result]) -> str:
    return f"{len(part) / len(whole):.0%}" if whole else "none"


def _reasons(drawn: Sequence[Result]) -> list[tuple[str, int]]:
    """Reasons why points of the space can't run, the most frequent first; those that differ in numbers count as one."""
    reasons = [result.reason for result in drawn if result.reason]
    return [(reasons[kind[0]], len(kind)) for kind in by_kind(reasons)[:4]]


def _binding(runs: Sequence[Result]) -> str:
    broken = Counter(name for result in runs for name, value in result.constraints.items() if value > 0)
    if not broken:
        return ""
    name, count = broken.most_common(1)[0]
    return f"; the limit that binds is {name.replace('_', ' ')}, which {count / len(runs):.0%} break"


def _bottlenecks(runs: Sequence[Result]) -> str:
    """Each bottleneck and the share of the trials that have it (docs/measuring.md has the rules)."""
    counts = Counter(result.bound for result in runs if result.bound)
    return ", ".join(f"{name} {count / len(runs):.0%}" for name, count in counts.most_common()) or "nothing seen"


def _outcome(result: Result, config: Config) -> str:
    metrics = result.metrics
    latency = f"p99 TTFT {metrics['ttft_p99_ms']:.0f} ms, TPOT {metrics['tpot_p99_ms']:.1f} ms"
    values = [f"{name} {rounded(value)}" for name, value in zip(config.objective.metrics, result.values, strict=True)]
    return f"{', '.join(values)}; {latency}{'' if result.feasible else '; over the limits'}"


def _time(plan: Plan, runs: Sequence[Result]) -> str:
    measured = [*runs, *([plan.baseline] if plan.baseline.complete else [])]
    if not measured:
        return "nothing to run"
    trial_s = sum(result.engine_s for result in measured) / len(measured)
    gpu_s = sum(result.engine_s * vllm_flags.gpus(result.args) for result in measured) / len(measured)
    trials = plan.study.config.n_trials + len(baselines(plan.study.config))
    hours, gpu_hours = trials * trial_s / 3600, trials * gpu_s / 3600
    return f"{trials} trials of {trial_s:.0f} s: {hours:.1f} h one after another, {gpu_hours:.1f} GPU hours"


def searching(words: Sequence[str]) -> list[str]:
    """The objective by which a target load is planned, unless `words` have one of their own."""
    keys = {word.partition("=")[0] for word in words}
    return ["objective=max_qps"] if "target_load" in keys and keys.isdisjoint(("objective", "workload", "load")) else []


def main() -> None:
    with errors_in_one_line():
        twins = [word.removeprefix(TWIN) for word in sys.argv[1:] if word.startswith(TWIN)]
        if len(twins) > 1:
            raise InputError("twin is set twice; write it once")
        words = load_as_key([word for word in sys.argv[1:] if not word.startswith(TWIN)])
        config, params, sweeps = compose(words, ["prior=sim", *searching(words)])
        if twins:
            on_twin_of(twins[0], config, any("prior.backend.device" in word for word in words))
        space, _ = parse(params, sweeps, config.conditions, config.only_if)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        print(render(make(config, space)))


if __name__ == "__main__":
    main()
