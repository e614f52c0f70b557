"""Measure one server configuration under several loads, with one start of vLLM: a latency curve, calibration data.

python benchmarks/loads.py FOLDER --load scenario=offline --load 'scenario=interactive scenario.qps=24' \\
    [model=llama8b_dummy engine.args.max_num_seqs=128 …]

Each load leaves a result.json in FOLDER/<number>, as a trial does.
"""

import argparse
import time
from pathlib import Path

from autotune.config.command_line import compose, errors_in_one_line
from autotune.config.redact import redact
from autotune.measure import trial
from autotune.measure.prepare import prepare, prepare_samples
from autotune.measure.result import Result
from autotune.measure.slot import Slot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--load", action="append", required=True, help="Hydra overrides of the scenario, by spaces")
    arguments, overrides = parser.parse_known_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    common, _, _ = compose([*overrides, *arguments.load[0].split()])
    prepared = prepare(common)
    samples = prepare_samples(common, prepared)
    flags = prepared.args | prepared.backend.dry_run(prepared.model, prepared.args).resolved
    with prepared.backend.start(prepared.model, prepared.args, samples, arguments.folder, Slot()) as engine:
        for number, load in enumerate(arguments.load):
            folder = arguments.folder / str(number)
            folder.mkdir(exist_ok=True)
            config, _, _ = compose([*overrides, *load.split()])
            result = Result(started_at=time.time(), overrides=redact([*overrides, *load.split()]))
            result.args, result.config = redact(prepared.args), trial.names(config)
            result.facts = {"dataset_checksum": samples.checksum}
            trial.measure(config, engine, flags, folder, result)
            result.state, result.ended_at = "complete", time.time()
            result.save(folder)
            shown = ("samples_per_s", "tokens_per_s", "ttft_p99_ms", "tpot_p99_ms")
            print(load, *(f"{name}={result.metrics[name]:.1f}" for name in shown), result.bound, flush=True)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
