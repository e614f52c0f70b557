"""Is the highest load that a search certifies the right one, and what does finding it cost?

    python benchmarks/max_qps.py FOLDER [model=tiny scenario=server scenario.ttft_ms=2000 scenario.tpot_ms=100 …]
    python benchmarks/max_qps.py FOLDER --seeds 16 --no-scan backend=sim [model=llama8b scenario=interactive …]

On one start of the server: searches with other seeds of LoadGen's, then a scan in steps of 1 query/s, each run as
long as the certifying one, from FROM (a share of what the searches found; below it the scan's time is reckoned, as
those runs last as long as their schedule) to the first load that fails. Prints what each found and how long it took.
"""

import argparse
import itertools
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

from autotune.config.command_line import compose, errors_in_one_line
from autotune.config.schema import Config, Stop
from autotune.measure import runs, trial
from autotune.measure.backend import Engine
from autotune.measure.prepare import prepare, prepare_samples
from autotune.measure.result import Result
from autotune.measure.slot import Slot

FROM = 0.9
AGREE = 0.1  # how far two searches may lie apart, as a share of the lower one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=2, help="searches, with seeds 1, 2, …")
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True)
    arguments, overrides = parser.parse_known_args()
    config, _, _ = compose(["objective=max_qps", *overrides])
    prepared = prepare(config)
    samples = prepare_samples(config, prepared)
    flags = prepared.args | prepared.backend.dry_run(prepared.model, prepared.args).resolved
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    with prepared.backend.start(prepared.model, prepared.args, samples, folder, Slot()) as engine:
        found, seconds = [], []
        for seed in range(1, arguments.seeds + 1):
            below = folder / f"search-{seed}"
            below.mkdir(exist_ok=True)
            result, began = Result(), time.monotonic()
            trial.measure(replace(config, scenario=replace(config.scenario, seed=seed)), engine, flags, below, result)
            result.save(below)
            result.phases.pop("start")
            taken = sum(result.phases.values()) if engine.estimated else time.monotonic() - began
            found.append(result.metrics["max_qps"])
            seconds.append(taken)
            fails = result.metrics.get("failing_qps", float("nan"))
            print(f"search, seed {seed}: {found[-1]:.2f} qps, {fails:.2f} fails; {taken:.0f} s", flush=True)
        apart = [max(pair) / (min(pair) or math.nan) - 1 for pair in itertools.combinations(found, 2)]
        mean, agree = statistics.mean(found), sum(share <= AGREE for share in apart) / len(apart)
        print(f"found {mean:.2f} qps, standard deviation {statistics.stdev(found) / mean:.1%}")
        print(f"{agree:.0%} of the pairs are within {AGREE:.0%}, the furthest are {max(apart):.1%} apart")
        print(f"a search took {statistics.mean(seconds):.0f} s")
        if arguments.scan:
            scan_s = scan(config, engine, flags, folder, max(1, int(FROM * min(found))))
            print(f"a search took {statistics.mean(seconds) / scan_s:.2f} of the scan's time")


def scan(config: Config, engine: Engine, flags: dict[str, object], folder: Path, first: int) -> float:
    """Runs in steps of 1 query/s from `first` until one fails; the seconds of a scan from 1 query/s on."""
    scenario, highest, result = config.scenario, 0, Result()
    scan_s = sum(max(scenario.min_duration_s, scenario.search.certify_queries / qps) for qps in range(1, first))
    print(f"scan below {first} qps: {scan_s:.0f} s, reckoned")
    for qps in range(first, 10_000):
        began, before = time.monotonic(), sum(result.phases.values())
        asked = replace(scenario, qps=float(qps), min_queries=scenario.search.certify_queries, stop=Stop.never, seed=1)
        run = runs.one(asked, engine, flags, folder / f"scan-{qps}", result)
        taken = sum(result.phases.values()) - before if engine.estimated else time.monotonic() - began
        scan_s += taken
        print(f"scan at {qps} qps: {run.measured.verdict}; {taken:.0f} s", flush=True)
        if run.measured.verdict != "VALID":
            break
        highest = qps
    print(f"the scan found {highest} qps in {scan_s:.0f} s")
    return scan_s


if __name__ == "__main__":
    with errors_in_one_line():
        main()
