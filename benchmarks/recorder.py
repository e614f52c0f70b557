"""What recording costs a step.

    python benchmarks/recorder.py

A scheduler that does nothing, with the recorder and without, in turn: the difference is what a step takes longer.
Needs neither vLLM nor a GPU. Beside a server that takes the caches of the processor it may cost somewhat more.
"""

import os
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

from autotune.live import recorder

STEPS, TURNS = 500, 25


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


def main() -> None:
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
    main()
