"""Client processes, which send LoadGen's queries, and the records of fixed size between them and LoadGen's process.

One process would do for the rates of most servers; with several, each event loop has less to do. They are forks of
one process, so that all share the requests' memory, and they end with it. They outlive a run: the next one finds them
and their connections as the last one left them.
"""

import asyncio
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import uvloop

from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.live.load_generator import RunSpec
from autotune.live.stream import Client, Stream, completion
from autotune.system.process import fork

ISSUE = struct.Struct("<IIi")  # to a client process: a request's number, its sample, the number of the one it continues
MESSAGE = struct.Struct("<BIIIIddd")  # from one: a Message's fields, with its data's length in bytes, then the data
# In place of a request's number: the run begins, forget the warm-up's figures (its sample: whether first tokens are to
# be reported); the run has ended, drop what is still under way and report.
BEGIN, END = 0xFFFFFFFF, 0xFFFFFFFE
RECEIVE_BYTES = 1 << 20
PROMPT, MESSAGES = "prompt", "messages"  # fields of a request
ISSUES_BYTES = 2048  # read at a time: among hundreds of requests that begin together, tokens are read in between
TICK_S = 0.02  # between two measurements of a process's lag
TICKS = 25  # after which it reports its tokens


class MessageKind(IntEnum):
    FIRST_TOKEN = 0  # data: its id, if answers are kept
    DONE = 1  # amount: the request's tokens; data: their ids, if answers are kept
    FAILED = 2  # data: text, the reason
    GENERATED = 3  # amount: tokens so far, of all requests
    REPORT = 4  # data: JSON, a ProcessReport


class Message(NamedTuple):
    """A client process's message about a request; times are seconds of time.perf_counter(), one clock for all."""

    kind: int  # a MessageKind
    number: int  # the request's
    amount: int
    prompt: int  # the tokens of a request's prompt, once it has ended
    sent: float  # its last byte
    first: float  # first token read; 0 before
    last: float  # last bytes read
    data: bytes  # ids are int32


@dataclass(frozen=True)
class ProcessReport:
    """A client process's figures of itself in a run."""

    cpu_s: float
    lag_p99_ms: float  # by which its event loop ran timers late
    unsent_bytes: int  # of requests that the kernel had not taken yet, at most
    waiting: int  # requests that waited for a connection, at most


def bodies(samples: Samples) -> Callable[[int], bytes]:
    """A function that has each sample's request to vLLM by its number: JSON without the model's name.

    All are made now, but a trace's only when they are due: they would fill the memory.
    """
    common = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}

    def body(number: int) -> bytes:
        tokens = int(samples.output_tokens[number])
        length = {"max_tokens": tokens, "min_tokens": min(tokens, samples.min_tokens)}
        if samples.ignore_eos:
            length |= {"min_tokens": tokens, "ignore_eos": True}
        if samples.messages is None:
            prompt = {PROMPT: samples.prompts[number].tolist()}
        else:
            prompt = {MESSAGES: json.loads(samples.messages[number])}
        return json.dumps({**common, **length, **prompt}).encode()  # the prompt last: later turns put theirs into it

    return body if samples.arrivals is not None else list(map(body, range(len(samples)))).__getitem__


