"""What a shared server measures against fresh ones: the same configurations on both, in turn.

    python benchmarks/hot.py FOLDER --config engine.args.max_num_batched_tokens=512 --config … [--rounds 3] \\
        [model=llama8b_dummy engine.args.gpu_memory_utilization=0.42 …]

One server stays up and is changed to each configuration in turn; after each, the same configuration is measured on a
server that starts for it alone. So two servers are in memory at a time, of which one idles: no more than half of a
GPU's for each. No GPU is leased (gpus=null): nothing else may use it. Every trial leaves its result.json in FOLDER. The
table has the ratio of each metric, shared to fresh, with its 95 % interval, after each round.
"""

import argparse
import math
from contextlib import closing
from pathlib import Path

from autotune.config.command_line import compose, errors_in_one_line
from autotune.measure import trial
from autotune.measure.metrics import mean_and_interval
from autotune.measure.result import Result
from autotune.measure.slot import Slot
from autotune.search.space import CHANGEABLE

METRICS = ("samples_per_s", "step_ms", "ttft_p99_ms", "tpot_p99_ms")


def bounds(configs: list[list[str]]) -> str:
    """The override for the flags with which the shared server starts: the most of what the configurations set."""
    most: dict[str, float] = {}
    for words in configs:
        for word in words:
            flag, _, value = word.removeprefix("engine.args.").partition("=")
            if CHANGEABLE.get(flag) is not None:
                most[flag] = max(most.get(flag, 0), float(value))
    return f"+backend.bounds={{{','.join(f'{flag}:{value:g}' for flag, value in most.items())}}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", action="append", required=True, help="Hydra overrides, by spaces")
    parser.add_argument("--rounds", type=int, default=3)
    given, overrides = parser.parse_known_args()
    configs = [one.split() for one in given.config]
    results: dict[tuple[str, int], list[Result]] = {}

    def measure(kind: str, number: int, slot: Slot) -> None:
        words = [*overrides, "gpus=null", *configs[number], *([bounds(configs)] if slot.shares else [])]
        folder = given.folder / f"{kind}-{number}-{len(results.get((kind, number), []))}"
        config, _, _ = compose(words)
        result = trial.run(config, words, folder, slot)
        results.setdefault((kind, number), []).append(result)
        shown = " ".join(f"{name}={result.metrics[name]:.4g}" for name in METRICS if name in result.metrics)
        phases = " ".join(f"{name} {seconds:.1f}" for name, seconds in result.phases.items())
        print(f"{folder.name}: {result.facts['server']}; {shown}; {phases} s", flush=True)

    with closing(Slot(shares=True)) as shared:
        for _ in range(given.rounds):
            for number in range(len(configs)):
                measure("shared", number, shared)
                measure("fresh", number, Slot())
            for number, words in enumerate(configs):
                print(" ".join(words))
                compare(results["shared", number], results["fresh", number])


def compare(shared: list[Result], fresh: list[Result]) -> None:
    """Print the ratio of each metric, pair by pair, and the engine time of both."""
    for name in METRICS:
        if all(name in result.metrics for result in [*shared, *fresh]):
            logs = [math.log(one.metrics[name] / other.metrics[name]) for one, other in zip(shared, fresh, strict=True)]
            mean, interval = mean_and_interval(logs)
            low, high = (math.exp(end) for end in interval or (mean, mean))
            print(f"  {name}: {math.exp(mean):.3f} ({low:.3f} to {high:.3f})")
    seconds = [sum(result.engine_s for result in some) for some in (shared, fresh)]
    print(f"  engine time: {seconds[0]:.0f} s shared, {seconds[1]:.0f} s fresh", flush=True)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
