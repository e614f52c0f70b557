import json
import random
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.data.models import build_shape
from autotune.sim.engine import contents
from autotune.sim.flags import Flags
from autotune.sim.kv_cache import BlockTable, KvCache, prefix_keys
from autotune.sim.scheduler import Batch, Request, Scheduler

AMPLE = 1000  # blocks


def flags(**given: Any) -> Flags:
    """Flags for the scheduler, which reads neither of those that are set here."""
    unread = {"max_model_len": 0, "block_size": 0, "max_cudagraph_capture_size": 0, "async_scheduling": False}
    return Flags(**unread | given)


def scheduler(
    *requests: Request, blocks: int = AMPLE, caching: bool = False, seqs: int = 8, tokens: int = 32, **given: Any
) -> Scheduler:
    """A scheduler that has `requests` waiting, with blocks of 4 tokens."""
    limits = flags(max_num_seqs=seqs, max_num_batched_tokens=tokens, **given)
    made = Scheduler(limits, KvCache(blocks, 4, caching))
    for request in requests:
        made.add(request)
    return made


def step(scheduler: Scheduler) -> tuple[dict[int, int], int]:
    """Run a step; returns the tokens of each prefill by request, and the count of decodes."""
    batch = scheduler.schedule()
    scheduler.finish(batch)
    return {request.number: tokens for request, tokens in batch.chunks.items()}, batch.decodes


def test_prompt_longer_than_a_step_is_prefilled_in_chunks_beside_decodes():
    run = scheduler(Request(0, prompt=10, output=9), Request(1, prompt=50, output=1))
    assert [step(run) for _ in range(3)] == [({0: 10, 1: 22}, 0), ({1: 28}, 1), ({}, 1)]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_takes_it_whole():
    run = scheduler(Request(0, 20, 1), Request(1, 20, 1), enable_chunked_prefill=False)
    assert [step(run), step(run)] == [({0: 20}, 0), ({1: 20}, 0)]


def test_long_prefill_threshold_leaves_tokens_to_others_but_not_when_there_are_none():
    run = scheduler(Request(0, 30, 1), Request(1, 5, 1), long_prefill_token_threshold=10)
    assert [step(run), step(run)] == [({0: 10, 1: 5}, 0), ({0: 20}, 0)]


def test_adaptive_threshold_is_at_least_an_equal_share_of_the_step():
    given = {"long_prefill_token_threshold": 10, "long_prefill_token_threshold_adaptive": True}
    run = scheduler(Request(0, 30, 1), Request(1, 5, 1), **given)
    assert [step(run), step(run)] == [({0: 16, 1: 5}, 0), ({0: 14}, 0)]


@pytest.mark.parametrize("given", [{"seqs": 1}, {"max_num_active_seqs": 1}])
def test_request_waits_for_a_seat(given: dict[str, int]):
    run = scheduler(Request(0, 4, 2), Request(1, 4, 1), **given)
    assert [step(run) for _ in range(3)] == [({0: 4}, 0), ({}, 1), ({1: 4}, 0)]


def test_request_is_not_admitted_before_its_whole_prompt_fits():
    run = scheduler(Request(0, 16, 2), Request(1, 12, 1), blocks=6, tokens=20)
    assert [step(run) for _ in range(3)] == [({0: 16}, 0), ({}, 1), ({1: 12}, 0)]


def test_watermark_keeps_blocks_free_of_new_requests_unless_nothing_runs():
    run = scheduler(Request(0, 4, 2), Request(1, 4, 1), blocks=3, watermark=0.5)  # 2 of 4, vLLM's own among them
    assert [step(run) for _ in range(3)] == [({0: 4}, 0), ({}, 1), ({1: 4}, 0)]


def test_last_admitted_is_preempted_and_computed_again_with_what_it_generated():
    first, second = Request(0, 4, 5), Request(1, 3, 4)
    run = scheduler(first, second, blocks=2)
    assert step(run) == ({0: 4, 1: 3}, 0)
    batch = run.schedule()
    assert (batch.decodes, batch.preempted) == (1, [second])  # one generates its second token; the other has its first
    run.finish(batch)
    assert [step(run) for _ in range(3)] == [({}, 1), ({}, 1), ({}, 1)]
    assert [step(run) for _ in range(3)] == [({1: 4}, 0), ({}, 1), ({}, 1)]
    assert not run.running and not run.waiting and run.cache.free_blocks == 2


