"""Our HTTP client against answers that come in any pieces, and against what can go wrong."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable

import pytest
import uvloop

from autotune.live.stream import Client, Stream, completion

EVENTS = [
    'data: {"choices": [{"text": "é漢"}]}\n\n',
    'data: {"choices": [{"text": "\\ndata: {\\"completion_tokens\\": 9}"}]}\n\n',  # text that looks like an event
    'data: {"choices": [{"text": ""}]}\n\n',
    'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n',
    "data: [DONE]\n\n",
]
BODY = "".join(EVENTS).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
LENGTH = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
UNTIL_CLOSE = HEAD + b"Connection: close\r\n\r\n" + BODY


def chunked(pieces: list[bytes]) -> bytes:
    chunks = b"".join(b"%X\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], "asyncio.Future[None]"]


def ask(
    answer: Answer,
    requests: int = 1,
    timeout_s: float = 5.0,
    body: bytes = b"{}",
    connections: int = 1024,
    keep: bool = False,
    chat: bool = False,
    at_once: bool = False,
) -> tuple[list[Stream], list[str], Client]:
    """Send requests, one after another or `at_once`, to a server that answers each connection by `answer`."""

    async def run() -> tuple[list[Stream], list[str], Client]:
        ended: asyncio.Queue[tuple[Stream, str]] = asyncio.Queue()
        begun: list[int] = []
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        loop = asyncio.get_running_loop()
        client = Client(
            *(loop, url, timeout_s, lambda s: begun.append(s.number), lambda *end: ended.put_nowait(end)),
            *(connections, keep, chat),
        )
        streams, errors = [], []
        for number in range(requests):
            for now in range(requests if at_once and not number else 1 - at_once):
                client.start(number + now, completion(url, body))
            while ended.empty():
                await asyncio.sleep(0.01)
                client.expire()
            stream, error = ended.get_nowait()
            streams.append(stream)
            errors.append(error)
        assert begun == [stream.number for stream in streams if stream.first]
        assert client.unsent == 0
        server.close()
        return streams, errors, client

    return uvloop.run(run())


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(2)


def writes(pieces: list[bytes], close: bool = False) -> Answer:
    """Each request of a connection is answered by `pieces`, one write each."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await read_request(reader)
                for piece in pieces:
                    writer.write(piece)
                    for _ in range(2):  # in which the client, in the same loop, reads the piece
                        await asyncio.sleep(0)
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    return answer


CHAT = [
    'data: {"choices":[{"delta":{"role":"assistant","content":""}}],"prompt_token_ids":null}\n\n',
    'data: {"choices":[{"delta":{"reasoning":"so"},"finish_reason":null}]}\n\n',
    'data: {"choices":[{"delta":{"content":"é漢\\n\\\\"}}]}\n\n',
    'data: {"choices":[{"delta":{}}]}\n\n',
    'data: {"choices":[{"delta":{"content":"\\"delta\\":{\\"content\\":\\"no\\"}"}}]}\n\n',  # looks like an event
    'data: {"choices":[],"usage":{"prompt_tokens":12,"total_tokens":16,"completion_tokens":4}}\n\n',
    "data: [DONE]\n\n",
]


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_chat_has_a_token_in_each_event_but_the_roles(size: int):
    (stream, _), errors, client = ask(writes(cut(chunked([e.encode() for e in CHAT]), size)), 2, keep=True, chat=True)
    assert errors == ["", ""] and client.events == 2 * 4
    assert stream.tokens == 4 and stream.prompt_tokens == 12 and stream.ids is None
    assert json.loads(b'"%b"' % bytes(stream.said)) == 'é漢\n\\"delta":{"content":"no"}'


