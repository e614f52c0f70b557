"""Which sampler finds a good configuration with the least engine time?

    python benchmarks/samplers.py [--seeds 5] [--trials 40] [--samplers tpe gp …] [--out FOLDER]

Everything is simulated. Each workload's grid is simulated once and is the truth: the samplers look their trials up in
it, with and without a prior (the best configurations of a simulated study, asked for first), with and without pruning
(pruner=median). A trial takes its start
and its run; one that runs out of memory takes its start, a refused one nothing, one asked for twice takes its time
twice. Every arm is given the engine time of --trials average points.

The prior must not know the truth: it simulates a device with each fitted constant multiplied by a lognormal factor of
its own (--sigma, another one for each seed), as if the device were badly calibrated. It still shares with the truth
what no calibration changes: the scheduler, the order of requests, and how much memory there is. What the simulator
gets wrong in kind, and the noise of real measurements, are not tested here.

Prints a table, and leaves samplers.json (every trial) and samplers.png in FOLDER.
"""

import argparse
import json
import statistics
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from optuna.trial import TrialState

from autotune.config import CONF
from autotune.config.command_line import compose, errors_in_one_line
from autotune.config.overrides import with_fields
from autotune.config.schema import Config
from autotune.measure import progress
from autotune.measure.result import Result, State
from autotune.search import prior
from autotune.search.optuna_private import Grid
from autotune.search.samplers import make_sampler
from autotune.search.simulate import Simulation, checked, simulation
from autotune.search.space import Space, parse
from autotune.search.tell import tell_infeasible, tell_measured
from autotune.sim.backend import PUBLISH_S, published
from autotune.sweep.checks import REFUSALS_IN_A_ROW

SAMPLERS = ("tpe", "gp", "nsga2", "cmaes", "qmc", "random")  # botorch takes as long as all of these, several times
LONG_ANSWERS = (
    "dataset=synthetic dataset.max_output_tokens=1024 dataset.records.output_bounds=[32,1024] "
    "dataset.records.output_tokens=512 dataset.records.output_deviation=256"
)
# Each maximises its objective, over a grid.
WORKLOADS = {
    # Long answers fill the KV cache: more of it runs more sequences, until vLLM's warm-up has no memory left for them.
    "offline": f"model=llama8b scenario=offline scenario.min_queries=1024 {LONG_ANSWERS} "
    "engine.args.max_num_seqs=range(64,1025,step=64) engine.args.max_num_batched_tokens=range(2048,8193,step=3072) "
    "engine.args.gpu_memory_utilization=range(0.90,0.981,step=0.04) engine.args.quantization=choice(default,fp8) "
    "engine.args.kv_cache_dtype=choice(auto,fp8)",
    # The highest load that a configuration serves within the limits.
    "interactive": "model=llama8b scenario=interactive objective=goodput scenario.qps=range(20,41,step=2) "
    "engine.args.max_num_seqs=range(32,193,step=32) engine.args.max_num_batched_tokens=choice(512,1024,2048,4096) "
    "engine.args.quantization=choice(default,fp8)",
    # Long prompts, too, on a small GPU: a sequence too many is preempted and computed again.
    "tight": f"model=llama8b scenario=offline scenario.min_queries=512 {LONG_ANSWERS} backend/device=l40s "
    "dataset.records.prompt_tokens=2000 dataset.records.prompt_bounds=[500,6000] ++engine.args.max_model_len=8192 "
    "engine.args.max_num_seqs=range(32,385,step=32) engine.args.max_num_batched_tokens=range(2048,8193,step=2048) "
    "engine.args.gpu_memory_utilization=range(0.88,0.981,step=0.02) engine.args.kv_cache_dtype=choice(auto,fp8)",
}
GOOD = 0.02  # a regret that is good enough
REGRETS_AFTER = (10, 20)  # trials
GRID = "grid"
PRIOR, PRUNING = "+prior", "+pruning"
PRUNER = "median"


@dataclass(frozen=True)
class Workload:
    name: str
    simulated: Simulation
    space: Space
    points: dict[tuple[Any, ...], Result]  # of the whole grid, by `key`
    published: dict[tuple[Any, ...], list[float]]  # the objective every PUBLISH_S of a run, of those that run

    @property
    def config(self) -> Config:
        return self.simulated.config

    @property
    def best(self) -> Result:
        return max((e for e in self.points.values() if e.feasible), key=lambda e: e.values[0])

    @property
    def grid_s(self) -> float:
        return sum(found.engine_s for found in self.points.values())

    def regret(self, found: Result) -> float:
        """Share below the best; 1 if it is no answer."""
        return 1 - found.values[0] / self.best.values[0] if found.feasible else 1.0

    @property
    def good(self) -> list[Result]:
        return [found for found in self.points.values() if self.regret(found) <= GOOD]

    def expected_s(self) -> float:
        """Engine time until the grid's first good point, expected over its random orders."""
        good_s = sum(found.engine_s for found in self.good)
        # Of k good points each is as likely the first, and a bad one comes before all of them with 1 / (k + 1).
        return (self.grid_s - good_s) / (len(self.good) + 1) + good_s / len(self.good)


