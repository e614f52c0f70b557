"""Costs of serving: for each million tokens, by the price of a GPU for an hour."""

from collections.abc import Mapping

# Metrics of a cost, and the rate of tokens that are taken to pay for all of it.
PER_MILLION = {
    "cost_per_million_output_tokens": "tokens_per_s",
    "cost_per_million_input_tokens": "prompt_tokens_per_s",
}


def per_million(metrics: Mapping[str, float], gpus: int, per_gpu_hour: float) -> dict[str, float]:
    """Costs of a million tokens on a server with these `metrics` on so many `gpus`, in the price's currency.

    Each is the whole cost: that of a million output tokens includes the prompts that they took.
    """
    rates = {name: metrics.get(rate, 0.0) for name, rate in PER_MILLION.items()}
    return {name: gpus * per_gpu_hour / 3600 / rate * 1e6 for name, rate in rates.items() if rate}
