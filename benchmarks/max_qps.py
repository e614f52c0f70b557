"""Is the highest load that a search certifies the right one, and what does finding it cost?

    python benchmarks/max_qps.py FOLDER [model=tiny scenario=server …]

On one start of the server: two searches with other seeds of LoadGen's, then a scan in steps of 1 query/s, each run as
long as the certifying one, from FROM (a share of what the searches found; below it the scan's time is reckoned, as
those runs last as long as their schedule) to the first load that fails. Prints what each found and how long it took.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from autotune import runs, trial
from autotune.compose import command_line, errors_in_one_line
from autotune.result import Result
from autotune.schema import Stop

SEEDS = (1, 2)
FROM = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments, overrides = parser.parse_known_args()
    config, _, _ = command_line(["objective=max_qps", *overrides])
    prepared = trial.prepare(config)
    samples = trial.prepare_samples(config, prepared)
    flags = prepared.args | prepared.backend.dry_run(prepared.model, prepared.args).resolved
    arguments.folder.mkdir(parents=True, exist_ok=True)
    scenario = config.scenario
    with prepared.backend.start(prepared.model, prepared.args, samples, arguments.folder) as engine:
        found, seconds = [], []
        for seed in SEEDS:
            folder = arguments.folder / f"search-{seed}"
            folder.mkdir(exist_ok=True)
            result, began = Result(), time.monotonic()
            trial.measure(replace(config, scenario=replace(scenario, seed=seed)), engine, flags, folder, result)
            result.save(folder)
            result.phases.pop("start")
            taken = sum(result.phases.values()) if engine.estimated else time.monotonic() - began
            found.append(result.metrics["max_qps"])
            seconds.append(taken)
            fails = result.metrics.get("failing_qps", float("nan"))
            print(f"search, seed {seed}: {found[-1]:.2f} qps, {fails:.2f} fails; {taken:.0f} s", flush=True)
        first = max(1, int(FROM * min(found)))
        scan_s = sum(max(scenario.min_duration_s, scenario.search.certify_queries / qps) for qps in range(1, first))
        print(f"scan below {first} qps: {scan_s:.0f} s, reckoned")
        highest, result = 0, Result()
        for qps in range(first, 10_000):
            began, before = time.monotonic(), sum(result.phases.values())
            asked = replace(
                scenario, qps=float(qps), min_queries=scenario.search.certify_queries, stop=Stop.never, seed=SEEDS[0]
            )
            run = runs.one(asked, engine, flags, arguments.folder / f"scan-{qps}", result)
            taken = sum(result.phases.values()) - before if engine.estimated else time.monotonic() - began
            scan_s += taken
            print(f"scan at {qps} qps: {run.measured.verdict}; {taken:.0f} s", flush=True)
            if run.measured.verdict != "VALID":
                break
            highest = qps
    apart = abs(found[0] - found[1]) / min(found)
    print(f"two searches differ by {apart:.1%}; the scan found {highest} qps in {scan_s:.0f} s")
    print(f"a search took {sum(seconds) / len(seconds) / scan_s:.2f} of the scan's time")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
