"""The loop of vLLM's engine core on a virtual clock: requests come, steps are scheduled, tokens go out."""

from collections import deque
from collections.abc import Sequence

from autotune.measure.bottleneck import ServerState
from autotune.sim.cost import Cost
from autotune.sim.scheduler import Batch, Request, Scheduler

OBSERVE_S = 1.0


class Observer:
    """Notes a scheduler's state every OBSERVE_S seconds."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.states: list[ServerState] = []
        self.steps = 0
        self._scheduler = scheduler
        self._preempted = self._tokens = self._generated = 0
        self._next_s = 0.0

    def step(self, now: float, batch: Batch) -> None:
        tokens = batch.tokens
        self.steps += 1
        self._tokens += tokens
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
                    kv_use=1 - cache.free / cache.total,
                    preemptions=self._preempted,
                    prefix_hits=cache.hits,
                    prompt_tokens=self._tokens - self._generated + cache.hits,
                    generation_tokens=self._generated,
                    steps=self.steps,
                    step_tokens=self._tokens,
                )
            )


def serve(requests: Sequence[Request], scheduler: Scheduler, cost: Cost) -> Observer:
    """Run `requests`, in order of arrival, to their ends, which sets their token times; returns what was seen.

    With asynchronous scheduling the host schedules and launches a step while the GPU runs the last one, before that
    one's end has freed anything. Raises ValueError if a request can never be scheduled.
    """
    in_flight = 2 if cost.serving.async_scheduling else 1
    now = gpu_free = 0.0
    running: deque[tuple[float, Batch]] = deque()
    coming, count, seen = 0, len(requests), Observer(scheduler)
    while True:
        while coming < count and requests[coming].arrival <= now:
            scheduler.add(requests[coming])
            coming += 1
        if scheduler.running or scheduler.waiting:
            batch = scheduler.schedule()
            if batch.decodes or batch.chunks:
                step = cost.step(batch)
                began = max(now + step.prepare_s, gpu_free)
                now += step.prepare_s + step.launch_s
                gpu_free = max(began + step.gpu_s, now)
                running.append((gpu_free, batch))
                seen.step(now, batch)
                if len(running) < in_flight:
                    continue
        if running:
            ended, batch = running.popleft()
            now = max(now, ended)
            scheduler.finish(batch)
            for request in batch.first:
                request.first_token = ended
            for request in batch.last:
                request.last_token = ended
        elif coming < count:
            now = max(now, requests[coming].arrival)
        elif scheduler.waiting or scheduler.running:
            raise ValueError("a request fits no step")
        else:
            return seen
