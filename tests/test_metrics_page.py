"""What is read of vLLM's /metrics. tests/test_live.py reads the page of a real vLLM."""

import re

import pytest

from autotune.errors import MeasureError
from autotune.live import metrics_page
from autotune.live.metrics_page import Page
from autotune.measure.bottleneck import ServerState

PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 16.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 150.0
# TYPE vllm:kv_block_lifetime_seconds histogram
vllm:kv_block_lifetime_seconds_count{engine="0",model_name="m"} 12.0
# TYPE vllm:kv_offload_load_bytes_total counter
vllm:kv_offload_load_bytes_total{engine="0",tier="cpu"} 2.0
vllm:kv_offload_load_bytes_total{engine="0",tier="fs"} 3.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.5e+02
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 1.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 20.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 190.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="1.0",model_name="m"} 5.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 5.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 0.75
"""
METRICS = [
    line.split()[2]
    for line in PAGE.splitlines()
    if line.startswith("# TYPE") and not re.search("created|kv_block|kv_offload", line)
]


def serve(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(metrics_page, "read", lambda server: Page(f"{server}/metrics", text))


def test_page_is_read_over_all_engines(monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, PAGE)
    assert metrics_page.state("", 1.5) == ServerState(1.5, 7, 1, 0.5, 2, 16, 150, 40, 20, 190, 12, 0, 0, 5)
    assert metrics_page.totals("") == (0.75, 5, 16, 150)


@pytest.mark.parametrize("name", METRICS)
def test_metric_that_is_missing_is_an_error_and_no_zero(name: str, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, PAGE.replace(name, f"{name}_renamed"))
    with pytest.raises(MeasureError) as raised:
        metrics_page.check("http://127.0.0.1:8000")
    assert str(raised.value).startswith(f"http://127.0.0.1:8000/metrics has no {name}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", METRICS)
def test_metric_without_a_value_yet_is_zero(name: str, monkeypatch: pytest.MonkeyPatch):
    """Several API servers show a gauge that was never set by its type alone."""
    serve(monkeypatch, "\n".join(line for line in PAGE.splitlines() if not line.startswith(name)))
    metrics_page.check("")


def test_server_that_does_not_answer_has_no_state():
    assert metrics_page.state("http://127.0.0.1:9", 0.0) is None
    assert metrics_page.totals("http://127.0.0.1:9") is None
