"""A client for streamed completions, HTTP/1.1 on one event loop.

It counts events, and parses none but the last; where answers are kept, their token ids, or a chat's texts, are parsed
once they have ended.
"""

import asyncio
import re
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httptools

from autotune.live import key

EVENT = b"\ndata: {"  # JSON has no raw newline, so generated text can't look like this
# In a chat's event, the beginning of what it says of a token: nothing, where a parser keeps the text back. Just before
# the first token vLLM sends an event with the role, which has none.
DELTA = re.compile(rb'"delta":\s*\{\s*(?:"(?!role")\w+"|\})')
DELTA_BYTES = 64  # at least as long as such a beginning
CONTENT = re.compile(rb'"content":\s*"([^"\\]*(?:\\.[^"\\]*)*)"')  # its text, escaped as in JSON; not that of reasoning
TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')
# Of one event, with return_token_ids; the first has `prompt_token_ids`, too. In a text their quotes are escaped.
IDS = re.compile(rb'"token_ids":\s*\[\s*(\d[^\]]*)\]')
TAIL_BYTES = 512  # enough for the last event, which holds the usage
KEPT_BYTES = 1 << 16  # of an answer whose events are kept, before they are parsed in mid-stream to save memory
ERROR_BYTES = 300  # that are kept of an answer that is an error
CLOSED = "ConnectionError: the server closed the connection in mid-answer"


def completion(url: str, body: bytes, chat: bool = False) -> bytes:
    """A POST of `body` (JSON) to vLLM's /v1/completions, or its chat endpoint, ready to send."""
    return b"%bContent-Length: %d\r\n\r\n%b" % (_head(url, chat), len(body), body)


@cache
def _head(url: str, chat: bool) -> bytes:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n{key.header(url)}\r\n"
    return f"{head}Content-Type: application/json\r\n".encode()


class Stream:
    """A request and the progress of its answer. Times are seconds of time.perf_counter(), 0 before."""

    def __init__(self, number: int, request: bytes, keep: bool = False, chat: bool = False) -> None:
        self.number = number
        self.request = request
        self._keep, self._chat = keep, chat
        # Generated tokens and a chat's text, escaped as in JSON, once `parse` has found them.
        self.ids: array[int] | None = array("i") if keep and not chat else None
        self.said = bytearray()
        self._kept = bytearray()  # what is not parsed yet
        self.deadline = 0.0
        self.sent = self.first = self.last = 0.0  # last byte written; first event, last bytes read
        self.status = 0
        self.tail = b"\n"
        self.events = 0
        self.tokens = self.prompt_tokens = 0  # once it has ended: as the server counts them, with status 200

    def read(self, body: bytes, now: float) -> int:
        """Take the next bytes of the answer; returns how many events begin in them, of a chat those with a token."""
        text, old = self.tail + body, len(self.tail)
        if self._chat:
            events = sum(found.end() > old for found in DELTA.finditer(text, max(0, old - DELTA_BYTES)))
        else:
            events = text.count(EVENT, max(0, old - len(EVENT) + 1))
        self.tail = text[-TAIL_BYTES:]
        self.last = now
        if self._keep:
            self._kept += body
            if not self.first or len(self._kept) > KEPT_BYTES:
                self.parse()
        return events

    def end(self) -> str:
        """Take in the last event; returns what is wrong with the answer, empty if it has a count of tokens."""
        if self.status == 200:
            found = [[0, *name.findall(self.tail)] for name in (TOKENS, PROMPT_TOKENS)]
            self.tokens, self.prompt_tokens = (int(counts[-1]) for counts in found)
        if self._keep:
            self.parse()
        if not self.tokens:
            return f"vLLM answered {self.status}: {self.tail.decode(errors='replace').strip()[:ERROR_BYTES]}"
        if self.ids is not None and len(self.ids) != self.tokens:
            return f"vLLM counted {self.tokens} tokens and sent the ids of {len(self.ids)}"
        return "" if self.first else f"vLLM counted {self.tokens} tokens and no event with one was seen"

    def parse(self) -> None:
        """Find the token ids, or the text, of the events that are whole."""
        whole, _, self._kept = self._kept.rpartition(b"\n")
        if self.ids is None:
            self.said += b"".join(CONTENT.findall(whole))
            return
        for ids in IDS.findall(whole):
            self.ids.extend(map(int, ids.split(b",")))


