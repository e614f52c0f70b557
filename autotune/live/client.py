"""Processes that send LoadGen's queries, and what passes between them and LoadGen's own: records of fixed size.

One process would do for the rates of most servers; several keep each one's event loop short. They are copies of the
process that makes them, so that all share the requests' memory, and they end with it.
"""

import asyncio
import itertools
import json
import os
import selectors
import socket
import struct
import sys
import time
import traceback
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import uvloop

from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.live.stream import Client, Stream, completion
from autotune.system.process import fork

ISSUE = struct.Struct("<II")  # a request's number, its sample
NOTICE = struct.Struct("<BIIddd")  # its kind; number, amount, sent, first, last
BEGIN = 0xFFFFFFFF  # in a request's place: the run begins, forget what the warm-up measured
RECEIVE_BYTES = 1 << 20
ISSUES_BYTES = 2048  # read at once: hundreds of requests that begin together let others' tokens through
TICK_S = 0.02  # how often a process looks at its own lag
TICKS = 25  # after which it reports its tokens


class Notices(IntEnum):
    FIRST_TOKEN = 0
    DONE = 1  # amount: its tokens
    FAILED = 2  # amount: bytes of text that follow, the reason
    GENERATED = 3  # amount: tokens so far, of all requests
    REPORT = 4  # amount: bytes of JSON that follow, a Report


class Notice(NamedTuple):
    """Times are seconds of time.perf_counter(), which all processes share."""

    kind: int
    number: int
    amount: int
    sent: float
    first: float  # 0 before the first token
    last: float
    text: str


@dataclass(frozen=True)
class Report:
    """What a process saw of itself in a run."""

    cpu_s: float
    lag_p99_ms: float  # how late its loop came to timers
    lag_max_ms: float
    unsent_bytes: int  # most that the kernel had not taken


def bodies(samples: Samples) -> list[bytes]:
    """Each sample's request to /v1/completions, ready to send but for the model's name."""
    common = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    found = []
    for prompt, tokens in zip(samples.prompts, samples.output_tokens.tolist(), strict=True):
        length = {"max_tokens": tokens}
        if samples.ignore_eos:
            length |= {"min_tokens": tokens, "ignore_eos": True}
        found.append(json.dumps({**common, **length, "prompt": prompt.tolist()}).encode())
    return found


def requests(url: str, model: str, bodies: Sequence[bytes]) -> list[bytes]:
    """Each of `bodies` as it is sent to the server at `url`."""
    head = json.dumps({"model": model}).encode()[:-1] + b", "
    return [completion(url, head + body[1:]) for body in bodies]


class Clients:
    """`count` processes that send `requests` to the server at `url`. `generated` counts their tokens so far."""

    def __init__(self, count: int, url: str, requests: Sequence[bytes], timeout_s: float, first_tokens: bool) -> None:
        self.reports: dict[int, Report] = {}
        self._generated = [0] * count
        self._selector = selectors.DefaultSelector()
        self._socks: list[socket.socket] = []
        for index in range(count):
            work = partial(_work, url=url, requests=requests, timeout_s=timeout_s, first_tokens=first_tokens)
            sock = fork(work, close=self._socks)
            self._socks.append(sock)
            self._selector.register(sock, selectors.EVENT_READ, index)
        self._unread = [b""] * count
        self._next = 0

    @property
    def generated(self) -> int:
        return sum(self._generated)

    def begin(self) -> None:
        """Measure from here on."""
        for sock in self._socks:
            sock.sendall(ISSUE.pack(BEGIN, 0))

    def send(self, queries: Sequence[tuple[int, int]]) -> None:
        """Send requests: the number by which a notice will name each, and its sample."""
        for offset in range(min(len(queries), len(self._socks))):
            share = queries[offset :: len(self._socks)]
            self._socks[self._next].sendall(b"".join(itertools.starmap(ISSUE.pack, share)))
            self._next = (self._next + 1) % len(self._socks)

    def finish(self) -> None:
        """Ask the processes for their reports, after which they end."""
        for sock in self._socks:
            sock.shutdown(socket.SHUT_WR)

    def notices(self) -> Iterator[list[Notice]]:
        """What the processes say, as it comes, until all have ended. Raises MeasureError if one breaks off."""
        while self._selector.get_map():
            for key, _ in self._selector.select():
                try:
                    data = self._socks[key.data].recv(RECEIVE_BYTES)
                except ConnectionResetError:  # it ended with queries that it had not read
                    data = b""
                if data:
                    yield self._read(key.data, data)
                elif key.data in self.reports:
                    self._selector.unregister(key.fileobj)
                else:
                    raise MeasureError("a client process ended in mid-run")

    def _read(self, index: int, data: bytes) -> list[Notice]:
        data = self._unread[index] + data
        found = []
        at = 0
        while at + NOTICE.size <= len(data):
            kind, number, amount, sent, first, last = NOTICE.unpack_from(data, at)
            end = at + NOTICE.size
            text = ""
            if kind in (Notices.FAILED, Notices.REPORT):
                if end + amount > len(data):
                    break
                text = data[end : end + amount].decode()
                end += amount
            at = end
            if kind == Notices.GENERATED:
                self._generated[index] = amount
            elif kind == Notices.REPORT:
                self.reports[index] = Report(**json.loads(text))
            else:
                found.append(Notice(kind, number, amount, sent, first, last, text))
        self._unread[index] = data[at:]
        return found


