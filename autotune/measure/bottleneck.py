"""What a server says of itself while it is measured, and what that shows to be in the way of more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.measure import series
from autotune.system.files import write_rows

MOST = 0.5  # share of the moments that makes a rule hold
KV_FULL = 0.9  # of the KV cache: vLLM keeps a watermark free, and the next request may need more than is left
BUDGET_SPENT = 0.8  # of max_num_batched_tokens: the last chunk of a prompt seldom fills a step


@dataclass(frozen=True, slots=True)
class State:
    """A server at one moment; tokens, steps, preemptions and hits count up from its start."""

    time_s: float  # since the run began
    running: float  # requests
    waiting: float
    kv_use: float  # share of the KV cache
    preemptions: float
    prefix_hits: float  # prompt tokens that were in the KV cache
    prompt_tokens: float
    generation_tokens: float
    steps: float
    step_tokens: float  # of all steps


def write(states: Sequence[State], folder: Path) -> None:
    write_rows(folder / series.SERVER, State, states)


def figures(states: Sequence[State]) -> dict[str, float]:
    """The run in a few numbers; empty if it was too short to be seen twice."""
    if len(states) < 2:
        return {}
    first, last = states[0], states[-1]
    found = {
        "running_mean": sum(state.running for state in states) / len(states),
        "waiting_mean": sum(state.waiting for state in states) / len(states),
        "kv_use_max": max(state.kv_use for state in states),
        "preemptions": last.preemptions - first.preemptions,
    }
    if (prompt := last.prompt_tokens - first.prompt_tokens) > 0:
        found["prefix_hit_share"] = (last.prefix_hits - first.prefix_hits) / prompt
    if (steps := last.steps - first.steps) > 0:
        found["step_ms"] = (last.time_s - first.time_s) / steps * 1e3
        found["tokens_per_step"] = (last.step_tokens - first.step_tokens) / steps
    return found


def bound(states: Sequence[State], flags: Mapping[str, Any]) -> str:
    """What kept the server from more, by the first of these rules that holds; empty if it was not seen.

    `flags` are vLLM's, resolved. A rule holds if it does in half of the moments in which requests wait.

    arrival    in most moments nothing waits: the load is all there is to do
    kv         the KV cache is full, or running requests had to give up theirs
    sequences  max_num_seqs requests run
    tokens     steps are as large as max_num_batched_tokens lets them be
    queue      requests wait with room in all of these: behind prompts in progress, or for the scheduler itself
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
    sequences = (flags.get("max_num_seqs") or float("inf")) * replicas
    if _most(states[number].running >= sequences for number in waits):
        return "sequences"
    budget = flags.get("max_num_batched_tokens") or float("inf")
    pairs = [(states[number - 1], states[number]) for number in waits if number]
    steps = sum(after.steps - before.steps for before, after in pairs)
    tokens = sum(after.step_tokens - before.step_tokens for before, after in pairs)
    return "tokens" if steps and tokens / steps >= BUDGET_SPENT * budget else "queue"


def _most(answers: Iterable[bool]) -> bool:
    listed = list(answers)
    return sum(listed) >= MOST * len(listed)
