"""vLLM's /metrics page, read while a run goes on."""

import re
import urllib.error
import urllib.request
from collections import defaultdict

from autotune.measure.bottleneck import ServerState

TIMEOUT_S = 2.0
LINE = re.compile(r"^vllm:(\w+?)(?:\{.*\})? (\S+)$", re.MULTILINE)


def read(url: str) -> str | None:
    """The page; None if the server does not answer in time."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
            return text
    except (urllib.error.URLError, OSError):
        return None


def values(page: str) -> defaultdict[str, list[float]]:
    """Each metric's values, one of each engine (data parallelism), by name without `vllm:`; the page is Prometheus'."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in LINE.findall(page):
        found[name].append(float(value))
    return found


def state(url: str, time_s: float) -> ServerState | None:
    """The server's state, at `time_s` on the caller's clock; None if it does not answer in time.

    Of several engines it is the sum, for the KV cache the most.
    """
    if (page := read(url)) is None:
        return None
    found = values(page)
    return ServerState(
        time_s=time_s,
        running=sum(found["num_requests_running"]),
        waiting=sum(found["num_requests_waiting"]),
        kv_use=max(found["kv_cache_usage_perc"], default=0.0),
        preemptions=sum(found["num_preemptions_total"]),
        prefix_hits=sum(found["prefix_cache_hits_total"]),
        prompt_tokens=sum(found["prompt_tokens_total"]),
        generation_tokens=sum(found["generation_tokens_total"]),
        steps=sum(found["iteration_tokens_total_count"]),
        step_tokens=sum(found["iteration_tokens_total_sum"]),
    )


def ttft(url: str) -> tuple[float, float]:
    """Sum, in seconds, and count of vLLM's own times to first token so far; zeros if it does not answer."""
    found = values(read(url) or "")
    return sum(found["time_to_first_token_seconds_sum"]), sum(found["time_to_first_token_seconds_count"])