def _work(sock: socket.socket, url: str, requests: Sequence[bytes], timeout_s: float, first_tokens: bool) -> None:
    loop = uvloop.new_event_loop()
    _Process(loop, sock, url, requests, timeout_s, first_tokens)
    loop.run_forever()


class _Process:
    """A client process: issues come in at its socket, notices go out, in one write for each turn of the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        url: str,
        requests: Sequence[bytes],
        timeout_s: float,
        first_tokens: bool,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._requests = requests
        self._first_tokens = first_tokens
        self._client = Client(loop, url, timeout_s, self._on_first_token, self._on_end)
        self._unread = b""
        self._out = bytearray()
        self._ticks = 0
        self._begin()
        loop.set_exception_handler(self._on_bug)
        loop.add_reader(sock.fileno(), self._on_issues)
        loop.call_soon(self._tick, time.perf_counter())

    def _begin(self) -> None:
        self._lags = array("d")
        self._began_cpu_s = time.process_time()
        self._client.most_unsent = 0

    def _on_issues(self) -> None:
        data = self._sock.recv(ISSUES_BYTES)
        if not data:
            self._report()
            self._loop.stop()
            return
        data = self._unread + data
        whole = len(data) - len(data) % ISSUE.size
        self._unread = data[whole:]
        for number, sample in ISSUE.iter_unpack(data[:whole]):
            if number == BEGIN:
                self._begin()
            else:
                self._client.start(number, self._requests[sample])

    def _on_first_token(self, stream: Stream) -> None:
        if self._first_tokens:
            self._tell(NOTICE.pack(Notices.FIRST_TOKEN, stream.number, 0, stream.sent, stream.first, stream.last))

    def _on_end(self, stream: Stream, error: str) -> None:
        text = error.encode()
        kind, amount = (Notices.FAILED, len(text)) if error else (Notices.DONE, stream.tokens)
        self._tell(NOTICE.pack(kind, stream.number, amount, stream.sent, stream.first, stream.last) + text)

    def _tick(self, due: float) -> None:
        now = time.perf_counter()
        self._lags.append(max(0.0, now - due))
        self._client.expire()
        self._ticks += 1
        if self._ticks % TICKS == 0:
            self._tell(NOTICE.pack(Notices.GENERATED, 0, self._client.events, 0.0, 0.0, 0.0))
        self._loop.call_later(TICK_S, self._tick, now + TICK_S)

    def _report(self) -> None:
        lags = np.array(self._lags or [0.0]) * 1e3
        cpu_s = time.process_time() - self._began_cpu_s
        report = Report(cpu_s, float(np.percentile(lags, 99)), float(lags.max()), self._client.most_unsent)
        text = json.dumps(asdict(report)).encode()
        self._tell(NOTICE.pack(Notices.REPORT, 0, len(text), 0.0, 0.0, 0.0) + text)
        self._flush()

    def _tell(self, notice: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += notice

    def _flush(self) -> None:
        if self._out:
            self._sock.sendall(self._out)
            self._out.clear()

    def _on_bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End at once: LoadGen's process sees it, and the run fails."""
        error = context.get("exception")
        if not isinstance(error, BrokenPipeError | ConnectionResetError):  # LoadGen's process has ended
            traceback.print_exception(error) if error else print(context["message"], file=sys.stderr)
        os._exit(1)
