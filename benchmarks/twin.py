"""How much engine time does sampler=twin save, where it knows the server and where it does not?

    python benchmarks/twin.py [--seeds 5] [--truths known host …] [--out FILE]

Everything is simulated. Each truth is a grid of configurations of one server, simulated once; the arms look their
trials up in it, and are told what a study would be: values, and (the twin) the steps that such a server records. The
twin and the prior begin with the same device, backend/device=h200. All but one of the truths are something else:

    known   that device
    host    a host that launches and schedules half as fast
    noise   each measured value is off by 5 % (standard deviation)
    flag    an attention backend that nobody models makes a server 12 % faster, another one 15 % slower
    experts the mixture of experts whose steps are recorded in datasets/steps: bound by launches

Prints the engine time, in trials of average length, until an arm has run a configuration within 5 %, and one within 2 %
of the grid's best; and the longest that the twin took to propose a trial, in seconds of the process.
"""

import argparse
import json
import statistics
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from samplers import Workload, key, sampler_config, workload

from autotune.config.command_line import errors_in_one_line
from autotune.measure.result import Result, State
from autotune.measure.steps import Steps
from autotune.results.study import BASELINE
from autotune.search import prior
from autotune.search.samplers import make_sampler
from autotune.search.simulate import ask, estimate
from autotune.search.space import swept_flags
from autotune.search.twin import TwinSampler

GOOD = (0.05, 0.02)  # shares below the grid's best
TRIALS = 40  # average ones, after which an arm gives up
ATTENTION = "engine.args.attention_backend"
LOAD = (
    "scenario=interactive scenario.ttft_ms=500 scenario.tpot_ms=30 objective=max_qps scenario.min_duration_s=20 "
    "scenario.search.certify_queries=662 scenario.search.first_s=5 scenario.search.burst=100 "
    "backend/device=h200 backend/device@prior.backend.device=h200 prior.trials=60 prior.devices=3 "
    "engine.args.max_num_seqs=choice(32,64,128,256,512) "
    "engine.args.max_num_batched_tokens=choice(512,1024,2048,4096,8192) "
    "engine.args.long_prefill_token_threshold=choice(0,512) "
    "engine.args.max_cudagraph_capture_size=choice(default,1024,2048)"
)
SLOW_HOST = " ".join(
    f"backend.device.{name}={value}"
    for name, value in {"host_s": 0.0035, "host_sequence_s": 4.7e-5, "launch_s": 0.0015, "piecewise_s": 0.0007}.items()
)


@dataclass(frozen=True)
class Truth:
    words: str
    noise: float = 0.0  # standard deviation of a value's logarithm
    factors: dict[str, float] = field(default_factory=dict)  # on the value, by attention backend


TRUTHS = {
    "known": Truth(f"model=llama8b {LOAD}"),
    "host": Truth(f"model=llama8b {LOAD} {SLOW_HOST}"),
    "noise": Truth(f"model=llama8b {LOAD}", noise=0.05),
    "flag": Truth(
        f"model=llama8b {LOAD} {ATTENTION}=choice(default,FLASHINFER,TRITON_ATTN)",
        factors={"FLASHINFER": 1.12, "TRITON_ATTN": 0.85},
    ),
    "experts": Truth(f"model=qwen3_30b_a3b {LOAD} backend.twin=[datasets/steps/qwen3moe-defaults.parquet]"),
}
ARMS = ("twin", "tpe+prior", "tpe", "random")


def grid_of(name: str, truth: Truth) -> Workload:
    """The workload, its values as the truth has them."""
    load = workload(name, truth.words)
    for found in load.points.values():
        if found.complete and (factor := truth.factors.get(found.params.get(ATTENTION, ""))):
            found.values = [value * factor for value in found.values]
    return load


