"""The requests of a run: how they are handed to the client processes, and what comes of them."""

import threading
import time
from array import array
from collections.abc import Sequence

from autotune.live.client import Clients, Message, MessageKind
from autotune.live.load_generator import RunSpec
from autotune.measure.backend import RequestTiming
from autotune.measure.early_stopping import Watch
from autotune.measure.limits import limits_of
from autotune.measure.traffic import Ask, Traffic


class Requests:
    """A run's requests, by number."""

    def __init__(self, clients: Clients, spec: RunSpec) -> None:
        self.decided = False  # scenario.stop ends the run
        scenario = spec.scenario
        self._watch = Watch(spec.total, limits_of(scenario), scenario.over_share)
        self._stop = scenario.stop
        self.completed: list[RequestTiming] = []
        self.failures: list[str] = []
        self.issued = array("d")  # when each was issued, or was due; on the clock of time.perf_counter, as `sent`
        self.sent = array("d")  # 0 until its answer has ended
        self.waited_s = 0.0  # from a request's last byte sent to its first token read, of all completed ones
        self._asks: dict[int, Ask] = {}  # that are not answered
        self._clients = clients

    def send(self, asks: Sequence[Ask]) -> None:
        """Send a request for each of `asks`, whose times are on the clock of time.perf_counter."""
        if self.decided:
            return
        number = len(self.issued)
        self.issued.extend(ask.at_s for ask in asks)
        self.sent.extend([0.0] * len(asks))
        self._asks.update(enumerate(asks, number))
        self._clients.send([(number + offset, ask.sample, ask.follows) for offset, ask in enumerate(asks)])

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Record what the clients' messages say of requests that have ended."""
        for message in messages:
            if message.kind == MessageKind.FIRST_TOKEN:
                continue
            ask = self._asks.pop(message.number)
            self.sent[message.number] = message.sent
            if message.kind == MessageKind.DONE:
                times = ask.at_s, message.first, message.last
                timing = RequestTiming(ask.sample, *times, message.amount, message.prompt, ask.session)
                self.completed.append(timing)
                self.waited_s += message.first - message.sent
                self._watch.add(timing)
            else:
                self.failures.append(message.data.decode())
        self.decided = self._watch.ends_run(self._stop)


class Issuer(Requests):
    """Sends the requests of `traffic` when they are due, on a thread that calls `run`. LoadGen has no part in it.

    A request counts from when it was due: that it was sent late is a part of its latency, and the audit tells.
    """

    def __init__(self, clients: Clients, spec: RunSpec, traffic: Traffic) -> None:
        super().__init__(clients, spec)
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
        self.send([ask._replace(at_s=self._began + ask.at_s) for ask in due])

    def on_messages(self, messages: Sequence[Message]) -> None:
        """Record the clients' messages, and let what follows the answers be due."""
        super().on_messages(messages)
        with self._changed:
            before = self._traffic.next_s
            for message in messages:
                if message.kind == MessageKind.DONE:
                    self._traffic.answered(message.number, message.last - self._began, message.amount)
                elif message.kind == MessageKind.FAILED:
                    self._traffic.lost(message.number)
            if self._traffic.next_s < before or self._traffic.ended:
                self._changed.notify()