@pytest.mark.parametrize("size", [1, 4096])
def test_first_token_of_a_chat_is_not_its_role(size: int):
    role, token = (chunked([event.encode()]).removesuffix(b"0\r\n\r\n") for event in CHAT[:2])
    rest = chunked([event.encode() for event in CHAT[2:]]).removeprefix(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    began: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in cut(role, size):
            writer.write(piece)
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        began.append(time.perf_counter())
        writer.write(token.removeprefix(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") + rest)
        writer.close()

    (stream,), errors, _ = ask(answer, chat=True)
    assert errors == [""] and stream.first > began[0] > stream.sent


@pytest.mark.parametrize(
    "data",
    [
        chunked([event.encode() for event in EVENTS]),
        chunked([BODY]),
        chunked(cut(BODY, 1)),
        chunked(cut(BODY, 7)),
        LENGTH,
    ],
    ids=["an event a chunk", "one chunk", "a byte a chunk", "7 bytes a chunk", "by length"],
)
@pytest.mark.parametrize("size", [1, 5, 4096])
def test_answer_is_the_same_in_whatever_pieces_it_comes(data: bytes, size: int):
    (first, second), errors, client = ask(writes(cut(data, size)), requests=2)
    assert errors == ["", ""]
    for stream in (first, second):
        assert stream.tokens == 3 and stream.sent < stream.first <= stream.last
    assert client.events == 2 * 4  # the text that looks like one is none; [DONE] neither
    assert client.generated == 2 * 3


@pytest.mark.parametrize("count", [1, 20])
def test_tokens_are_counted_also_where_an_event_has_several(count: int):
    usage = f'{{"prompt_tokens":2,"total_tokens":{2 + 3 * count},"completion_tokens":{3 * count}}}'
    token = f'data: {{"choices":[{{"text":"{"x" * count}"}}]}}\n\n'.encode()
    events = [*[token] * 3, f'data: {{"choices":[],"usage":{usage}}}\n\n'.encode(), b"data: [DONE]\n\n"]
    _, errors, client = ask(writes([chunked(events)]), requests=2)
    assert errors == ["", ""] and client.events == 2 * 4 and client.generated == 2 * 3 * count


def test_body_may_end_with_the_connection():
    (stream, again), errors, _ = ask(writes([UNTIL_CLOSE], close=True), requests=2)
    assert errors == ["", ""] and stream.tokens == again.tokens == 3


FAILURES = {
    "status": (
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 12\r\n\r\nprompt is \xc3\xa9",
        "vLLM answered 400: prompt is é",
    ),
    "status alone": (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "vLLM answered 503: "),
    "error event": (
        chunked([b'data: {"error": {"message": "out of blocks"}}\n\n']),
        "vLLM answered 200: .*out of blocks",
    ),
    "other events": (chunked([BODY.replace(b"data: ", b"data:")]), "vLLM counted 3 tokens and no event with one"),
    "cut chunk": (chunked([BODY])[:-40], "request failed: ConnectionError: .* in mid-answer"),
    "cut body": (LENGTH[:-1], "request failed: ConnectionError: .* in mid-answer"),
    "nothing": (b"", "request failed: ConnectionError: .* in mid-answer"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", "request failed: no HTTP in the answer: b'SSH"),
    "no chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nwhat\r\n", "request failed: no HTTP in the answer"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_failure_is_told_in_words(how: str):
    data, words = FAILURES[how]
    _, errors, _ = ask(writes([data], close=True))
    assert re.match(words, errors[0]), errors


def test_reset_is_told():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(chunked([BODY])[:60])
        await asyncio.sleep(0.05)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        writer.transport.abort()

    _, errors, _ = ask(answer)
    assert errors[0].startswith("request failed: Connection")


def test_request_past_its_time_is_given_up():
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(10)

    _, errors, _ = ask(silent, timeout_s=0.1)
    assert errors == ["request failed: TimeoutError after 0.1 s"]


def test_kept_connection_that_the_server_closes_is_replaced():
    """uvicorn closes what was idle for 5 s, maybe just as the next request goes out."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(chunked([BODY]))
        if connections == 1:
            await reader.read(1)  # takes the second request, and closes without an answer
            writer.close()

    streams, errors, _ = ask(answer, requests=2)
    assert errors == ["", ""] and connections == 2 and streams[1].tokens == 3


def test_large_request_goes_out_as_the_server_takes_it():
    body = json.dumps({"prompt": [7] * 3_000_000}).encode()
    received = 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.2)
        while received < len(body):
            received += len(await reader.read(1 << 20))
        writer.write(LENGTH)

    _, errors, client = ask(slow, body=body)
    assert errors == [""] and received == len(body)
    assert 0 < client.most_unsent <= len(completion("http://127.0.0.1:12345", body))


WITH_IDS = "".join(
    [
        'data: {"choices": [{"text": "\\"token_ids\\":[6]", "token_ids": [5], "prompt_token_ids": [9, 9, 9]}]}\n\n',
        'data: {"choices":[{"text":"","prompt_token_ids":null,"token_ids":[]}]}\n\n',
        'data: {"choices":[{"text":"b","token_ids":[70000,7]}]}\n\n',
        'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n',
    ]
).encode()


@pytest.mark.parametrize("size", [1, 7, 60, 4096])
def test_token_ids_are_found_in_whatever_pieces_they_come(size: int):
    (stream,), errors, _ = ask(writes(cut(chunked([WITH_IDS]), size)), keep=True)
    assert errors == [""] and stream.ids is not None and list(stream.ids) == [5, 70000, 7]


def test_first_token_has_its_id_though_the_prompts_ids_come_with_it_in_pieces():
    begun: list[list[int]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        client = Client(loop, "http://127.0.0.1", 5.0, lambda s: begun.append(list(s.ids or ())), print, keep=True)
        stream = Stream(0, b"", keep=True)
        stream.status = 200
        prompt = ",".join(map(str, range(3000)))
        event = f'data: {{"choices":[{{"prompt_token_ids":[{prompt}],"token_ids":[8]}}]}}\n\n'.encode()
        for at, piece in enumerate(cut(event, 4096)):
            assert not begun and not stream.first
            client.read(stream, piece, float(at + 1))
        assert stream.first == at + 1

    asyncio.run(run())
    assert begun == [[8]]


def test_long_answer_is_not_kept_as_text():
    stream = Stream(0, b"", keep=True)
    stream.status, stream.first = 200, 1.0
    for number in range(3000):
        stream.read(b'\ndata: {"choices":[{"text":"%b","token_ids":[%d]}]}\n' % (200 * b"x", number), 2.0)
    assert stream.ids is not None and len(stream.ids) > 2500
    stream.parse()
    assert list(stream.ids) == list(range(3000))


def test_ids_that_are_missing_are_an_error():
    _, errors, _ = ask(writes([chunked([BODY])]), keep=True)
    assert errors == ["vLLM counted 3 tokens and sent the ids of 0"]


def test_requests_wait_for_a_connection_in_order_and_their_time_begins_when_they_are_sent():
    connections = 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(3):
            await read_request(reader)
            await asyncio.sleep(0.1)
            writer.write(chunked([BODY]))
        writer.close()

    streams, errors, client = ask(slow, requests=6, timeout_s=0.25, connections=2, at_once=True)
    assert errors == [""] * 6 and connections == 2 and client.most_waiting == 4
    assert [stream.number for stream in streams] == sorted(stream.number for stream in streams)


def test_many_that_wait_for_a_server_that_is_gone_end_one_after_another():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def run() -> list[str]:
        errors: list[str] = []
        client = Client(
            *(asyncio.get_running_loop(), f"http://127.0.0.1:{port}", 1.0, lambda _: None),
            *(lambda _, error: errors.append(error), 1),
        )
        for number in range(3000):
            client.start(number, b"GET / HTTP/1.1\r\n\r\n")
        while len(errors) < 3000:
            await asyncio.sleep(0.01)
        return errors

    assert all("Connection refused" in error for error in uvloop.run(asyncio.wait_for(run(), 10)))