class Clients:
    """Client processes for a run's server, which send the requests of `samples`, whose `bodies` are made.

    They serve run after run, each of which may be made by a fork of the process that started them.
    """

    def __init__(self, spec: RunSpec, bodies: Callable[[int], bytes], samples: Samples) -> None:
        count = spec.client_processes
        self.reports: dict[int, ProcessReport] = {}  # by process, once the run has ended
        self._generated = [0] * count
        self._socks: list[socket.socket] = []
        self._pids: list[int] = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            with theirs:
                self._pids.append(fork(partial(_work, theirs, spec, bodies, samples)))
            self._socks.append(ours)
        self._unread = [b""] * count
        self._next = 0
        self._continues = samples.continues
        self._homes: dict[int, int] = {}  # the process that has a turn, by its number, until the next one is sent
        self._sending = threading.Lock()  # no message is cut in two, and none comes after END
        self._ended = False

    @property
    def generated(self) -> int:
        """Tokens of the run so far, of all requests."""
        return sum(self._generated)

    def begin(self, first_tokens: bool) -> None:
        """Begin the run: the processes' reports are about what follows. They report `first_tokens`, or none."""
        self._homes.clear()
        for sock in self._socks:
            sock.sendall(ISSUE.pack(BEGIN, first_tokens, 0))

    def send(self, queries: Sequence[tuple[int, int, int]]) -> None:
        """Send requests; none after `finish`. Raises OSError if a process has ended.

        Each is given as the number by which messages will name it, its sample, and the number of the one whose answer
        it continues, or -1. That one's process has the answer.
        """
        parts = [bytearray() for _ in self._socks]
        with self._sending:
            for number, sample, follows in queries if not self._ended else ():
                home = self._homes.pop(follows, self._next)
                if home == self._next:
                    self._next = (self._next + 1) % len(self._socks)
                if self._continues[sample]:
                    self._homes[number] = home
                parts[home] += ISSUE.pack(number, sample, follows)
            for sock, part in zip(self._socks, parts, strict=True):
                if part:
                    sock.sendall(part)

    def finish(self) -> None:
        """End the run: the processes drop what is under way, and report."""
        with self._sending:
            if not self._ended:
                self._ended = True
                for sock in self._socks:
                    sock.sendall(ISSUE.pack(END, 0, 0))

    def close(self) -> None:
        """End the processes."""
        for sock, pid in zip(self._socks, self._pids, strict=True):
            sock.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def messages(self) -> Iterator[list[Message]]:
        """Yield the processes' messages as they arrive, until all have reported. Raises MeasureError if one dies."""
        with selectors.DefaultSelector() as selector:
            for index, sock in enumerate(self._socks):
                selector.register(sock, selectors.EVENT_READ, index)
            while len(self.reports) < len(self._socks):
                for key, _ in selector.select():
                    try:
                        data = self._socks[key.data].recv(RECEIVE_BYTES)
                    except ConnectionResetError:  # it died with queries unread
                        data = b""
                    if not data:
                        raise MeasureError("a client process ended in mid-run")
                    yield self._read(key.data, data)

    def _read(self, index: int, data: bytes) -> list[Message]:
        data = self._unread[index] + data
        messages = []
        at = 0
        while at + MESSAGE.size <= len(data):
            kind, number, amount, prompt, size, sent, first, last = MESSAGE.unpack_from(data, at)
            begin = at + MESSAGE.size
            if begin + size > len(data):
                break
            at = begin + size
            if kind == MessageKind.GENERATED:
                self._generated[index] = amount
            elif kind == MessageKind.REPORT:
                self.reports[index] = ProcessReport(**json.loads(data[begin:at]))
            else:
                messages.append(Message(kind, number, amount, prompt, sent, first, last, data[begin:at]))
        self._unread[index] = data[at:]
        return messages


def _work(sock: socket.socket, spec: RunSpec, bodies: Callable[[int], bytes], samples: Samples) -> None:
    _Process(sock, spec, bodies, samples).loop.run_forever()


