"""A plugin that vLLM loads in each of its processes: it writes the engine's steps to a file.

It needs the standard library alone. It wraps two methods of the scheduler, in the process that has one; it never
changes what they are given or what they return. At the first error of its own it takes itself out and leaves the
reason. tests/test_recorder.py says what broke when vLLM changes.
"""

import os
import struct
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

FOLDER = "AUTOTUNE_STEPS"  # variable: the folder for PID.rows and PID.reason
ROW = struct.Struct("<4d7q")  # the columns of steps.parquet
MOST = 1_000_000  # rows, about: 88 MB; 1.5 h of steps of 5.5 ms
FLUSH_S = 1.0
IN_FLIGHT = 1000  # steps whose results never came: not a pipeline, but a vLLM that gives results to another method

clock = time.perf_counter


def install() -> None:
    """Record the steps of the scheduler that this process, or a fork of it, makes."""
    try:
        from vllm.config import SchedulerConfig

        chosen, recorded = SchedulerConfig.get_scheduler_cls, set()

        @wraps(chosen)
        def get_scheduler_cls(self: Any) -> Any:
            scheduler = chosen(self)
            try:
                if scheduler not in recorded:
                    recorded.add(scheduler)
                    Recorder(scheduler)
            except Exception as error:  # whatever it is, the engine starts without a recorder
                leave(error)
            return scheduler

        SchedulerConfig.get_scheduler_cls = get_scheduler_cls
    except Exception as error:  # another vLLM than those that are known
        leave(error)


def leave(reason: object) -> None:
    """Write why no more steps are recorded."""
    said = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
    try:
        Path(os.environ[FOLDER], f"{os.getpid()}.reason").write_text(said)
    except Exception:  # a full disk, say; the engine goes on
        return


class Recorder:
    """Wraps the class `scheduler`, whose steps go to PID.rows in FOLDER."""

    def __init__(self, scheduler: Any) -> None:
        schedule, update = scheduler.schedule, scheduler.update_from_output
        self._file = os.open(Path(os.environ[FOLDER], f"{os.getpid()}.rows"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._in_flight: dict[int, tuple[float | int, ...]] = {}  # by the id of vLLM's SchedulerOutput
        self._buffer = bytearray()
        self._flushed = clock()

        @wraps(schedule)
        def recorded_schedule(self_: Any, *args: Any, **kwargs: Any) -> Any:
            begun = clock()
            output = schedule(self_, *args, **kwargs)
            self._guarded(self._scheduled, self_, output, begun, clock())
            return output

        @wraps(update)
        def recorded_update(self_: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
            begun = clock()
            updated = update(self_, output, *args, **kwargs)
            self._guarded(self._updated, self_, output, begun, clock())
            return updated

        def take_out() -> None:
            scheduler.schedule, scheduler.update_from_output = schedule, update

        self._take_out = take_out
        scheduler.schedule, scheduler.update_from_output = recorded_schedule, recorded_update

    def _guarded(self, note: Callable[..., None], *args: Any) -> None:
        try:
            note(*args)
        except Exception as error:  # a mistake here must not end a step
            self._stop(error)

    def _stop(self, reason: object) -> None:
        self._take_out()
        self._in_flight.clear()
        leave(reason)

    def _scheduled(self, scheduler: Any, output: Any, begun: float, ended: float) -> None:
        if output.total_num_scheduled_tokens:
            if len(self._in_flight) > IN_FLIGHT:
                raise RuntimeError("results of steps do not come to update_from_output")
            self._in_flight[id(output)] = (begun, ended, *counts(scheduler, output))

    def _updated(self, scheduler: Any, output: Any, begun: float, ended: float) -> None:
        step = self._in_flight.pop(id(output), None)
        if step is None:
            return
        self._buffer += ROW.pack(step[0], step[1], begun, ended, *step[2:])
        if ended - self._flushed >= FLUSH_S or not scheduler.running:
            os.write(self._file, self._buffer)
            self._buffer.clear()
            self._flushed = ended
            if os.fstat(self._file).st_size >= MOST * ROW.size:
                self._stop(f"{MOST:,} steps are recorded of one trial, and no more")


def counts(scheduler: Any, output: Any) -> tuple[int, ...]:
    """Decodes, context, chunks, prefill tokens, attended, running, waiting: what is in the step `output`."""
    tokens, going_on = output.num_scheduled_tokens, output.scheduled_cached_reqs
    computed, generated = going_on.num_computed_tokens, going_on.num_output_tokens
    chunks = [(tokens[new.req_id], new.num_computed_tokens) for new in output.scheduled_new_reqs]
    total, decodes, context = output.total_num_scheduled_tokens, len(computed), sum(computed)
    resumed = going_on.resumed_req_ids  # after a preemption: a prefill
    # Nearly always each request that goes on decodes: then none is looked at by itself.
    if total - sum(n for n, _ in chunks) != decodes or 0 in generated or resumed:
        more = [
            (tokens[name], have)
            for name, have, made in zip(going_on.req_ids, computed, generated, strict=True)
            if tokens[name] != 1 or not made or name in resumed
        ]
        chunks += more
        decodes -= len(more)
        context -= sum(have for _, have in more)
    attended = sum(n * have + n * (n + 1) // 2 for n, have in chunks)
    waiting = len(scheduler.waiting) + len(getattr(scheduler, "skipped_waiting", ()))
    return decodes, context, len(chunks), total - decodes, attended, len(scheduler.running), waiting
