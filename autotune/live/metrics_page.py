"""vLLM's /metrics page, read while a run goes on."""

import re
from typing import NamedTuple

from autotune.errors import MeasureError
from autotune.live import key
from autotune.measure.bottleneck import ServerState

TIMEOUT_S = 2.0
TYPE = re.compile(r"^# TYPE vllm:(\w+) (\w+)$", re.MULTILINE)
SAMPLE = re.compile(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


class Page(dict[str, list[float]]):
    """Each metric's values, one of each engine (data parallelism), by name without `vllm:`.

    With several API servers a gauge is on the page with its type alone until the first step: it has no values then.
    """

    def __init__(self, url: str, text: str) -> None:
        self.url = url
        for name, kind in TYPE.findall(text):
            for suffix in ("_sum", "_count") if kind == "histogram" else ("",):
                self[name + suffix] = []
        for name, value in SAMPLE.findall(text):
            self.setdefault(name, []).append(float(value))

    def __missing__(self, name: str) -> list[float]:
        raise MeasureError(
            f"{self.url} has no vllm:{name}; autotune knows the metrics of vLLM 0.26 to 0.33: install one of these"
        )


def read(server: str) -> Page | None:
    """The page of the server at this URL; None if it does not answer in time, or dies meanwhile."""
    try:
        return Page(f"{server}/metrics", key.asked(server, "/metrics", TIMEOUT_S).decode())
    except OSError:
        return None


def check(server: str) -> None:
    """Raise MeasureError if a metric that a run reads is missing."""
    state(server, 0.0)
    totals(server)


def state(server: str, time_s: float) -> ServerState | None:
    """The server's state, at `time_s` on the caller's clock; None if it does not answer in time.

    Of several engines it is the sum, for the KV cache the most. Raises MeasureError if a metric is missing.
    """
    if (page := read(server)) is None:
        return None
    return ServerState(
        time_s=time_s,
        running=sum(page["num_requests_running"]),
        waiting=sum(page["num_requests_waiting"]),
        kv_use=max(page["kv_cache_usage_perc"], default=0.0),
        preemptions=sum(page["num_preemptions_total"]),
        prefix_hits=sum(page["prefix_cache_hits_total"]),
        prompt_tokens=sum(page["prompt_tokens_total"]),
        generation_tokens=sum(page["generation_tokens_total"]),
        steps=sum(page["iteration_tokens_total_count"]),
        step_tokens=sum(page["iteration_tokens_total_sum"]),
        # Pages have these only with vLLM's kv_cache_metrics, or with a KV connector.
        evicted_blocks=sum(page.get("kv_block_lifetime_seconds_count", ())),
        external_hits=sum(page.get("external_prefix_cache_hits_total", ())),
        stored_bytes=sum(page.get("kv_offload_store_bytes_total", ())),
        loaded_bytes=sum(page.get("kv_offload_load_bytes_total", ())),
    )


class Totals(NamedTuple):
    """Sums over all requests since the server started."""

    ttft_s: float  # vLLM's own times to first token
    first_tokens: float
    prefix_hit_tokens: float  # of prompts, found in the KV cache
    prefix_query_tokens: float  # of prompts, looked for there


def totals(server: str) -> Totals | None:
    """The server's totals so far; None if it does not answer in time. Raises MeasureError if a metric is missing."""
    if (page := read(server)) is None:
        return None
    names = ("time_to_first_token_seconds_sum", "time_to_first_token_seconds_count")
    return Totals(*(sum(page[name]) for name in (*names, "prefix_cache_hits_total", "prefix_cache_queries_total")))
