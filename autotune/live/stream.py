"""A client for streamed completions, HTTP/1.1 on one event loop: it reads no more of an answer than is measured."""

import asyncio
import errno
import os
import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

EVENT = b"\ndata: {"  # JSON holds no raw newline, so text that a model generates can't look like this
TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)")
TAIL_BYTES = 512  # enough for the last event, which holds the usage
HEAD_BYTES = 65536  # no server's head is longer
RECEIVE_BYTES = 4096  # some twenty events; Python takes that much memory for each read
LINE_END = 2  # a chunk is followed by one, and counted with it here
WORDS_BYTES = 300  # of an answer that is an error


def completion(url: str, body: bytes) -> bytes:
    """A POST of `body` (JSON) to vLLM's /v1/completions, ready to send."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Stream:
    """A request and what its answer has shown so far. Times are seconds of time.perf_counter()."""

    __slots__ = ("deadline", "first", "last", "number", "request", "sent", "status", "tail")

    def __init__(self, number: int, request: bytes) -> None:
        self.number = number
        self.request = request
        self.deadline = 0.0
        self.sent = self.first = self.last = 0.0  # last byte written; first event, last bytes read
        self.status = 0
        self.tail = b"\n"

    @property
    def tokens(self) -> int:
        """Generated tokens as the server counts them; 0 unless it reported them with status 200."""
        found = TOKENS.findall(self.tail)
        return int(found[-1]) if found and self.status == 200 else 0

    def words(self) -> str:
        return self.tail.decode(errors="replace").strip()[:WORDS_BYTES]

    def read(self, body: bytes, now: float) -> int:
        """Take the next bytes of the answer's body; returns how many events begin in them."""
        text = self.tail + body
        events = text.count(EVENT, max(0, len(self.tail) - len(EVENT) + 1))
        self.tail = text[-TAIL_BYTES:]
        self.last = now
        return events


class Client:
    """Sends requests to one server, each on a connection of its own while it lasts.

    `on_first_token(stream)` is called once for each that gets an event, then `on_end(stream, error)`; the error
    holds the server's words, and is empty for a stream that ended with a count of generated tokens.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        url: str,
        timeout_s: float,
        on_first_token: Callable[[Stream], None],
        on_end: Callable[[Stream, str], None],
    ) -> None:
        parts = urlsplit(url)
        self.loop = loop
        self.address = (parts.hostname, parts.port or 80)
        self.events = 0  # so far, of requests that go on, too; vLLM puts a token in each
        self.unsent = 0  # bytes of requests that the kernel has not taken
        self.most_unsent = 0
        self._timeout_s = timeout_s
        self._on_first_token = on_first_token
        self._on_end = on_end
        self._idle: list[Connection] = []
        self._running: dict[Stream, Connection] = {}  # the oldest first

    def start(self, number: int, request: bytes) -> None:
        """Send `request`, which the callbacks will know as `number`."""
        stream = Stream(number, request)
        if self._idle:
            self._run(stream, self._idle.pop())
        else:
            self._run_anew(stream)

    def expire(self) -> None:
        """Give up what is past its time-out; call it now and then."""
        now = time.perf_counter()
        while self._running:
            stream, connection = next(iter(self._running.items()))
            if stream.deadline > now:
                return
            connection.close()
            self._end(stream, f"request failed: TimeoutError after {self._timeout_s:g} s")

    def read(self, stream: Stream, body: bytes, now: float) -> None:
        """Bytes of the answer's body have come."""
        events = stream.read(body, now)
        if events and stream.status == 200:
            self.events += events
            if not stream.first:
                stream.first = now
                self._on_first_token(stream)

    def whole(self, stream: Stream, connection: "Connection", keep: bool) -> None:
        """`stream` has ended; its connection takes another, if the server keeps it."""
        if keep:
            self._idle.append(connection)
        else:
            connection.close()
        self._end(stream, "" if stream.tokens else f"vLLM answered {stream.status}: {stream.words()}")

    def lost(self, stream: Stream | None, connection: "Connection", error: str) -> None:
        """`connection` has failed in mid-stream, or ended while it was idle."""
        connection.close()
        if stream is None:
            self._idle.remove(connection)
        elif connection.used and not stream.status:  # idle too long for the server, which closed it as we took it
            del self._running[stream]
            self._run_anew(stream)
        else:
            self._end(stream, f"request failed: {error}")

    def _run_anew(self, stream: Stream) -> None:
        try:
            connection = Connection(self)
        except OSError as error:  # too many open files
            self._on_end(stream, f"request failed: {_named(error)}")
        else:
            self._run(stream, connection)

    def _run(self, stream: Stream, connection: "Connection") -> None:
        stream.deadline = time.perf_counter() + self._timeout_s
        self._running[stream] = connection
        connection.send(stream)

    def _end(self, stream: Stream, error: str) -> None:
        del self._running[stream]
        self._on_end(stream, error)


