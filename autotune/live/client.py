"""Streams completions from vLLM over HTTP."""

import json
import re
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import aiohttp

from autotune.backend import RequestTiming
from autotune.errors import MeasureError
from autotune.samples import Samples

TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
TAIL_BYTES = 1024  # enough for the last event, which holds the usage


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


class Client:
    """One HTTP session to one server; use it on one event loop."""

    def __init__(self, url: str, model: str, bodies: Sequence[bytes], timeout_s: float) -> None:
        self._url = url
        head = json.dumps({"model": model}).encode()[:-1] + b", "
        self.generated = 0  # tokens so far, of requests that go on, too
        self._bodies = [head + body[1:] for body in bodies]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            headers={"Content-Type": "application/json"},
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def complete(
        self, sample: int, issued: float, on_first_token: Callable[[], None] = lambda: None
    ) -> RequestTiming:
        """Send sample number `sample` and read its stream to the end.

        Raises MeasureError, with the server's words, unless the server reports generated tokens.
        """
        first = last = 0.0
        tail = b""
        try:
            async with self._session.post(f"{self._url}/v1/completions", data=self._bodies[sample]) as response:
                async for chunk in response.content.iter_any():
                    last = time.perf_counter()
                    if not first and response.status == 200 and b"data: {" in chunk:
                        first = last
                        on_first_token()
                    self.generated += chunk.count(b"data: {")
                    tail = (tail + chunk)[-TAIL_BYTES:]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise MeasureError(f"request failed: {type(error).__name__} {error}") from None
        tokens = TOKENS.findall(tail)
        if response.status != 200 or not tokens or not int(tokens[-1]):
            raise MeasureError(f"vLLM answered {response.status}: {tail.decode(errors='replace')[:300]}")
        return RequestTiming(sample, issued, first, last, int(tokens[-1]))

    async def reset_caches(self) -> None:
        """Forget the prefixes seen so far. Raises MeasureError if vLLM refuses."""
        async with self._session.post(f"{self._url}/reset_prefix_cache") as response:
            if response.status != 200:
                raise MeasureError(f"vLLM answered {response.status} to /reset_prefix_cache")
