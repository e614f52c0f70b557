"""vLLM's /metrics page, read while a run goes on."""

import re
import urllib.error
import urllib.request
from collections import defaultdict

from autotune.server_state import State

TIMEOUT_S = 2.0
LINE = re.compile(r"^vllm:(\w+?)(?:\{.*\})? (\S+)$", re.MULTILINE)


def read(url: str, time_s: float) -> State | None:
    """The server's state, at `time_s` on the caller's clock; None if it does not answer in time."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
            return parse(answer.read().decode(), time_s)
    except (urllib.error.URLError, OSError):
        return None


def parse(page: str, time_s: float) -> State:
    """What Prometheus' text format says; of several engines (data parallelism) the sum, for the KV cache the most."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in LINE.findall(page):
        values[name].append(float(value))
    return State(
        time_s=time_s,
        running=sum(values["num_requests_running"]),
        waiting=sum(values["num_requests_waiting"]),
        kv_use=max(values["kv_cache_usage_perc"], default=0.0),
        preemptions=sum(values["num_preemptions_total"]),
        prefix_hits=sum(values["prefix_cache_hits_total"]),
        prompt_tokens=sum(values["prompt_tokens_total"]),
        generation_tokens=sum(values["generation_tokens_total"]),
        steps=sum(values["iteration_tokens_total_count"]),
        step_tokens=sum(values["iteration_tokens_total_sum"]),
    )