def test_lower_priority_value_goes_first_and_the_highest_is_preempted():
    low, high = Request(0, 4, 5, priority=1), Request(1, 4, 5, priority=0)
    run = scheduler(low, high, blocks=3)
    assert list(run.schedule().chunks) == [high, low]
    assert run.schedule().preempted == [low]


def test_same_beginning_is_computed_once_and_the_last_token_always():
    prompt = np.arange(12, dtype=np.int32)
    run = scheduler(*(Request(number, 12, 1, prefix=prefix_keys(prompt, 4)) for number in range(2)), caching=True)
    assert step(run) == ({0: 12, 1: 4}, 0)


def test_cache_evicts_the_end_of_what_was_freed_first():
    cache = KvCache(blocks=4, block_size=4, caching=True)
    old, new = BlockTable(["a", "b", "c"]), BlockTable(["x"])
    assert cache.allocate(old, 12)
    cache.free(old, 12)
    assert cache.allocate(new, 8)
    assert [block.key for block in cache.find(old, 13)] == ["a", "b"]


def test_blocks_in_a_row_are_found_and_evicted_together():
    cache = KvCache(blocks=6, block_size=4, caching=True, span=2)
    old, new = BlockTable(["a", "b"]), BlockTable(["x"])
    assert cache.allocate(old, 20) and cache.free_blocks == 1
    cache.free(old, 20)
    assert cache.free_blocks == 6
    assert cache.allocate(new, 12) and cache.free_blocks == 3
    assert [block.key for block in cache.find(old, 20)] == ["a"]
    cache.allocate_cached(old, cache.find(old, 20))
    assert (old.count, cache.hits) == (2, 8)


def test_step_in_flight_still_holds_its_blocks_and_seats():
    run = scheduler(Request(0, 4, 1), Request(1, 4, 1), seqs=1)
    in_flight = run.schedule()
    assert run.schedule().tokens == 0
    run.finish(in_flight)
    assert step(run) == ({1: 4}, 0)


