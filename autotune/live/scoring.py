"""Log-probabilities of tokens, asked of vLLM: of given texts, in prefill, and of its own answers.

With `prompt_logprobs` vLLM neither reads the prefix cache nor returns a part of a chunked prefill (vLLM 0.32).
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from autotune.errors import MeasureError
from autotune.live import key
from autotune.live.server import DYING_S, Server

SIDE_BY_SIDE = 16  # requests; each holds the probabilities of all its prompt's tokens for a moment
ANSWERS_SIDE_BY_SIDE = 64  # so few that a slow server with one sequence at a time ends the last within a time-out

Floats = NDArray[np.float64]
T = TypeVar("T")
Json = dict[str, Any]


def prefilled(server: Server, texts: Sequence[list[int]], timeout_s: float, check: Callable[[], None]) -> list[Floats]:
    """The log-probability of each token after a text's first one. Raises MeasureError."""

    def read(body: Json, choice: Json) -> Floats:
        found = zip(body["prompt"][1:], choice["prompt_logprobs"][1:], strict=True)
        return np.array([position[str(token)]["logprob"] for token, position in found], dtype=float)

    bodies = [{"prompt": text, "max_tokens": 1, "prompt_logprobs": 1} for text in texts]
    return _asked(server, bodies, read, SIDE_BY_SIDE, timeout_s, check)


def decoded(
    server: Server,
    prompts: Sequence[tuple[list[int], int]],
    temperature: float,
    timeout_s: float,
    check: Callable[[], None],
) -> list[tuple[list[int], Floats]]:
    """Answers to prompts, of so many tokens at most, and their log-probabilities. Raises MeasureError."""

    def read(_: Json, choice: Json) -> tuple[list[int], Floats]:
        found = np.array(choice["logprobs"]["token_logprobs"], dtype=float)
        if len(found) != len(choice["token_ids"]):
            raise ValueError("not as many log-probabilities as tokens")
        return choice["token_ids"], found

    # The model's own distribution, whatever its generation_config.json says. With a request's own seed vLLM 0.32 dies
    # on a CPU.
    plain = {"temperature": temperature, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "logprobs": 1}
    if not temperature:
        plain["min_tokens"] = 1  # as MLPerf's answers have
    bodies = [{"prompt": prompt, "max_tokens": most, "return_token_ids": True, **plain} for prompt, most in prompts]
    return _asked(server, bodies, read, ANSWERS_SIDE_BY_SIDE, timeout_s, check)


def _asked(
    server: Server,
    bodies: Sequence[Json],
    read: Callable[[Json, Json], T],
    side_by_side: int,
    timeout_s: float,
    check: Callable[[], None],
) -> list[T]:
    """The findings of `read` in vLLM's answer to each request; `check` raises if the trial is to end meanwhile."""

    def ask(body: Json) -> T:
        check()
        whole = json.dumps({"model": server.model, **body}).encode()
        answer = key.asked(server.url, "/v1/completions", timeout_s, "POST", whole)
        return read(body, json.loads(answer)["choices"][0])

    with ThreadPoolExecutor(side_by_side) as pool:
        asked = [pool.submit(ask, body) for body in bodies]
        try:
            return [one.result() for one in asked]
        except HTTPError as error:
            if error.code >= 500:  # perhaps as it dies, whose reason is the better one
                server.process.wait(DYING_S)
                server.check_alive()
            raise MeasureError(f"vLLM refuses to score texts: {_reason(error)}") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
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