def steps_of(load: Workload, params: dict[str, Any]) -> Steps:
    """The steps that the true server records in a trial with `params`."""
    simulated, found = load.simulated, []
    backend: Any = copy(simulated.backend)
    backend.config = replace(backend.config, steps=True)
    records = replace(simulated, prepared=replace(simulated.prepared, backend=backend))
    estimate(records, params, lambda engine, _: found.append(engine.recorded()))
    resolved = simulated.prepared.dry_run(swept_flags(params, simulated.prepared.args)).resolved
    return Steps("", found[0].rows, resolved, simulated.prepared.model.config, found[0].kv_tokens)


@dataclass(frozen=True)
class Run:
    """Engine time in trials of average length until a configuration of each GOOD share has run; at most TRIALS."""

    until: list[float]
    proposal_s: float = 0.0  # the longest one, of the process' time


def run(load: Workload, truth: Truth, arm: str, number: int) -> Run:
    """The trials of one arm, looked up, until all that is GOOD has run."""
    seed = zlib.crc32(f"{load.name} {arm} {number}".encode()) >> 1  # 31 bits
    random = np.random.default_rng(seed)
    config = replace(load.config, seed=seed)
    ended = {BASELINE: Result(State.interrupted)}
    sampler = make_sampler(sampler_config(arm.split("+")[0], seed), load.space, config, ended)
    if isinstance(sampler, TwinSampler):
        sampler._steps_of = lambda name, one: steps_of(load, one.params) if one.complete or name == BASELINE else None
    study = optuna.create_study(sampler=sampler, direction="maximize")
    if arm.endswith("+prior"):
        for one in prior.best(config, load.space):
            study.enqueue_trial(one.params)
    average_s, taken_s = load.grid_s / len(load.points), 0.0
    until, least, longest_s = [float(TRIALS)] * len(GOOD), 1.0, 0.0

    def looked_up(params: Mapping[str, Any]) -> Result:
        expected = sampler.expected(params) if isinstance(sampler, TwinSampler) else {}
        true = load.points[key(load.space, params)]
        noise = float(np.exp(random.normal(0, truth.noise)))
        return replace(true, params=dict(params), expected=expected, values=[value * noise for value in true.values])

    while taken_s < TRIALS * average_s and least > GOOD[-1]:
        began_s = time.process_time()
        found = ask(study, load.simulated, load.space, looked_up)
        longest_s = max(longest_s, time.process_time() - began_s)
        taken_s += found.engine_s
        least = min(least, load.regret(load.points[key(load.space, found.params)]))
        until = [min(one, taken_s / average_s) if least <= good else one for one, good in zip(until, GOOD, strict=True)]
        ended[str(len(ended))] = found
    return Run(until, longest_s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--truths", nargs="+", default=TRUTHS, choices=TRUTHS)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--out", type=Path, help="a JSON file for each arm's times on each truth")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")
    runs: dict[str, dict[str, list[Run]]] = {}
    print("medians: within", ", ".join(f"{good:.0%}" for good in GOOD))
    print(f"{'truth':10}", *(f"{arm:>14}" for arm in options.arms), flush=True)
    for name in options.truths:
        load = grid_of(name, TRUTHS[name])
        runs[name] = {}
        for arm in options.arms:
            runs[name][arm] = [run(load, TRUTHS[name], arm, seed) for seed in range(options.seeds)]
        medians = (
            [statistics.median(until) for until in zip(*(r.until for r in found), strict=True)]
            for found in runs[name].values()
        )
        cells = (", ".join(f"{median:.1f}" for median in found) for found in medians)
        shares = (sum(load.regret(found) <= good for found in load.points.values()) / len(load.points) for good in GOOD)
        longest_s = max(one.proposal_s for found in runs[name].values() for one in found)
        print(
            f"{name:10}",
            *(f"{cell:>14}" for cell in cells),
            f"  {', '.join(f'{share:.0%}' for share in shares)} are good; a proposal took at most {longest_s:.1f} s",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(runs, indent=1, default=vars))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
