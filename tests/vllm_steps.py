"""What vLLM's own scheduler decides, step by step: python vllm_steps.py MODEL_FOLDER <cases.json >steps.json.

A case's `config` holds fields of vLLM's SchedulerConfig. With `engine` the whole engine runs, its model included;
else the scheduler alone, with made-up tokens. With `record` its steps are recorded, too, as those of a live trial.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections import deque
from copy import copy
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from autotune.live.recorder import FOLDER, ROW, Recorder

Json = dict[str, Any]


def record(scheduler: Scheduler, first: int = 0) -> list[Json]:
    """The steps that `scheduler` will decide, with what they preempt, and finish once their output is known.

    The id of its first request begins with the number `first`.
    """
    steps: list[Json] = []
    unfinished: deque[Json] = deque()
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def number(request_id: str) -> int:
        return int(request_id.split("-")[0]) - first

    def recorded_schedule(*args: Any) -> SchedulerOutput:
        output = schedule(*args)
        tokens = output.num_scheduled_tokens
        steps.append(
            {
                "tokens": {number(i): tokens[i] for i in tokens},
                "cached": {number(i): scheduler.requests[i].num_computed_tokens - tokens[i] for i in tokens},
                "preempted": sorted(map(number, output.preempted_req_ids)),
            }
        )
        unfinished.append(steps[-1])
        return output

    def recorded_update(*args: Any) -> Any:
        before = set(scheduler.requests)
        outputs = update(*args)
        unfinished.popleft()["finished"] = sorted(map(number, before - set(scheduler.requests)))
        return outputs

    scheduler.schedule, scheduler.update_from_output = recorded_schedule, recorded_update
    return steps


class Recorded:
    """The rows that a Recorder writes of the class `scheduler`, which it changes."""

    def __init__(self, scheduler: type[Scheduler]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[FOLDER] = folder
            Recorder(scheduler)
            (written,) = Path(folder).iterdir()
            self._file = written.open("rb")

    def counts(self) -> list[list[int]]:
        """What is in each step: the columns of a row behind the times."""
        return [list(row[4:]) for row in ROW.iter_unpack(self._file.read())]


def sampling(request: Json) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=request["output"], ignore_eos=True)


def scheduler_steps(case: Json, config: VllmConfig) -> Json:
    config = copy(config)
    config.scheduler_config, config.cache_config = copy(config.scheduler_config), copy(config.cache_config)
    for name, value in case["config"].items():
        setattr(config.scheduler_config, name, value)
    config.cache_config.enable_prefix_caching = case["caching"]
    config.cache_config.block_size = case["block_size"]
    config.cache_config.num_gpu_blocks = case["blocks"] + 1  # vLLM keeps one for itself
    layers = FullAttentionSpec(block_size=case["block_size"], num_kv_heads=1, head_size=1, dtype=torch.bfloat16)
    scheduler_class = type("Own", (config.scheduler_config.get_scheduler_cls(),), {})
    recorded = Recorded(scheduler_class) if case["record"] else None
    scheduler = scheduler_class(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(case["blocks"] + 1, [], [KVCacheGroupSpec(["layer"], layers)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=case["block_size"],
    )
    steps = record(scheduler)
    hasher = get_request_block_hasher(case["block_size"], sha256) if case["caching"] else None
    coming = deque(
        (
            request["step"],
            Request(
                str(number),
                request["prompt"],
                sampling(request),
                None,
                arrival_time=number,
                priority=request["priority"],
                block_hasher=hasher,
            ),
        )
        for number, request in enumerate(case["requests"])
    )
    in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
    while coming or scheduler.requests:
        while coming and coming[0][0] <= len(steps):
            scheduler.add_request(coming.popleft()[1])
        output = scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        tokens = [[] if scheduler.requests[i].is_prefill_chunk else [1000 + int(i)] for i in ids]
        in_flight.append((output, ModelRunnerOutput(ids, {i: index for index, i in enumerate(ids)}, tokens)))
        if len(in_flight) > case["config"]["async_scheduling"]:  # as EngineCore.step_with_batch_queue does
            scheduler.update_from_output(*in_flight.popleft())
    return {"steps": steps, "counts": recorded.counts() if recorded else None}


def engine_steps(case: Json, folder: str) -> Json:
    """The steps of the second of two runs; the first one is not recorded."""
    llm = LLM(
        folder,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=512,
        block_size=case["block_size"],
        num_gpu_blocks_override=case["blocks"] + 1,
        enable_prefix_caching=case["caching"],
        **case["config"],
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    prompts = [{"prompt_token_ids": request["prompt"]} for request in case["requests"]]

    def generated() -> list[list[int]]:
        done = llm.generate(prompts, [sampling(request) for request in case["requests"]], use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in done]

    alone = generated()
    assert llm.reset_prefix_cache()
    recorded, steps = Recorded(type(scheduler)), record(scheduler, len(prompts))
    return {"steps": steps, "outputs": [alone, generated()], "counts": recorded.counts()}


def main() -> None:
    folder, cases = sys.argv[1], json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        init_none_hash(sha256)
        config = EngineArgs(folder, load_format="dummy", enforce_eager=True).create_engine_config()
        found = [engine_steps(case, folder) if case.get("engine") else scheduler_steps(case, config) for case in cases]
    json.dump(found, sys.stdout)


main()