def random_case(rng: random.Random) -> dict[str, Any]:
    """Requests and limits under which most features matter."""
    block_size = rng.choice([2, 4, 8])
    caching, priority, tight = rng.random() < 0.5, rng.random() < 0.25, rng.random() < 0.7
    longest_prompt, longest_output = rng.choice([(20, 60), (60, 30), (100, 8)])
    beginnings = [[rng.randrange(512) for _ in range(longest_prompt)] for _ in range(3)]
    requests, arrival = [], 0
    for _ in range(rng.randint(2, 24)):
        arrival += rng.choice([0, 0, 0, 1, 4])
        shared = rng.choice(beginnings)[: rng.randint(0, longest_prompt - 1)]
        own = [rng.randrange(512) for _ in range(rng.randint(1, longest_prompt - len(shared)))]
        output = rng.choice([1, rng.randint(1, longest_output)])
        importance = rng.randrange(3) if priority else 0
        requests.append({"step": arrival, "prompt": shared + own, "output": output, "priority": importance})
    longest = max(len(request["prompt"]) + request["output"] for request in requests)
    seqs, chunked = rng.randint(1, 16), rng.random() < 0.7
    return {
        "config": {
            "max_num_seqs": seqs,
            "max_num_batched_tokens": max(seqs, rng.choice([16, 32, 64, 128]), 0 if chunked else longest),
            "max_num_active_seqs": rng.choice([None, None, rng.randint(1, seqs)]),
            "long_prefill_token_threshold": rng.choice([0, 0, 5, 12, 40]),
            "long_prefill_token_threshold_adaptive": rng.random() < 0.5,
            "enable_chunked_prefill": chunked,
            "policy": "priority" if priority else "fcfs",
            "watermark": rng.choice([0.0, 0.0, 0.1, 0.3]),
            "async_scheduling": rng.random() < 0.5,
        },
        "blocks": -(-longest // block_size) + rng.randint(0, 8 if tight else 300),
        "block_size": block_size,
        "caching": caching,
        "requests": requests,
    }


def simulate(case: dict[str, Any]) -> tuple[list[Batch], list[list[float]]]:
    """The steps of `case`, and what a recorder would write of each that has tokens."""
    config = {name: value for name, value in case["config"].items() if name != "policy"}
    in_advance = config["async_scheduling"]
    run = Scheduler(flags(**config), KvCache(case["blocks"], case["block_size"], case["caching"]))
    coming = deque(
        (
            request["step"],
            Request(
                number,
                len(request["prompt"]),
                request["output"],
                priority=request["priority"],
                prefix=prefix_keys(np.array(request["prompt"], np.int32), case["block_size"]),
            ),
        )
        for number, request in enumerate(case["requests"])
    )
    batches: list[Batch] = []
    counts: list[list[float]] = []
    in_flight: deque[Batch] = deque()
    while coming or run.running or run.waiting:
        while coming and coming[0][0] <= len(batches):
            run.add(coming.popleft()[1])
        batches.append(run.schedule())
        if batches[-1].tokens:
            counts.append(list(contents(run, batches[-1])))
        in_flight.append(batches[-1])
        if len(in_flight) > in_advance:
            run.finish(in_flight.popleft())
    return batches, counts


def difference(case: dict[str, Any], found: dict[str, Any]) -> str:
    """Where the simulation of `case` leaves vLLM's steps, and what was recorded of them; empty if nowhere."""
    batches, counts = simulate(case)
    steps = found["steps"]
    while batches and not batches[-1].tokens:
        batches.pop()
    while steps and not steps[-1]["tokens"]:
        steps.pop()
    for number, (batch, step) in enumerate(zip(batches, steps, strict=False)):
        tokens, cached = step["tokens"], step["cached"]
        chunks = {str(request.number): tokens for request, tokens in batch.chunks.items()}
        prefilled, decoded = tokens.keys() & chunks.keys(), tokens.keys() - chunks.keys()
        ours = {
            "chunks": chunks,
            "attended": batch.attended,
            "decodes": batch.decodes,
            "context": batch.context,
            "preempted": sorted(request.number for request in batch.preempted),
            "last": sorted(request.number for request in batch.last),
        }
        theirs = {
            "chunks": {i: tokens[i] for i in prefilled},
            "attended": sum(tokens[i] * (cached[i] + tokens[i] / 2) for i in prefilled),
            "decodes": sum(tokens[i] for i in decoded),
            "context": sum(cached[i] for i in decoded),
            "preempted": step["preempted"],
            "last": step["finished"],
        }
        if ours != theirs:
            return f"step {number}: {ours}, but vLLM's: {theirs}"
    if len(batches) != len(steps):
        return f"{len(batches)} steps, but vLLM's: {len(steps)}"
    recorded = found["counts"] if case["record"] else counts
    if any(step["preempted"] for step in steps):
        counts, recorded = list(map(in_all, counts)), list(map(in_all, recorded))
    return next((f"{ours}, recorded: {row}" for ours, row in zip(counts, recorded, strict=True) if ours != row), "")


def in_all(row: list[float]) -> list[float]:
    """Sequences, tokens, tokens attended to and running requests of a recorded step.

    The last token of a request that is computed again is a chunk to the simulator and a decode to the recorder. A
    preempted request whose last token is in flight waits in vLLM, not in the simulator.
    """
    decodes, context, chunks, prefilled, attended, running, _ = row
    return [decodes + chunks, decodes + prefilled, decodes + context + attended, running]


def vllm_steps(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "max_position_embeddings": 4096}
    build_shape(folder, vocab_size=512, num_attention_heads=4, num_key_value_heads=2, **shape)
    command = [sys.executable, str(Path(__file__).with_name("vllm_steps.py")), str(folder)]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_every_step_is_the_one_that_vllms_scheduler_decides(tmp_path: Path):
    rng = random.Random(16)
    cases = [random_case(rng) | {"record": number % 2 == 0} for number in range(500)]
    found = vllm_steps(tmp_path, cases)
    assert sum(bool(step["preempted"]) for one in found for step in one["steps"]) > 500
    differences = [difference(case, one) for case, one in zip(cases, found, strict=True)]
    assert not any(differences), [(i, text) for i, text in enumerate(differences) if text]


@pytest.mark.slow
def test_every_step_is_the_one_that_vllm_runs(tmp_path: Path):
    rng = random.Random(1)
    beginning = [rng.randrange(512) for _ in range(80)]
    prompts = [beginning * (i % 2) + [rng.randrange(512) for _ in range(rng.randint(1, 150))] for i in range(12)]
    case = {
        "engine": True,
        "record": True,
        "config": {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            "long_prefill_token_threshold": 100,
            "enable_chunked_prefill": True,
            "watermark": 0.0,
            "async_scheduling": False,  # never on the CPU
        },
        "blocks": 24,
        "block_size": 32,
        "caching": True,
        "requests": [{"step": 0, "prompt": p, "output": rng.randint(1, 80), "priority": 0} for p in prompts],
    }
    [found] = vllm_steps(tmp_path, [case])
    assert any(step["preempted"] for step in found["steps"])
    assert not difference(case, found)
    without, recorded = found["outputs"]
    assert recorded == without
