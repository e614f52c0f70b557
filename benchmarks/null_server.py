"""A server without a model: streams canned tokens as vLLM does, so that a client can be measured alone.

python benchmarks/null_server.py --port 8000 [--slots 64] [--step-ms 10] [--hold 1000]

At most `slots` requests run at a time, the others wait; a request's first token goes out as soon as it runs, then one
in each step. With `hold`, nothing runs before so many requests are there. Asked for them, it sends token ids as vLLM
does. GET /stats says what was done so far.
"""

import argparse
import asyncio
import json
import re
import resource
import time
from collections import deque
from dataclasses import dataclass, field

import uvloop

LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens":\s*(\d+)')
PROMPT = re.compile(rb'"prompt":\s*(\[(\d+)[^\]]*\])')
IDS_ASKED = re.compile(rb'"return_token_ids":\s*true')
MODEL = "canned"


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def event(**fields: object) -> bytes:
    common = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1764000000, "model": MODEL}
    return b"data: " + json.dumps({**common, **fields}, separators=(",", ":")).encode() + b"\n\n"


CHOICE = {"index": 0, "text": " token", "logprobs": None, "finish_reason": None, "stop_reason": None}
TOKEN = event(choices=[CHOICE], usage=None)
TOKEN_AND_ID = event(choices=[{**CHOICE, "token_ids": [1234]}], usage=None)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def ending(prompt: int, tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}
    return chunk(event(choices=[], usage=usage)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@dataclass(eq=False)
class Request:
    transport: asyncio.Transport
    tokens: int
    first_id: int  # of its prompt
    ids_asked: bool
    prompt: bytes  # JSON
    received: float  # time.perf_counter(), as all times
    first_sent: float = 0.0
    sent: int = 0


@dataclass
class Engine:
    slots: int
    step_s: float
    hold: int
    received: int = 0
    finished: int = 0
    tokens: int = 0
    connections: int = 0
    most_connections: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)

    def add(self, request: Request) -> None:
        self.received += 1
        self.waiting.append(request)
        self.admit()

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.slots and self.received >= self.hold:
            request = self.waiting.popleft()
            request.first_sent = time.perf_counter()
            request.transport.write(STREAM_HEAD)
            self.running.append(request)
            self.generate(request)

    def generate(self, request: Request) -> None:
        request.sent += 1
        self.tokens += 1
        last = request.sent == request.tokens
        token = TOKEN_AND_ID if request.ids_asked else TOKEN
        if request.ids_asked and request.sent == 1:
            token = token.replace(b'"token_ids"', b'"prompt_token_ids":%b,"token_ids"' % request.prompt)
        end = ending(request.prompt.count(b",") + 1, request.tokens) if last else b""
        request.transport.write(chunk(token) + end)
        if last:
            self.running.remove(request)
            self.ended.append(request)
            self.finished += 1

    async def run(self) -> None:
        due = time.perf_counter()
        while True:
            due = max(due + self.step_s, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            for request in list(self.running):
                self.generate(request)
            self.admit()

    def stats(self) -> bytes:
        counts = {name: getattr(self, name) for name in ("received", "finished", "tokens", "most_connections")}
        return json.dumps({**counts, "cpu_s": time.process_time(), "at": time.perf_counter()}).encode()


class Protocol(asyncio.Protocol):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.data = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.engine.connections += 1
        self.engine.most_connections = max(self.engine.most_connections, self.engine.connections)

    def connection_lost(self, _: Exception | None) -> None:
        self.engine.connections -= 1

    def data_received(self, data: bytes) -> None:
        self.data += data
        end = self.data.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        length = LENGTH.search(self.data, 0, end)
        whole = end + (int(length[1]) if length else 0)
        if len(self.data) < whole:
            return
        path, body, self.data = self.data.split(b" ", 2)[1], self.data[end:whole], self.data[whole:]
        if path == b"/v1/completions":
            tokens, prompt, asked = MAX_TOKENS.search(body), PROMPT.search(body), bool(IDS_ASKED.search(body))
            assert tokens, body
            text, first_id = (prompt[1], int(prompt[2])) if prompt else (b"[]", 0)
            self.engine.add(Request(self.transport, int(tokens[1]), first_id, asked, text, time.perf_counter()))
        elif path == b"/v1/models":
            self.transport.write(answer(json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode()))
        elif path == b"/stats":
            self.transport.write(answer(self.engine.stats()))
        elif path == b"/requests":
            times = [(request.first_id, request.received, request.first_sent) for request in self.engine.ended]
            self.transport.write(answer(json.dumps(times).encode()))
        else:
            self.transport.write(answer(b"{}"))


async def serve(port: int, engine: Engine) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Protocol(engine), "127.0.0.1", port, backlog=4096)
    async with server:
        await engine.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--hold", type=int, default=0)
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(serve(given.port, Engine(given.slots, given.step_ms / 1e3, given.hold)))


if __name__ == "__main__":
    main()
