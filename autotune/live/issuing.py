"""The requests of a run: how they are handed to the client processes, and what comes of them."""

import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autotune.live.client import Clients, Message, MessageKind
from autotune.live.messages import RunSpec
from autotune.measure.backend import RequestTiming
from autotune.measure.early_stopping import Watch
from autotune.measure.limits import limits_of
from autotune.measure.traffic import Traffic


class Requests:
    """A run's requests, by number."""

    def __init__(self, clients: Clients, spec: RunSpec, prompt_tokens: NDArray[np.int64]) -> None:
        self.decided = False  # scenario.stop ends the run
        scenario = spec.scenario
        self._watch = Watch(spec.total, limits_of(scenario), scenario.over_share)
        self._stop = scenario.stop
        self._prompt_tokens = prompt_tokens  # by sample
        self.completed: list[RequestTiming] = []
        self.failures: list[str] = []
        self.issued: list[float] = []  # when each was issued, or was due; on the clock of time.perf_counter, as `sent`
        self.sent: list[float] = []  # 0 until its answer has ended
        self._samples: list[int] = []
        self._clients = clients

    def send(self, samples: Sequence[int], issued: Sequence[float]) -> None:
        """Send a request for each of `samples`, which count from the times `issued`."""
        if self.decided:
            return
        number = len(self.issued)
        self.issued += issued
        self.sent += [0.0] * len(samples)
        self._samples += samples
        self._clients.send([(number + offset, sample) for offset, sample in enumerate(samples)])

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Record what the clients' messages say of requests that have ended."""
        for message in messages:
            if message.kind == MessageKind.FIRST_TOKEN:
                continue
            issued, sample = self.issued[message.number], self._samples[message.number]
            self.sent[message.number] = message.sent
            if message.kind == MessageKind.DONE:
                prompt = int(self._prompt_tokens[sample])
                timing = RequestTiming(sample, issued, message.first, message.last, message.amount, prompt)
                self.completed.append(timing)
                self._watch.add(timing)
            else:
                self.failures.append(message.data.decode())
        self.decided = self._watch.ends_run(self._stop)


class Issuer(Requests):
    """Sends the requests of `traffic` when they are due, on a thread that calls `run`. LoadGen has no part in it.

    A request counts from when it was due: that it was sent late is a part of its latency, and the audit tells.
    """

    def __init__(self, clients: Clients, spec: RunSpec, prompt_tokens: NDArray[np.int64], traffic: Traffic) -> None:
        super().__init__(clients, spec, prompt_tokens)
        self._traffic = traffic
        self._changed = threading.Condition()
        self._began = time.perf_counter()

    def run(self) -> None:
        """Send all requests, and wait until the last one has been answered."""
        with self._changed:
            while not self._traffic.ended:
                early_s = self._began + self._traffic.next_s - time.perf_counter()
                if early_s > 0:
                    self._changed.wait(min(early_s, threading.TIMEOUT_MAX))
                else:
                    self._send_due()

    def _send_due(self) -> None:
        due = []
        elapsed = time.perf_counter() - self._began
        while self._traffic.next_s <= elapsed:
            due.append(self._traffic.take()[1])
        self.send([ask.sample for ask in due], [self._began + ask.at_s for ask in due])

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Record the clients' messages, and let what follows the answers be due."""
        super().on_messages(messages)
        with self._changed:
            before = self._traffic.next_s
            for message in messages:
                if message.kind == MessageKind.DONE:
                    self._traffic.answered(message.number, message.last - self._began)
                elif message.kind == MessageKind.FAILED:
                    self._traffic.lost(message.number)
            if self._traffic.next_s < before or self._traffic.ended:
                self._changed.notify()
