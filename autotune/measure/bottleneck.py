"""vLLM's state during a run, and its bottleneck."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 0.5  # a rule holds if it does at this share of the observations
KV_FULL = 0.9  # share of the KV cache: the next request may need more blocks than are left above the watermark
LOST = 0.1  # share of the prompt tokens that were computed again although they had been in the KV cache
BUDGET_SPENT = 0.8  # share of max_num_batched_tokens: a prompt's last chunk seldom fills a step


@dataclass(frozen=True, slots=True)
class ServerState:
    """One observation of a server. Tokens, steps, preemptions, hits, blocks and bytes are totals since it started."""

    time_s: float  # since the run began
    running: float  # requests
    waiting: float
    kv_use: float  # share of the KV cache
    preemptions: float
    prefix_hits: float  # prompt tokens that were in the KV cache
    prompt_tokens: float
    generation_tokens: float
    steps: float
    step_tokens: float  # tokens computed in all steps
    evicted_blocks: float = 0.0  # of the prefix cache, where they are counted
    external_hits: float = 0.0  # prompt tokens that a KV connector had
    stored_bytes: float = 0.0  # that were offloaded …
    loaded_bytes: float = 0.0  # … and came back


def figures(states: Sequence[ServerState]) -> dict[str, float]:
    """The run's figures, named as in result.json; none if it was observed fewer than twice."""
    if len(states) < 2:
        return {}
    first, last = states[0], states[-1]
    values = {
        "running_mean": sum(state.running for state in states) / len(states),
        "waiting_mean": sum(state.waiting for state in states) / len(states),
        "kv_use_max": max(state.kv_use for state in states),
        "preemptions": last.preemptions - first.preemptions,
    }
    for name in ("evicted_blocks", "external_hits", "stored_bytes", "loaded_bytes"):
        if (count := getattr(last, name) - getattr(first, name)) > 0:
            values[name] = count
    if (prompt := last.prompt_tokens - first.prompt_tokens) > 0:
        values["prefix_hit_share"] = (last.prefix_hits - first.prefix_hits) / prompt
    if (steps := last.steps - first.steps) > 0:
        values["step_ms"] = (last.time_s - first.time_s) / steps * 1e3
        values["tokens_per_step"] = (last.step_tokens - first.step_tokens) / steps
    return values


def bottleneck(states: Sequence[ServerState], flags: Mapping[str, Any], lost: float = 0.0) -> str:
    """Name what kept the server from a higher throughput; empty if it was observed fewer than twice.

    `flags` are vLLM's, resolved; `lost` is compared with LOST. The first of these rules that holds names it:

    arrival    at most observations no request waits: the server does all the work there is
    kv         the KV cache is full, or requests were preempted
    cache      prompts' beginnings had been evicted from the KV cache, and were computed again
    sequences  max_num_seqs requests run
    tokens     steps hold nearly max_num_batched_tokens tokens
    queue      requests wait though none of these is reached: behind prompts in progress, or for the scheduler itself

    `kv` and `sequences` must hold at half of the observations at which requests wait, `tokens` on their average.
    """
    if len(states) < 2:
        return ""
    waits = [number for number, state in enumerate(states) if state.waiting > 0]
    if len(waits) < MOST * len(states):
        return "arrival"
    replicas = flags.get("data_parallel_size") or 1
    preempted = states[-1].preemptions > states[0].preemptions
    if preempted or _most(states[number].kv_use >= KV_FULL for number in waits):
        return "kv"
    if lost >= LOST:
        return "cache"
    sequences = (flags.get("max_num_seqs") or float("inf")) * replicas
    if _most(states[number].running >= sequences for number in waits):
        return "sequences"
    budget = flags.get("max_num_batched_tokens") or float("inf")
    pairs = [(states[number - 1], states[number]) for number in waits if number]
    steps = sum(after.steps - before.steps for before, after in pairs)
    tokens = sum(after.step_tokens - before.step_tokens for before, after in pairs)
    return "tokens" if steps and tokens / steps >= BUDGET_SPENT * budget else "queue"


def _most(answers: Iterable[bool]) -> bool:
    counted = list(answers)
    return sum(counted) >= MOST * len(counted)
