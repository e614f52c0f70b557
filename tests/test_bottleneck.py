"""The rules that name a server's bottleneck, and the figures of its state."""

from dataclasses import replace

import pytest

from autotune.measure import bottleneck
from autotune.measure.bottleneck import ServerState

FLAGS = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
IDLE = ServerState(0, 10, 0, 0.2, 0, 0, 0, 0, 0, 0)
# Each moment is ten steps of 500 tokens after the last.
BUSY = [replace(IDLE, time_s=i, waiting=5, steps=10 * i, step_tokens=5000 * i) for i in range(10)]


@pytest.mark.parametrize(
    ("states", "bound"),
    [
        ([IDLE] * 10, "arrival"),
        ([*[IDLE] * 6, *BUSY[:4]], "arrival"),
        ([replace(state, kv_use=0.95) for state in BUSY], "kv"),
        ([*BUSY[:-1], replace(BUSY[-1], preemptions=1)], "kv"),
        ([replace(state, running=64) for state in BUSY], "sequences"),
        ([replace(state, step_tokens=state.step_tokens * 4) for state in BUSY], "tokens"),
        (BUSY, "queue"),
        (BUSY[:1], ""),
    ],
    ids=["idle", "mostly idle", "kv full", "preempted", "seats", "budget", "queue", "not seen"],
)
def test_bottleneck_is_named(states: list[ServerState], bound: str):
    assert bottleneck.bottleneck(states, FLAGS) == bound


@pytest.mark.parametrize(("lost", "bound"), [(0.09, "queue"), (0.1, "cache")])
def test_prompts_that_were_evicted_and_computed_again_are_the_caches_fault(lost: float, bound: str):
    assert bottleneck.bottleneck(BUSY, FLAGS, lost) == bound
    assert bottleneck.bottleneck([replace(state, kv_use=0.95) for state in BUSY], FLAGS, lost) == "kv"
    assert bottleneck.bottleneck([IDLE] * 10, FLAGS, lost) == "arrival"


def test_each_replica_has_its_own_seats():
    full = [replace(state, running=64) for state in BUSY]
    assert bottleneck.bottleneck(full, FLAGS | {"data_parallel_size": 2}) == "queue"


def test_figures_are_of_the_run_alone():
    states = [
        ServerState(0, 2, 0, 0.1, 5, 100, 1000, 10, 50, 1000),
        ServerState(2, 4, 1, 0.3, 6, 150, 2000, 30, 150, 3000),
    ]
    found = bottleneck.figures(states)
    assert found["preemptions"] == 1 and found["kv_use_max"] == 0.3 and found["running_mean"] == 3
    assert found["prefix_hit_share"] == 0.05
    assert found["step_ms"] == pytest.approx(20) and found["tokens_per_step"] == 20
