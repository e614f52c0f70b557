"""The loop of vLLM's engine core on a virtual clock: requests come, steps are scheduled, tokens go out."""

from collections import deque
from collections.abc import Sequence

from autotune.sim.cost import Cost
from autotune.sim.scheduler import Batch, Request, Scheduler


def serve(requests: Sequence[Request], scheduler: Scheduler, cost: Cost) -> int:
    """Run `requests`, in order of arrival, to their ends, which sets their token times; returns the steps taken.

    With asynchronous scheduling the host schedules and launches a step while the GPU runs the last one, before that
    one's end has freed anything. Raises ValueError if a request can never be scheduled.
    """
    in_flight = 2 if cost.serving.async_scheduling else 1
    now = gpu_free = 0.0
    running: deque[tuple[float, Batch]] = deque()
    coming, count, steps = 0, len(requests), 0
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
                steps += 1
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
            return steps