class Client:
    """Sends requests to one server, each on a connection that it has to itself until its answer has ended.

    There are at most `connections`; requests beyond wait here, in order, and their time-out does not begin before they
    are sent. With `keep`, streams have the token ids of their answers, which the requests must have asked for, or, with
    `chat`, the texts.

    Calls `on_first_token(stream)` at a stream's first event, if it gets one, and `on_end(stream, error)` at its end;
    `error` quotes the server, and is empty for a stream that ended with a count of generated tokens.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        url: str,
        timeout_s: float,
        on_first_token: Callable[[Stream], None],
        on_end: Callable[[Stream, str], None],
        connections: int = 1024,
        keep: bool = False,
        chat: bool = False,
    ) -> None:
        parts = urlsplit(url)
        self.loop = loop
        self.address = (str(parts.hostname), parts.port or 80)
        self.events = 0  # so far, of all requests
        self._ended = [0, 0]  # tokens and events of answers that have ended, those of earlier runs, too
        self.unsent = 0  # bytes of requests that the kernel has not taken yet
        self.most_unsent = self.most_waiting = 0
        self._keep, self._chat = keep, chat
        self._connections = connections
        self._waiting: deque[Stream] = deque()
        self._timeout_s = timeout_s
        self._on_first_token = on_first_token
        self._on_end = on_end
        self._idle: list[Connection] = []
        self._running: dict[Stream, Connection] = {}  # oldest first

    @property
    def generated(self) -> int:
        """Tokens so far, of all requests; an event may have several (stream_interval, speculation), or none."""
        tokens, events = self._ended
        return round(self.events * tokens / events) if events else self.events

    def start(self, number: int, request: bytes) -> None:
        """Send `request`; its stream has this `number`."""
        self._waiting.append(Stream(number, request, self._keep, self._chat))
        self._send_waiting()
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def expire(self) -> None:
        """End the streams that are past their time-out; to be called regularly."""
        now = time.perf_counter()
        while self._running:
            stream, connection = next(iter(self._running.items()))
            if stream.deadline > now:
                return
            connection.close()
            self._end(stream, f"request failed: TimeoutError after {self._timeout_s:g} s")

    def drop(self) -> None:
        """Forget the streams that still run: the server sees their connections close."""
        for connection in self._running.values():
            connection.close()
        self._running.clear()
        self._waiting.clear()

    def read(self, stream: Stream, body: bytes, now: float) -> None:
        """Take bytes of an answer's body, read at `now`."""
        events = stream.read(body, now)
        if stream.status == 200:
            self.events += events
            stream.events += events
            if not stream.first and (events if stream.ids is None else stream.ids):
                stream.first = now
                self._on_first_token(stream)

    def finish(self, stream: Stream, connection: "Connection", keep: bool) -> None:
        """End `stream`, whose answer is complete; `keep` its connection for another if the server does."""
        if keep:
            self._idle.append(connection)
        else:
            connection.close()
        self._end(stream, stream.end())

    def lose(self, stream: Stream | None, connection: "Connection", error: str) -> None:
        """Give up `connection`, which has failed in mid-stream, or was closed while it was idle."""
        connection.close()
        if stream is None:
            self._idle.remove(connection)
        elif connection.used and not stream.status:  # the server closed it, idle for too long, as we took it
            del self._running[stream]
            self._run(stream, Connection(self))
        else:
            self._end(stream, f"request failed: {error}")

    def _send_waiting(self) -> None:
        while self._waiting and len(self._running) < self._connections:
            self._run(self._waiting.popleft(), self._idle.pop() if self._idle else Connection(self))

    def _run(self, stream: Stream, connection: "Connection") -> None:
        stream.deadline = time.perf_counter() + self._timeout_s
        self._running[stream] = connection
        connection.send(stream)

    def _end(self, stream: Stream, error: str) -> None:
        del self._running[stream]
        if not error:
            self._ended = [self._ended[0] + stream.tokens, self._ended[1] + stream.events]
        self._on_end(stream, error)
        self._send_waiting()


class Connection(asyncio.Protocol):
    """A connection, opened for its first request; one request at a time."""

    __slots__ = ("_client", "_framed", "_now", "_opening", "_parser", "_stream", "_transport", "_unsent", "used")

    def __init__(self, client: Client) -> None:
        self.used = False  # whether it has carried an answer
        self._client = client
        self._transport: Any = None
        self._stream: Stream | None = None
        self._unsent = 0  # bytes of its request
        self._parser: httptools.HttpResponseParser | None = None  # of one answer
        self._framed = False  # whether the answer says where its body ends; else the connection's end does
        self._now = 0.0
        self._opening: asyncio.Task[None] | None = client.loop.create_task(self._open())

    def send(self, stream: Stream) -> None:
        self._stream = stream
        self._parser, self._framed = httptools.HttpResponseParser(self), False
        if self._transport:
            self._write(stream)

    def close(self) -> None:
        """Close it; nothing more is heard of it."""
        if self._opening:
            self._opening.cancel()
        if self._transport:
            self._transport.abort()
        self._client.unsent -= self._unsent
        self._unsent, self._stream = 0, None
        self._transport = self._parser = self._opening = None  # they refer to it, and nothing collects cycles here

    async def _open(self) -> None:
        try:
            await self._client.loop.create_connection(lambda: self, *self._client.address)
            self._opening = None
        except OSError as error:
            self._lose(_named(error))

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(0)  # resume_writing tells that the kernel has taken all
        # Else each read sends an acknowledgement, a third of the read's cost; vLLM waits for none (TCP_NODELAY).
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        assert self._stream
        self._write(self._stream)

    def _write(self, stream: Stream) -> None:
        self._transport.write(stream.request)
        self._unsent = self._transport.get_write_buffer_size()
        if not self._unsent:
            stream.sent = time.perf_counter()
        self._client.unsent += self._unsent
        self._client.most_unsent = max(self._client.most_unsent, self._client.unsent)

    def resume_writing(self) -> None:
        self._client.unsent -= self._unsent
        self._unsent = 0
        if self._stream:
            self._stream.sent = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if not self._parser or not self._stream:
            self._lose(CLOSED)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:  # an error of our own
            raise
        except httptools.HttpParserError:
            if self._stream:  # else the answer has ended before this
                self._lose(f"no HTTP in the answer: {data[:80]!r}")

    def connection_lost(self, error: Exception | None) -> None:
        if not self._transport:  # we have closed it
            return
        if not error and self._stream and self._stream.status and not self._framed:
            self._now = time.perf_counter()
            self._end(keep=False)
        else:
            self._lose(_named(error) if error else CLOSED)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        assert self._stream and self._parser
        self._stream.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        assert self._stream
        self._client.read(self._stream, body, self._now)

    def on_message_complete(self) -> None:
        assert self._parser
        self._end(self._framed and self._parser.should_keep_alive())

    def _end(self, keep: bool) -> None:
        stream, self._stream = self._stream, None
        assert stream
        self.used = True
        self._client.finish(stream, self, keep)

    def _lose(self, error: str) -> None:
        self._client.lose(self._stream, self, error)


def _named(error: Exception) -> str:
    return f"{type(error).__name__} {error}"
