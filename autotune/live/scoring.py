"""Log-probabilities of tokens, asked of an idle vLLM: of given texts, in prefill, and of its own greedy answers.

With `prompt_logprobs` vLLM neither reads the prefix cache nor returns a part of a chunked prefill (0.26 to 0.33).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from autotune.errors import MeasureError
from autotune.live import key
from autotune.live.server import Server

SIDE_BY_SIDE = 16  # requests; each holds the probabilities of all its prompt's tokens for a moment

Floats = NDArray[np.float64]


def prefilled(server: Server, texts: Sequence[list[int]], timeout_s: float, check: Callable[[], None]) -> list[Floats]:
    """The log-probability of each token after a text's first one. Raises MeasureError."""
    bodies = [{"prompt": text, "max_tokens": 1, "prompt_logprobs": 1} for text in texts]
    return [
        np.array([position[str(token)]["logprob"] for token, position in zip(text, found, strict=True) if position])
        for text, choice in zip(texts, _choices(server, bodies, timeout_s, check), strict=True)
        for found in [choice["prompt_logprobs"]]
    ]


def decoded(
    server: Server, prompts: Sequence[tuple[list[int], int]], timeout_s: float, check: Callable[[], None]
) -> list[tuple[list[int], Floats]]:
    """A greedy answer to each prompt, of so many tokens at most, and its log-probabilities. Raises MeasureError."""
    bodies = [
        {"prompt": prompt, "max_tokens": most, "logprobs": 1, "return_token_ids": True, "repetition_penalty": 1.0}
        for prompt, most in prompts
    ]
    choices = _choices(server, bodies, timeout_s, check)
    return [(choice["token_ids"], np.array(choice["logprobs"]["token_logprobs"])) for choice in choices]


def _choices(
    server: Server, bodies: Sequence[dict[str, Any]], timeout_s: float, check: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """vLLM's answer to each request, in order; `check` raises if the trial is to end meanwhile."""

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        whole = json.dumps({"model": server.model, "temperature": 0, **body}).encode()
        with key.opened(server.url, "/v1/completions", timeout_s, "POST", whole) as answer:
            choice: dict[str, Any] = json.loads(answer.read())["choices"][0]
            return choice

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        try:
            for choice in pool.map(ask, bodies):
                check()
                yield choice
        except HTTPError as error:
            raise MeasureError(f"vLLM refuses to score texts: {_reason(error)}") from None
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            server.check_alive()
            raise MeasureError(f"vLLM did not score texts ({type(error).__name__}: {error})") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _reason(error: HTTPError) -> str:
    """The message in the body of vLLM's refusal, one line."""
    try:
        told = json.loads(error.read())
        return str(told.get("error", told).get("message", error)).splitlines()[0]
    except (OSError, ValueError, AttributeError, IndexError):
        return str(error)
