"""What recording costs a step.

    python benchmarks/recorder.py
    python benchmarks/recorder.py FOLDER model=llama8b_dummy [OVERRIDE …]

The first: a scheduler that does nothing, with the recorder and without, in turn; the difference is what a step takes
longer. Needs neither vLLM nor a GPU. Beside a server that takes the caches of the processor it may cost somewhat more.

The second: a live trial, whose server records for TURN_S seconds and does not for the next TURN_S, in turn. Steps
without prefill are compared, each turn with those beside it, so that the load should be long answers, all at once.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
LEAST = 20  # steps of a turn
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
    turns = turns_of(np.load(times))
    (folder / "turns.json").write_text(json.dumps(turns))
    print(f"recording takes {said(turns)}")


def turns_of(ends: np.ndarray) -> list[dict[str, Any]]:
    """Each turn: whether it was recorded, and its decode steps of the most common size: count, tokens, median in ms."""
    took, recorded, tokens = np.diff(ends[:, 0]) * 1e3, ends[1:, 1], ends[1:, 2].astype(int)
    turns = []
    for begin, end in pairwise(np.flatnonzero(np.diff(recorded)) + 1):
        size = int(np.bincount(tokens[begin:end]).argmax())
        steps = took[begin:end][(tokens[begin:end] == size) & (ends[begin:end, 2] == size)]
        ms = round(float(np.median(steps)), 4) if size and len(steps) else None
        turns.append({"recorded": bool(recorded[begin]), "tokens": size, "steps": len(steps), "ms": ms})
    return turns


def cost(turns: Sequence[Mapping[str, Any]]) -> tuple[list[float], float]:
    """What recording takes of a step, from each turn and the two beside it, and the median step, ms.

    Contexts grow, and steps with them: where a step is shorter two turns later, new answers have begun.
    """
    more, known = [], []
    for three in zip(turns[:-2:2], turns[1:-1:2], turns[2::2], strict=True):
        if len({turn["tokens"] for turn in three}) == 1 and all(turn["steps"] >= LEAST for turn in three):
            before, ms, after = (turn["ms"] for turn in three)
            if after > before:
                ratio = 2 * ms / (before + after) - 1
                more.append(ratio if three[1]["recorded"] else -ratio)
                known.append(ms)
    return more, statistics.median(known)


def said(turns: Sequence[Mapping[str, Any]]) -> str:
    more, step_ms = cost(turns)
    mean, interval = mean_and_interval(more)
    low, high = interval or (-math.inf, math.inf)
    return (
        f"{mean:+.2%} ({low:+.2%} to {high:+.2%}) of a step of {step_ms:.1f} ms; {len(more)} turns and their neighbors"
    )


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