class Connection:
    """One socket; one request at a time."""

    __slots__ = (
        *("_client", "_sock", "_fd", "_connected", "_stream", "_to_send"),
        *("_held", "_keep", "_chunked", "_left", "used"),
    )

    def __init__(self, client: Client) -> None:
        self.used = False  # whether it has brought an answer
        self._client = client
        self._sock = socket.socket()
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Else each read sends an acknowledgement, a third of its cost; vLLM waits for none (TCP_NODELAY).
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        self._fd = self._sock.fileno()
        self._connected = False
        self._stream: Stream | None = None
        self._to_send = memoryview(b"")
        self._held = b""  # read, but not whole: of the head, or of the line with a chunk's size
        self._keep = False  # whether the server takes another request after this
        self._chunked = False
        self._left: int | None = None  # bytes of the body, or of a chunk and its line end; None: until it closes

    def send(self, stream: Stream) -> None:
        self._stream = stream
        self._to_send = memoryview(stream.request)
        self._client.unsent += len(stream.request)
        if self._connected:
            self._write()
            return
        code = self._sock.connect_ex(self._client.address)
        if code == errno.EINPROGRESS:
            self._client.loop.add_writer(self._fd, self._on_connected)
        else:
            self._begin(code)

    def close(self) -> None:
        self._client.unsent -= len(self._to_send)
        self._client.loop.remove_reader(self._fd)
        self._client.loop.remove_writer(self._fd)
        self._sock.close()

    def _on_connected(self) -> None:
        self._client.loop.remove_writer(self._fd)
        self._begin(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _begin(self, code: int) -> None:
        if code:
            self._lose(_named(OSError(code, os.strerror(code))))
            return
        self._connected = True
        self._client.loop.add_reader(self._fd, self._on_readable)
        self._write()

    def _write(self) -> None:
        assert self._stream
        try:
            sent = self._sock.send(self._to_send)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._lose(_named(error))
            return
        self._to_send = self._to_send[sent:]
        self._client.unsent -= sent
        if not self._to_send:
            self._stream.sent = time.perf_counter()
            return
        self._client.most_unsent = max(self._client.most_unsent, self._client.unsent)
        self._client.loop.add_writer(self._fd, self._on_writable)

    def _on_writable(self) -> None:
        self._client.loop.remove_writer(self._fd)
        self._write()

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(_named(error))
            return
        now = time.perf_counter()
        stream = self._stream
        if not data and stream and stream.status and self._left is None:  # such a body ends so
            self._end(keep=False)
        elif not data or stream is None:
            self._lose("ConnectionError: the server closed the connection in mid-answer")
        else:
            try:
                self._read(stream, data, now)
            except ValueError:
                self._lose(f"no HTTP in the answer: {data[:80]!r}")

    def _read(self, stream: Stream, data: bytes, now: float) -> None:
        """Raises ValueError where `data` is not HTTP."""
        if not stream.status:
            data = self._held + data
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                if len(data) > HEAD_BYTES:
                    raise ValueError
                self._held = data
                return
            self._read_head(stream, data[: end - 2].lower())
            data = data[end:]
        if self._chunked:
            self._read_chunks(stream, data, now)
        elif self._left is None:
            self._client.read(stream, data, now)
        else:
            self._client.read(stream, data[: self._left], now)
            self._left -= len(data)
            if self._left <= 0:
                self._end(self._keep and self._left == 0)

    def _read_head(self, stream: Stream, head: bytes) -> None:
        if not head.startswith(b"http/1."):
            raise ValueError
        stream.status = int(head[9:12])
        self._keep = head.startswith(b"http/1.1") and b"\r\nconnection: close\r\n" not in head
        self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in head
        length = LENGTH.search(head)
        self._left = 0 if self._chunked else int(length[1]) if length else None
        self._held = b""

    def _read_chunks(self, stream: Stream, data: bytes, now: float) -> None:
        if self._held:
            data = self._held + data
            self._held = b""
        at, left = 0, self._left or 0
        while at < len(data):
            if not left:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._held = data[at:]
                    break
                size = int(data[at:end].partition(b";")[0], 16)
                at = end + LINE_END
                if not size:
                    self._end(self._keep and data[at:] == b"\r\n")
                    return
                left = size + LINE_END
            self._client.read(stream, data[at : max(at, at + left - LINE_END)], now)
            there = min(left, len(data) - at)
            at += there
            left -= there
        self._left = left

    def _end(self, keep: bool) -> None:
        stream, self._stream = self._stream, None
        assert stream
        self.used = True
        self._client.whole(stream, self, keep)

    def _lose(self, error: str) -> None:
        stream, self._stream = self._stream, None
        self._client.lost(stream, self, error)


def _named(error: OSError) -> str:
    return f"{type(error).__name__} {error}"
