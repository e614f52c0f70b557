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

Prints the engine time, in trials of average length, until an arm has run a configuration within 5 % of the grid's best.
"""

import argparse
import json
import statistics
import warnings
import zlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optuna
from samplers import Workload, key, sampler_config, workload

from autotune.config.command_line import errors_in_one_line
from autotune.measure.result import Result, State
from autotune.measure.steps import Steps
from autotune.measure.trial import measure
from autotune.search import prior
from autotune.search.samplers import make_sampler
from autotune.search.space import swept_flags
from autotune.search.tell import tell_infeasible, tell_measured
from autotune.search.twin import Ended, TwinSampler
from autotune.sim.backend import SimBackend

GOOD = 0.05  # share below the grid's best
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
    prepared = load.simulated.prepared
    backend = copy(prepared.backend)
    assert isinstance(backend, SimBackend)
    backend.config = replace(backend.config, steps=True)
    flags = swept_flags(params, prepared.args)
    resolved = prepared.dry_run(flags).resolved
    with (
        TemporaryDirectory() as folder,
        backend.start(prepared.model, prepared.args | flags, load.simulated.samples, Path(folder), None) as engine,
    ):
        measure(load.config, engine, resolved, Path(folder), Result())
        recording = engine.recorded()
    assert recording
    return Steps("", recording.rows, resolved, prepared.model.config, recording.kv_tokens)


def trials_until_good(load: Workload, truth: Truth, arm: str, number: int) -> float:
    """Engine time until a good configuration has run, in trials of average length; TRIALS if none is found."""
    seed = zlib.crc32(f"{load.name} {arm} {number}".encode()) >> 1  # 31 bits
    random = np.random.default_rng(seed)
    config = replace(load.config, seed=seed)
    ended = {"baseline": Ended(Result(State.interrupted), partial(steps_of, load, {}))}
    sampler = make_sampler(sampler_config(arm.split("+")[0], seed), load.space, config, lambda: ended)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    if arm.endswith("+prior"):
        for one in prior.best(config, load.space):
            study.enqueue_trial(one.params)
    average_s = load.grid_s / len(load.points)
    taken_s = 0.0
    while taken_s < TRIALS * average_s:
        trial = study.ask()
        params = load.space.suggest(trial, load.simulated.known)
        expected = sampler.expected(params) if isinstance(sampler, TwinSampler) else {}
        true = load.points[key(load.space, params)]
        noise = float(np.exp(random.normal(0, truth.noise)))
        found = replace(true, params=params, expected=expected, values=[value * noise for value in true.values])
        taken_s += found.engine_s
        if load.regret(true) <= GOOD:
            return taken_s / average_s
        if found.complete:
            tell_measured(study, trial, config.objective, found)
        else:
            tell_infeasible(study, trial, "refused" if found.state is State.refused else "starts")
        ended[str(trial.number)] = Ended(found, partial(steps_of, load, params) if found.complete else None)
    return float(TRIALS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--truths", nargs="+", default=TRUTHS, choices=TRUTHS)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--out", type=Path, help="a JSON file for each arm's times on each truth")
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")
    times: dict[str, dict[str, list[float]]] = {}
    print(f"{'truth':10}", *(f"{arm:>12}" for arm in options.arms), flush=True)
    for name in options.truths:
        load = grid_of(name, TRUTHS[name])
        share = sum(load.regret(found) <= GOOD for found in load.points.values()) / len(load.points)
        times[name] = {}
        for arm in options.arms:
            times[name][arm] = [trials_until_good(load, TRUTHS[name], arm, seed) for seed in range(options.seeds)]
        medians = (statistics.median(found) for found in times[name].values())
        print(f"{name:10}", *(f"{median:12.1f}" for median in medians), f"  {share:.0%} are good", flush=True)
    if options.out:
        options.out.write_text(json.dumps(times, indent=1))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
