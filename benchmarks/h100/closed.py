"""What a submission's rules have against the runs of closed.sh, from their logs:

    python benchmarks/h100/closed.py TRIAL … [--checker CHECKOUT]

Prints each trial's figures and recorded deviations, then what autotune's own check of a submission finds in LoadGen's
log, and what the one of MLPerf's checker finds, if there is a checkout of mlcommons/inference. Exit code 1: something.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autotune.config.command_line import errors_in_one_line
from autotune.config.schema import Config
from autotune.results.study import load
from autotune.results.submission import LOGS, NAMES, Run, objections

FIGURES = ("requests", "duration_s", "samples_per_s", "tokens_per_s", "ttft_p99_ms", "tpot_p99_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+", type=Path)
    parser.add_argument("--checker", type=Path)
    arguments = parser.parse_args()
    found = 0
    for folder in arguments.trials:
        study = load(str(folder))
        result, config = study.results[study.name], study.config_of(study.name)
        figures = " ".join(f"{name}={result.metrics[name]:.4g}" for name in FIGURES if name in result.metrics)
        print(f"\n{folder.name}: {result.verdict} {figures}")
        print(f"  {result.metrics['output_tokens'] / result.metrics['requests']:.2f} tokens an answer")
        print(*(f"  deviates: {line}" for line in result.deviations), sep="\n")
        against = list(objections(Run(folder, result), config.benchmark, config.scenario.name, "performance"))
        if arguments.checker:
            against += of_checker(arguments.checker, folder, config)
        print(*(f"  {line}" for line in against or ["nothing against it"]), sep="\n")
        found += len(against)
    sys.exit(found > 0)


def of_checker(checkout: Path, folder: Path, config: Config) -> Iterator[str]:
    """Yield the objections of MLPerf's own check of a performance log, of a closed submission."""
    sys.path.insert(0, str(checkout / "tools" / "submission"))
    import submission_checker.checks.performance_check as mlperfs  # type: ignore[import-not-found]
    from submission_checker.parsers.loadgen_parser import LoadgenParser  # type: ignore[import-not-found]

    told: list[str] = []
    log: Any = logging.getLogger("mlperf")
    log.addHandler(handler := logging.Handler(logging.ERROR))
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    name = NAMES[config.scenario.name]
    about = {"benchmark": config.benchmark.name, "scenario": name, "division": "closed", "check_scenarios": True}
    logs = mlperfs.SubmissionLogs(LoadgenParser(str(folder / LOGS[1])), system_json={}, loader_data=about)
    mlperfs.PerformanceCheck(log, str(folder), mlperfs.Config(config.benchmark.round, ""), logs)()
    yield from told


if __name__ == "__main__":
    with errors_in_one_line():
        main()
