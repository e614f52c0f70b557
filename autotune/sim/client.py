"""The simulated client: traffic on its way to a simulated server, and what comes of it."""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial

from autotune.config.schema import Device, ScenarioConfig, Stop
from autotune.data.samples import Samples
from autotune.measure.backend import RequestTiming
from autotune.measure.early_stopping import Watch
from autotune.measure.limits import limits_of
from autotune.measure.objective import LOADED
from autotune.measure.traffic import Source, Traffic
from autotune.sim.scheduler import Request


class SimClient:
    """Sends the requests of `source`, of `samples` whose prompts have the keys `keys(sample)` in the server's cache.

    What would come after `stop` has ended the run may be left out.
    """

    def __init__(
        self,
        scenario: ScenarioConfig,
        source: Source,
        samples: Samples,
        device: Device,
        keys: Callable[[int], Sequence[Hashable]],
        block_size: int,
        stop: Stop,
    ) -> None:
        self.timings: list[RequestTiming] = []  # of the requests that have ended, in this order
        self._traffic, self._samples, self._device = Traffic(source), samples, device
        self._keys, self._block_size = keys, block_size
        self._last: dict[int, Request] = {}  # by number: turns that another one may continue
        self._accepted = 0.0  # when the API server, which takes requests one by one, had the last one
        self._watch = Watch(source.total or 0, limits_of(scenario), scenario.over_share)
        self._stop = stop if source.total and scenario.kind in LOADED and limits_of(scenario) else Stop.never
        self._end_s = math.inf
        self._look()

    def take(self) -> Request:
        """The request that arrives at next_s."""
        number, ask = self._traffic.take()
        self._accepted = self.next_s
        self._look()
        samples, sample = self._samples, ask.sample
        prompt, output = int(samples.prompt_tokens[sample]), int(samples.output_tokens[sample])
        if last := self._last.pop(ask.follows, None):
            before = last.prompt + last.output  # no other request finds what it generated
            keys = [last.block_table.key(index) for index in range(before // self._block_size)]
            request = Request(number, before + prompt, output, keys)
        else:
            request = Request(number, prompt, output, partial(self._keys, sample))
        if samples.continued and samples.continues[sample]:
            self._last[number] = request
        return request

    def answered(self, request: Request) -> None:
        """Count a request that has ended, which has its times now; others may follow it."""
        times = request.first_token + self._device.answer_s, request.last_token + self._device.answer_s
        ask = self._traffic.answered(request.number, times[1], request.output)
        timing = RequestTiming(ask.sample, ask.at_s, *times, request.output, request.prompt, ask.session)
        self.timings.append(timing)
        self._look()
        if self._stop is not Stop.never:
            self._watch.add(timing)
            if self._watch.ends_run(self._stop):
                self._end_s = min(self._end_s, timing.last_token)

    def stopped(self, now: float) -> bool:
        """True once the run has ended: the requests that go on are left as they are."""
        return now > self._end_s

    def _look(self) -> None:
        """Note when the next request arrives; infinite while none is under way."""
        self.next_s = max(self._accepted, self._traffic.next_s) + self._device.accept_s