@dataclass(frozen=True)
class Run:
    """One arm on one workload; a list has an entry for each trial that was run."""

    workload: str
    arm: str
    seed: int
    engine_s: list[float]  # taken when it ends
    regret: list[float]  # best so far
    failed: list[bool]
    repeated: list[bool]  # asked for before
    pruned: list[bool]

    def good_s(self) -> float:
        """Engine time until it is good; infinite if it never is."""
        return next((at for at, regret in zip(self.engine_s, self.regret, strict=True) if regret <= GOOD), np.inf)

    def regret_after(self, trials: int) -> float:
        return self.regret[min(trials, len(self.regret)) - 1]


def key(space: Space, params: Mapping[str, Any]) -> tuple[Any, ...]:
    """A point's place in the grid; steps of a float are not exact."""
    values = (params.get(name) for name in space.parameters)
    return tuple(round(value, 6) if isinstance(value, float) else value for value in values)


def workload(name: str, words: str) -> Workload:
    config, params, sweeps = compose(["backend=sim", "prior=sim", "space=none", *words.split()])
    assert config.objective.directions == ["maximize"]
    space, _ = parse(params, sweeps, config.conditions, config.only_if)
    simulated = simulation(config, config.backend)
    points, series, metric = {}, {}, config.objective.metrics[0]
    for params in grid(space, simulated):
        point, seen = key(space, params), []
        points[point] = checked(simulated, space, params, lambda _, run, seen=seen: seen.append(run))
        if seen and metric in progress.METRICS:
            load = with_fields(config, {name: value for name, value in params.items() if "scenario" in name}).scenario
            times = np.arange(PUBLISH_S, seen[0].measured.phases["run"], PUBLISH_S)
            series[point] = [published(seen[0].measured.requests, at, load)[metric] for at in times]
    assert len(points) == space.grid_size
    return Workload(name, simulated, space, points, series)


def grid(space: Space, simulated: Simulation) -> Iterator[dict[str, Any]]:
    """Every point, as a study with sampler=grid asks for it."""
    study = optuna.create_study(sampler=Grid(space.grid))
    for _ in range(space.grid_size):
        trial = study.ask()
        yield space.suggest(trial, simulated.known)
        study.tell(trial, 0.0)


def expected_best(load: Workload, sigma: float, seed: int) -> list[dict[str, Any]]:
    """What a study with this seed and a miscalibrated prior asks for first."""
    # Other draws than those that the prior itself reckons with.
    backend = {**load.config.backend, "device": prior.perturbed(load.config.backend["device"], sigma, 0.0, 1000 + seed)}
    config = replace(load.config, seed=seed, prior=replace(load.config.prior, backend=backend))
    return [one.params for one in prior.best(config, load.space)]


@cache
def sampler_config(name: str, seed: int) -> Any:
    with hydra.initialize_config_dir(str(CONF)):
        composed = hydra.compose("config", [f"sampler={name}", f"seed={seed}"], return_hydra_config=True)
    return composed.hydra.sweeper.sampler


def run(load: Workload, arm: str, number: int, first: Sequence[dict[str, Any]], budget_s: float) -> Run:
    """A study as `autotune.sweep.study` runs it, trials looked up, until it has taken `budget_s`."""
    name = arm.split("+")[0]
    seed = zlib.crc32(f"{load.name} {name} {number}".encode()) >> 1  # or all would begin with the same draws; 31 bits
    sampler = make_sampler(sampler_config(name, seed), load.space)
    pruner = make_pruner(f"pruner={PRUNER}") if PRUNING in arm else optuna.pruners.NopPruner()
    study = optuna.create_study(sampler=sampler, pruner=pruner, directions=load.config.objective.directions)
    for params in first if PRIOR in arm else []:
        study.enqueue_trial(params)
    done = Run(load.name, arm, number, [], [], [], [], [])
    taken_s, least, refusals = 0.0, 1.0, 0
    asked: set[tuple[Any, ...]] = set()
    while taken_s < budget_s and refusals < REFUSALS_IN_A_ROW:
        trial = study.ask()
        point = key(load.space, load.space.suggest(trial, load.simulated.known))
        found = load.points[point]
        if found.state is State.refused:
            refusals += 1
            tell_infeasible(study, trial, "refused")
            continue
        refusals = 0
        pruned_s = None
        if found.state is State.failed:
            tell_infeasible(study, trial, "starts")
        elif (pruned_s := pruned_after(trial, load.published[point])) is not None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            tell_measured(study, trial, load.config.objective, found)
        taken_s += found.engine_s if pruned_s is None else found.phases["start"] + pruned_s
        if pruned_s is None:
            least = min(least, load.regret(found))
        done.engine_s.append(taken_s)
        done.regret.append(least)
        done.failed.append(found.state is State.failed)
        done.repeated.append(point in asked)
        done.pruned.append(pruned_s is not None)
        asked.add(point)
    return done


