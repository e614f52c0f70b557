"""The loop of vLLM's engine core on a virtual clock: requests arrive, steps are scheduled, tokens are generated."""

import math
from collections import deque

from autotune.measure.bottleneck import ServerState
from autotune.sim.client import SimClient
from autotune.sim.cost import Cost
from autotune.sim.scheduler import Batch, Scheduler

OBSERVE_S = 1.0  # simulated, between two states


class Observer:
    """Records a scheduler's state every OBSERVE_S, and its steps if they are asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.states: list[ServerState] = []
        self.rows: list[tuple[float, ...]] = []  # of steps, with the columns of measure/steps.py
        self.steps = 0
        self._scheduler = scheduler
        self._preempted = self._tokens = self._prefilled = self._generated = 0
        self._next_s = 0.0

    def step(self, now: float, batch: Batch) -> None:
        """Count the step `batch`, which was scheduled at `now`."""
        tokens = batch.tokens
        self.steps += 1
        self._tokens += tokens
        self._prefilled += batch.prefilled
        self._generated += batch.decodes + len(batch.first)
        self._preempted += len(batch.preempted)
        if now >= self._next_s:
            self._next_s = now + OBSERVE_S
            scheduler, cache = self._scheduler, self._scheduler.cache
            self.states.append(
                ServerState(
                    time_s=now,
                    running=len(scheduler.running),
                    waiting=len(scheduler.waiting),
                    kv_use=1 - cache.free_blocks / cache.blocks,
                    preemptions=self._preempted,
                    prefix_hits=scheduler.hits,
                    prompt_tokens=self._prefilled + cache.hits,
                    generation_tokens=self._generated,
                    steps=self.steps,
                    step_tokens=self._tokens,
                    evicted_blocks=cache.evicted,
                )
            )


def contents(scheduler: Scheduler, batch: Batch) -> tuple[float, ...]:
    """Contents of the step `batch`, in the order of measure/steps.py's COUNTS."""
    attended = batch.attended + batch.prefilled / 2  # a prefilled token attends to itself, too
    queued = len(scheduler.running), len(scheduler.waiting)
    return batch.decodes, batch.context, len(batch.chunks), batch.prefilled, attended, *queued


def end(batch: Batch, ended: float, client: SimClient) -> None:
    """Note when the step `batch` has `ended`, and tell the `client` of the requests that it completed."""
    for request in batch.first:
        request.first_token = ended
    for request in batch.last:
        request.last_token = ended
    for request in sorted(batch.last):
        client.answered(request)


def serve(client: SimClient, scheduler: Scheduler, cost: Cost, record: bool = False) -> Observer:
    """Run the requests of `client`, and set their token times; returns what was observed, with `record` each step, too.

    An asynchronous host launches a step while the GPU runs the one before. Raises ValueError if a request can never be
    scheduled.
    """
    in_flight = 2 if cost.flags.async_scheduling else 1
    now = gpu_free = 0.0
    pace_of, pause = cost.pace.factors(), cost.pace.interruptions(next(cost.runs))
    running: deque[tuple[float, Batch, tuple[float, ...]]] = deque()
    observer = Observer(scheduler)
    while not client.stopped(now):
        while client.next_s <= now:
            scheduler.add(client.take())
        if scheduler.running or scheduler.waiting:
            now += pause(now)
            batch = scheduler.schedule()
            if batch.decodes or batch.chunks:
                scheduled = (now, now, *contents(scheduler, batch)) if record else ()
                step = cost.step(batch)
                pace = pace_of(step.launch_s > 0, bool(step.eager))
                began = max(now + pace * step.prepare_s, gpu_free)
                now += pace * (step.prepare_s + step.launch_s)
                gpu_free = max(began + step.gpu_s, now)
                running.append((gpu_free + step.return_s, batch, scheduled))
                observer.step(now, batch)
                if len(running) < in_flight:
                    continue
        if running:
            ended, batch, scheduled = running.popleft()
            now = max(now, ended)
            if record:
                observer.rows.append((*scheduled[:2], now, now, *scheduled[2:]))
            scheduler.finish(batch)
            end(batch, ended, client)
        elif client.next_s < math.inf:
            now = max(now, client.next_s)
        elif scheduler.waiting or scheduler.running:
            raise ValueError("a request fits no step")
        else:
            break
    return observer
