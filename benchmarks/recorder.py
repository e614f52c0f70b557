"""What recording costs a step.

    python benchmarks/recorder.py
    python benchmarks/recorder.py FOLDER model=llama8b_dummy [OVERRIDE …]

The first: a scheduler that does nothing, with the recorder and without, in turn; the difference is what a step takes
longer. Needs neither vLLM nor a GPU. Beside a server that takes the caches of the processor it may cost somewhat more.

The second: a live trial, whose server records for TURN_S seconds and does not for the next TURN_S, in turn. Steps
without prefill are compared, each turn with those beside it, so that the load should be long answers, all at once.
"""

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from autotune.config.command_line import compose, errors_in_one_line
from autotune.live import recorder, recording
from autotune.measure import trial
from autotune.measure.metrics import mean_and_interval
from autotune.measure.slot import Slot

STEPS, TURNS = 500, 25
TURN_S = 1.0
TIMES = "AUTOTUNE_STEP_TIMES"  # variable: the file for the clock, whether it was recorded, and decodes of each step


def output(decodes: int, prefill: str) -> Any:
    """A vLLM's SchedulerOutput of `decodes` requests that decode and of a prefill: none, new, or one that goes on."""
    computed, generated = list(range(500, 500 + decodes)), [7] * decodes
    names = [f"cmpl-{number}" for number in range(decodes)]
    tokens, new = dict.fromkeys(names, 1), []
    if prefill:
        tokens["cmpl-long"] = 512
    if prefill == "new":
        new = [SimpleNamespace(req_id="cmpl-long", num_computed_tokens=0)]
    elif prefill:
        names, computed, generated = [*names, "cmpl-long"], [*computed, 512], [*generated, 0]
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names, num_computed_tokens=computed, num_output_tokens=generated, resumed_req_ids=set()
        ),
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
    )


def idle() -> Any:
    """The class of a scheduler that does nothing."""

    class Scheduler:
        running, waiting = range(8), range(8)
        output = None

        def schedule(self, throttle_prefills: bool = False) -> Any:
            return self.output

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
            return None

    return Scheduler


def step_us(scheduler: Any) -> float:
    begun = time.perf_counter()
    for _ in range(STEPS):
        scheduler.update_from_output(scheduler.schedule(False), None)
    return (time.perf_counter() - begun) / STEPS * 1e6


def install() -> None:
    """Be a plugin of vLLM in the recorder's place: record in every second turn, and note each step's time."""
    recorder.Recorder = partial(in_turns, recorder.Recorder)  # type: ignore[assignment, misc]
    recorder.install()


def in_turns(wrap: Callable[[Any], Any], scheduler: Any) -> None:
    """Have the class `scheduler` recorded, by `wrap`, in every second turn."""
    plain = scheduler.schedule, scheduler.update_from_output
    wrap(scheduler)
    recorded = scheduler.schedule, scheduler.update_from_output
    ends: list[tuple[float, float, float]] = []

    def turn() -> int:
        return int(time.perf_counter() / TURN_S) % 2

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (plain, recorded)[turn()][0](self, *args, **kwargs)

    def update(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        updated = (plain, recorded)[turn()][1](self, output, *args, **kwargs)
        tokens = output.total_num_scheduled_tokens
        prefills = output.scheduled_new_reqs or tokens != len(output.num_scheduled_tokens)
        ends.append((time.perf_counter(), turn(), 0 if prefills else tokens))
        if not self.running:
            np.save(os.environ[TIMES], np.array(ends))
        return updated

    scheduler.schedule, scheduler.update_from_output = schedule, update


def beside_a_server(folder: Path, overrides: list[str]) -> None:
    recording.RECORDER = Path(__file__)
    times = folder.resolve() / "times.npy"
    words = [*overrides, f"+backend.env.{TIMES}={times}", f"+backend.env.PYTHONPATH={os.pathsep.join(sys.path[1:])}"]
    config, _, _ = compose(words)
    trial.run(config, words, folder, Slot())
    compare(np.load(times))


def compare(ends: np.ndarray) -> None:
    """Print how much longer a step takes in turns that are recorded than in those before and after them."""
    took, turn, tokens = np.diff(ends[:, 0]) * 1e3, ends[1:, 1], ends[1:, 2]
    starts = np.flatnonzero(np.diff(turn)) + 1
    turns = [range(begin, end) for begin, end in pairwise(starts)]
    steps = [[took[step] for step in one if tokens[step] and tokens[step] == tokens[step - 1]] for one in turns]
    middle = [statistics.median(some) if len(some) >= 20 else math.nan for some in steps]
    ratios = [
        (2 * middle[at] / (middle[at - 1] + middle[at + 1]) - 1) * (100 if turn[turns[at][0]] else -100)
        for at in range(1, len(turns) - 1, 2)
    ]
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    mean, interval = mean_and_interval(known)
    said = f" ({interval[0]:+.2f} to {interval[1]:+.2f} %)" if interval else ""
    print(f"recording takes {mean:+.2f} %{said} of a step of {np.nanmedian(middle):.2f} ms; {len(known)} turns")


def main() -> None:
    if sys.argv[1:]:
        beside_a_server(Path(sys.argv[1]), sys.argv[2:])
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[recorder.FOLDER] = folder
        plain, recorded = idle(), idle()
        recorder.Recorder(recorded)
        for decodes in (1, 64, 256, 1024):
            for prefill in ("", "new", "going on"):
                plain.output = recorded.output = output(decodes, prefill)
                more = [-step_us(plain()) + step_us(recorded()) for _ in range(TURNS)]
                beside = f", a prefill {prefill}" if prefill else ""
                print(f"{f'{decodes} that decode{beside}':36s} {statistics.median(more):6.1f} µs")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