def pruned_after(trial: optuna.Trial, published: Sequence[float]) -> float | None:
    """Seconds of measurement after which the study's pruner ends the trial; None if it never does."""
    for step, value in enumerate(published):
        trial.report(value, step)
        if trial.should_prune():
            return (step + 1) * PUBLISH_S
    return None


def make_pruner(override: str) -> optuna.pruners.BasePruner:
    with hydra.initialize_config_dir(str(CONF)):
        config = hydra.compose("config", [override]).pruner
    made: optuna.pruners.BasePruner = hydra.utils.instantiate(config, _execution_whitelist_=("optuna.*",))
    return made


def table(loads: Sequence[Workload], runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """By arm: medians over seeds and workloads, and shares of all trials; times as a share of the full grid's."""
    grid_s = {load.name: load.grid_s for load in loads}
    rows = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        of_arm = [run for run in runs if run.arm == arm]
        shares = {name: [r.good_s() / grid_s[name] for r in of_arm if r.workload == name] for name in grid_s}
        rows[arm] = {
            "good_h": statistics.median(run.good_s() / 3600 for run in of_arm),
            "good_share": statistics.median(share for found in shares.values() for share in found),
            **{f"good_share_{name}": statistics.median(found) for name, found in shares.items()},
            "reached": sum(run.good_s() < np.inf for run in of_arm) / len(of_arm),
            **{f"regret_{n}": statistics.median(run.regret_after(n) for run in of_arm) for n in REGRETS_AFTER},
            "failed": statistics.fmean(failed for run in of_arm for failed in run.failed),
            "repeated": statistics.fmean(repeated for run in of_arm for repeated in run.repeated),
            "pruned": statistics.fmean(pruned for run in of_arm for pruned in run.pruned),
        }
    expected = {load.name: load.expected_s() / load.grid_s for load in loads}
    rows[GRID] = {
        "good_h": statistics.median(load.expected_s() / 3600 for load in loads),
        "good_share": statistics.median(expected.values()),
        **{f"good_share_{name}": share for name, share in expected.items()},
        "reached": 1.0,
    }
    return dict(sorted(rows.items(), key=lambda row: row[1]["good_share"]))


def words(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The table for people."""
    columns = {
        "good_h": "hours",
        "good_share": "of grid",
        **{name: name.removeprefix("good_share_") for name in rows[GRID] if name.startswith("good_share_")},
        "reached": "reached",
        **{f"regret_{n}": f"regret@{n}" for n in REGRETS_AFTER},
        "failed": "failed",
        "repeated": "repeated",
        "pruned": "pruned",
    }

    def cell(name: str, value: float | None) -> str:
        if value is None:
            return ""
        if value == np.inf:
            return "over"
        return (
            f"{value:.2f}"
            if name == "good_h"
            else f"{value:.0%}"
            if name in ("reached", "failed", "repeated", "pruned")
            else f"{value:.1%}"
        )

    lines = [" ".join(["".ljust(22), *(f"{title:>11}" for title in columns.values())])]
    for arm, row in rows.items():
        lines.append(" ".join([arm.ljust(22), *(f"{cell(name, row.get(name)):>11}" for name in columns)]))
    return "\n".join(lines)


def verdicts(rows: Mapping[str, Mapping[str, float]], budget: float) -> list[str]:
    """Whether the prior saves the engine time that it should, over all workloads and on each.

    What is over the `budget`, a share of the grid's time, takes at least that.
    """
    if not {"tpe", "tpe" + PRIOR} <= rows.keys():
        return []
    mine, found = rows["tpe" + PRIOR], []
    for share, arm in ((1 / 5, GRID), (1 / 2, "tpe")):
        said = []
        for name in (name for name in mine if name.startswith("good_share")):
            other = budget if rows[arm][name] == np.inf else rows[arm][name]
            verdict = "reached" if mine[name] <= share * other else "MISSED"
            said.append(f"{name.removeprefix('good_share').lstrip('_') or 'all workloads'} {verdict}")
        found.append(f"tpe{PRIOR} takes at most {share:g} of {arm}'s engine time: {', '.join(said)}")
    return found


def plot(loads: Sequence[Workload], runs: Sequence[Run], file: Path) -> None:
    """Median regret against engine time, a panel for each workload; arms without pruning."""
    figure = Figure(figsize=(6 * len(loads), 5), layout="constrained")
    panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    arms = list(dict.fromkeys(run.arm for run in runs if PRUNING not in run.arm))
    samplers = dict.fromkeys(arm.removesuffix(PRIOR) for arm in arms)
    colours = {sampler: f"C{number}" for number, sampler in enumerate(samplers)}
    for panel, load in zip(panels, loads, strict=True):
        of_load = [run for run in runs if run.workload == load.name]
        hours = np.linspace(0, max(run.engine_s[-1] for run in of_load) / 3600, 300)
        for arm in arms:
            curves = [
                np.array([1.0, *run.regret])[np.searchsorted(run.engine_s, hours * 3600, side="right")]
                for run in of_load
                if run.arm == arm
            ]
            style = {"color": colours[arm.removesuffix(PRIOR)], "linestyle": "-" if arm.endswith(PRIOR) else "--"}
            panel.step(hours, np.median(curves, axis=0), where="post", label=arm, **style)
        panel.axhline(GOOD, color="grey", linewidth=0.5)
        panel.set(title=f"{load.name}: {len(load.points)} points", xlabel="engine time, hours")
        panel.set_yscale("symlog", linthresh=GOOD)
    panels[0].set_ylabel("regret: share below the grid's best")
    panels[-1].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def summary(load: Workload) -> dict[str, Any]:
    """What samplers.json says of a grid."""
    points = load.points.values()
    return {
        "points": len(points),
        "refused": sum(point.state is State.refused for point in points),
        "failed": sum(point.state is State.failed for point in points),
        "feasible": sum(point.feasible for point in points),
        "good": len(load.good),
        "best": load.best.values[0],
        "best_params": load.best.params,
        "values": [point.values[0] for point in points if point.feasible],
        "grid_s": load.grid_s,
        "expected_s": load.expected_s(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="studies of each arm on each workload")
    parser.add_argument("--trials", type=int, default=40, help="average trials that each arm has time for")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, metavar="SAMPLER")
    parser.add_argument("--sigma", type=float, default=0.2, help="of the logarithm of the prior's miscalibration")
    parser.add_argument("--out", type=Path, default=Path("multirun/samplers"))
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # a Gaussian process of so few trials takes many times longer with more
    options.out.mkdir(parents=True, exist_ok=True)
    loads, runs = [], []
    spent_s = dict.fromkeys(options.samplers, 0.0)
    for name, overrides in WORKLOADS.items():
        load = workload(name, overrides)
        loads.append(load)
        failed = sum(point.state is State.failed for point in load.points.values())
        print(
            f"{name}: {len(load.points)} points, of which {failed} run out of memory and {len(load.good)} are within "
            f"{GOOD:.0%} of the best; the grid takes {load.grid_s / 3600:.1f} h",
            flush=True,
        )
        budget_s = options.trials * load.grid_s / len(load.points)
        for seed in range(options.seeds):
            first = expected_best(load, options.sigma, seed)
            for sampler in options.samplers:
                began = time.perf_counter()
                for arm in ("", PRIOR, PRUNING, PRIOR + PRUNING):
                    runs.append(run(load, sampler + arm, seed, first, budget_s))
                spent_s[sampler] += time.perf_counter() - began
    rows = table(loads, runs)
    body = {
        "options": {**vars(options), "out": str(options.out)},
        "workloads": {load.name: summary(load) for load in loads},
        "arms": rows,
        "sampler_s": spent_s,
        "runs": [asdict(run) for run in runs],
    }
    (options.out / "samplers.json").write_text(json.dumps(body, indent=1))
    plot(loads, runs, options.out / "samplers.png")
    print(f"""
Engine time until within {GOOD:.0%} of the best, and regret: medians over the workloads and {options.seeds} seeds.
The prior simulates a miscalibrated device: each fitted constant is off by a factor of its own, sigma {options.sigma:g};
its scheduler and its memory are the truth's.
""")
    budget = options.trials / max(len(load.points) for load in loads)
    print("\n".join([words(rows), "", *verdicts(rows, budget)]))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