class _Process:
    """A client process: reads issues from its socket and writes messages, once in each turn of its event loop."""

    def __init__(self, sock: socket.socket, spec: RunSpec, bodies: Callable[[int], bytes], samples: Samples) -> None:
        self.loop, self._sock = uvloop.new_event_loop(), sock
        self._url, self._bodies, self._samples = spec.url, bodies, samples
        self._turns: dict[int, int] = {}  # the samples of turns under way that another one continues, by their numbers
        self._said: dict[int, bytes] = {}  # the prompts and answers of those that have ended, as in their JSON list
        self._chat = samples.messages is not None
        ids = {"return_token_ids": True} if spec.keep_answers and not self._chat else {}
        self._before = json.dumps({"model": spec.model, **ids}).encode()[:-1] + b", "
        self._list = f'"{MESSAGES if self._chat else PROMPT}": ['.encode()  # no text has this, its quotes are escaped
        self._in_run = self._first_tokens = False
        self._client = Client(
            self.loop,
            spec.url,
            spec.request_timeout_s,
            self._on_first_token,
            self._on_end,
            max(1, spec.connections // spec.client_processes),
            spec.keep_answers,
            self._chat,
        )
        self._unread = b""
        self._out = bytearray()
        self.loop.set_exception_handler(self._on_bug)
        self.loop.add_reader(sock.fileno(), self._on_issues)
        self.loop.call_soon(self._tick, time.perf_counter())

    def _begin(self, first_tokens: bool) -> None:
        self._in_run, self._first_tokens = True, first_tokens
        self._turns.clear()
        self._said.clear()
        self._lags = array("d")
        self._began_cpu_s = time.process_time()
        self._client.events = self._client.most_unsent = self._client.most_waiting = 0

    def _end(self) -> None:
        self._in_run = False
        self._client.drop()
        self._report()

    def _on_issues(self) -> None:
        data = self._sock.recv(ISSUES_BYTES)
        if not data:  # nobody is left to ask for a run
            self.loop.stop()
            return
        data = self._unread + data
        whole = len(data) - len(data) % ISSUE.size
        self._unread = data[whole:]
        for number, sample, follows in ISSUE.iter_unpack(data[:whole]):
            if number == BEGIN:
                self._begin(first_tokens=bool(sample))
            elif number == END:
                self._end()
            else:
                self._client.start(number, self._request(number, sample, follows))

    def _request(self, number: int, sample: int, follows: int) -> bytes:
        if self._samples.continued and self._samples.continues[sample]:
            self._turns[number] = sample
        body = self._bodies(sample)
        if (said := self._said.pop(follows, None)) is not None:
            head, added = body.split(self._list, 1)
            body = head + self._list + said + added
        return completion(self._url, self._before + body[1:], self._chat)

    def _keep(self, stream: Stream, sample: int) -> None:
        """Keep what the next turn's prompt begins with."""
        prompt = stream.request.split(self._list, 1)[1].removesuffix(b"]}")
        if stream.ids is None:
            answer = b'{"role": "assistant", "content": "%b"}' % bytes(stream.said)
        else:
            ids = stream.ids[: self._samples.kept(sample, stream.tokens)].tolist()
            answer = str(ids)[1:-1].encode()
        self._said[stream.number] = b"%b, %b, " % (prompt, answer) if answer else prompt + b", "

    def _on_first_token(self, stream: Stream) -> None:
        if self._first_tokens:
            self._tell(MessageKind.FIRST_TOKEN, stream, 0, stream.ids[:1].tobytes() if stream.ids else b"")

    def _on_end(self, stream: Stream, error: str) -> None:
        sample = self._turns.pop(stream.number, None)
        if sample is not None and not error:
            self._keep(stream, sample)
        if error:
            self._tell(MessageKind.FAILED, stream, 0, error.encode())
        else:
            self._tell(MessageKind.DONE, stream, stream.tokens, stream.ids.tobytes() if stream.ids else b"")

    def _tell(self, kind: MessageKind, stream: Stream, amount: int, data: bytes) -> None:
        times = stream.sent, stream.first, stream.last
        self._send(MESSAGE.pack(kind, stream.number, amount, stream.prompt_tokens, len(data), *times) + data)

    def _tick(self, due: float) -> None:
        now = time.perf_counter()
        self._client.expire()
        if self._in_run:  # else nobody may read it
            self._lags.append(max(0.0, now - due))
        if self._in_run and len(self._lags) % TICKS == 0:
            self._send(MESSAGE.pack(MessageKind.GENERATED, 0, self._client.generated, 0, 0, 0.0, 0.0, 0.0))
        self.loop.call_later(TICK_S, self._tick, now + TICK_S)

    def _report(self) -> None:
        lag_p99_ms = float(np.percentile(self._lags or [0.0], 99)) * 1e3
        cpu_s = time.process_time() - self._began_cpu_s
        report = ProcessReport(cpu_s, lag_p99_ms, self._client.most_unsent, self._client.most_waiting)
        data = json.dumps(asdict(report)).encode()
        self._send(MESSAGE.pack(MessageKind.REPORT, 0, 0, 0, len(data), 0.0, 0.0, 0.0) + data)

    def _send(self, message: bytes) -> None:
        if not self._out:
            self.loop.call_soon(self._flush)
        self._out += message

    def _flush(self) -> None:
        """Write what the socket takes now; uvloop has made it non-blocking."""
        with suppress(BlockingIOError):
            del self._out[: self._sock.send(self._out)]
        if self._out:
            self.loop.add_writer(self._sock.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        self.loop.remove_writer(self._sock.fileno())
        self._flush()

    def _on_bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End at once: LoadGen's process notices it, and the run fails."""
        error = context.get("exception")
        if not isinstance(error, BrokenPipeError | ConnectionResetError):  # else LoadGen's process has ended
            traceback.print_exception(error) if error else print(context["message"], file=sys.stderr)
        os._exit(1)
