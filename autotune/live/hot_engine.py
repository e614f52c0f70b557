# ruff: noqa: SLF001  # vLLM has no public names for its tables of CUDA graphs
"""A plugin that vLLM loads in each of its processes: it makes an idle engine what a fresh start with less would be.

The engine gets a new scheduler, made by vLLM's own class as its constructor makes it; the workers use those of their
CUDA graphs that a fresh start would have captured, by vLLM's own table. Nothing has changed if a step of that fails.
Weights, kernels and the memory of the KV cache stay. It needs the standard library alone; tests/test_hot.py says what
broke when vLLM changes.
"""

import copy
import gc
import inspect
import time
from dataclasses import replace
from functools import wraps
from typing import Any

PARTS = ("scheduler_config", "cache_config", "compilation_config")  # of vLLM's configuration, that `change` may change


def install() -> None:
    """Give vLLM's engine and workers the methods that `change` needs; a vLLM without their classes stays as it is."""
    try:
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.worker.worker_base import WorkerBase
    except ImportError:  # another vLLM than those that are known; the API server finds no method and says so
        return
    constructor = Scheduler.__init__

    @wraps(constructor)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(inspect.signature(constructor).bind(self, *args, **kwargs).arguments)
        given.pop("self")
        self.autotune_given = given
        constructor(self, *args, **kwargs)

    Scheduler.__init__ = remembering
    EngineCore.autotune_change = change
    WorkerBase.autotune_kv_bytes = kv_bytes
    WorkerBase.autotune_use_graphs = use_graphs


def change(core: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Change the engine's configuration, by dotted names, from its start's; returns what is active, or an `error`."""
    try:
        began = time.perf_counter()
        if busy := what_keeps_busy(core):
            return {"error": f"not idle: {busy}"}
        active = _changed(core, changes)
        return active | {"seconds": time.perf_counter() - began}
    except Exception as error:  # whatever it is, the engine goes on as it was
        return {"error": f"{type(error).__name__}: {error}"}


def what_keeps_busy(core: Any) -> str:
    scheduler = core.scheduler
    if scheduler.requests:
        return f"{len(scheduler.requests)} requests"
    if core.batch_queue:
        return "a step is in flight"
    if scheduler.has_requests():
        return "the workers have not heard of finished requests"
    return "" if core.input_queue.empty() else "messages wait"


def _changed(core: Any, changes: dict[str, Any]) -> dict[str, Any]:
    old = core.scheduler
    if not hasattr(core, "autotune_start"):
        core.autotune_start = (old.autotune_given, core.request_block_hasher)
    given, hasher = core.autotune_start
    start = given["vllm_config"]
    config = copy.copy(start)
    for part in PARTS:
        setattr(config, part, copy.copy(getattr(start, part)))
    for name, value in changes.items():
        part, _, field = name.partition(".")
        setattr(getattr(config, part), field, value)
    wanted = order(config)
    blocks = kv_blocks(core, given["kv_cache_config"], config, wanted)
    config.cache_config.num_gpu_blocks = blocks
    kv = replace(given["kv_cache_config"], num_blocks=blocks)
    new = config.scheduler_config.get_scheduler_cls()(**(given | {"vllm_config": config, "kv_cache_config": kv}))
    # The last that can fail: then the workers go back.
    graphs = core.model_executor.collective_rpc("autotune_use_graphs", args=(wanted,))
    if failed := [one["error"] for one in graphs if "error" in one]:
        core.model_executor.collective_rpc("autotune_use_graphs", args=(order(old.vllm_config),))
        raise ValueError(failed[0])
    core.scheduler = new
    core.request_block_hasher = hasher if config.cache_config.enable_prefix_caching else None
    gc.unfreeze()  # the heap as after a start: what is in use is never looked at again
    gc.collect()
    gc.freeze()
    return {**active(core), **graphs[0]}


def order(config: Any) -> dict[str, Any]:
    """Return what a worker has to know of vLLM's configuration `config`."""
    return {
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "capture_sizes": list(config.compilation_config.cudagraph_capture_sizes or []),
        "max_capture_size": config.compilation_config.max_cudagraph_capture_size,
        "gpu_memory_utilization": config.cache_config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes,
    }


def active(core: Any) -> dict[str, Any]:
    """Read back what decides how the engine schedules, from the scheduler that it has."""
    scheduler = core.scheduler
    config = scheduler.scheduler_config
    return {
        "scheduler_config.max_num_seqs": scheduler.max_num_running_reqs,
        "scheduler_config.max_num_batched_tokens": config.max_num_batched_tokens,
        "scheduler_config.long_prefill_token_threshold": config.long_prefill_token_threshold,
        "scheduler_config.enable_chunked_prefill": config.enable_chunked_prefill,
        "scheduler_config.policy": scheduler.policy.value,
        "cache_config.enable_prefix_caching": scheduler.kv_cache_manager.enable_caching,
        "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
        "kv_blocks": scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        "kv_tokens": scheduler.kv_cache_manager.block_pool.num_gpu_blocks * scheduler.cache_config.block_size,
    }


def kv_blocks(core: Any, start: Any, config: Any, wanted: dict[str, Any]) -> int:
    """Count the blocks that a fresh start would have, at most those of the start.

    They may be fewer by what the activations of the start's largest step take beyond the wanted one's. Raises
    ValueError if a sequence of the greatest length does not fit, as a fresh start does.
    """
    blocks = config.cache_config.num_gpu_blocks_override
    if blocks is None:
        sizes = core.model_executor.collective_rpc("autotune_kv_bytes", args=(wanted,))
        each = sum(tensor.size for tensor in start.kv_cache_tensors) // start.num_blocks
        blocks = min(start.num_blocks if size is None else size // each for size in sizes)
    blocks = min(blocks, start.num_blocks)
    for group in start.kv_cache_groups:
        longest = -(-group.kv_cache_spec.max_memory_usage_bytes(config) // group.kv_cache_spec.page_size_bytes)
        if blocks < longest:
            raise ValueError(f"{blocks} KV blocks are too few for one sequence of max_model_len, which takes {longest}")
    return int(blocks)


def kv_bytes(worker: Any, wanted: dict[str, Any]) -> int | None:
    """Return the bytes that vLLM would give the KV cache if it had to do with the memory wanted; None on a CPU."""
    if worker.device.type == "cpu":
        return None
    if wanted["kv_cache_memory_bytes"]:
        return int(wanted["kv_cache_memory_bytes"])
    less = worker.requested_memory - worker.init_snapshot.total_memory * wanted["gpu_memory_utilization"]
    return int(worker.available_kv_cache_memory_bytes - less)


def use_graphs(worker: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Let steps run as those CUDA graphs that a fresh start would have.

    Returns how many there are and how many were captured, or an `error` if one was not; then nothing has changed.
    """
    runner = worker.model_runner
    try:
        if getattr(runner, "cudagraph_manager", None) is not None:
            counted = _manager_table(runner, wanted)
        elif getattr(getattr(runner, "cudagraph_dispatcher", None), "cudagraph_mode", None):
            counted = _dispatcher_table(runner, wanted)
        else:  # enforce_eager, or a CPU
            return {"graphs": 0, "captured": 0, "largest_graph": 0}
        for builder in builders(runner):  # FlashAttention splits a step's work up to the largest graph
            if getattr(builder, "max_cudagraph_size", None) is not None:
                builder.max_cudagraph_size = wanted["max_capture_size"]
        return counted
    except Exception as error:  # the engine reads it
        return {"error": f"CUDA graphs: {type(error).__name__}: {error}"}


def builders(runner: Any) -> list[Any]:
    """List the objects that prepare attention's metadata."""
    groups = [group for several in getattr(runner, "attn_groups", None) or [] for group in several]
    return [builder for group in groups for builder in getattr(group, "metadata_builders", None) or []]


def _shadow(config: Any, wanted: dict[str, Any]) -> Any:
    """Copy vLLM's configuration, with the graph sizes and sequences that are wanted."""
    shadow = copy.copy(config)
    shadow.compilation_config = copy.copy(config.compilation_config)
    shadow.compilation_config.cudagraph_capture_sizes = list(wanted["capture_sizes"])
    shadow.compilation_config.max_cudagraph_capture_size = wanted["max_capture_size"]
    shadow.scheduler_config = copy.copy(config.scheduler_config)
    shadow.scheduler_config.max_num_seqs = wanted["max_num_seqs"]
    return shadow


def _counted(owner: Any, made: dict[Any, Any], captured: dict[Any, Any]) -> dict[str, Any]:
    """Count the graphs of the tables `made`; all were `captured` by `owner` before its first change, or it raises."""
    if not hasattr(owner, "autotune_captured"):
        owner.autotune_captured = set().union(*captured.values())
    used = set().union(*made.values())
    if missing := used - owner.autotune_captured:
        raise ValueError(f"{len(missing)} were not captured, one of them {next(iter(missing))}")
    largest = max((graph.num_tokens for graph in used), default=0)
    return {"graphs": len(used), "captured": len(owner.autotune_captured), "largest_graph": largest}


def _manager_table(runner: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Fill the table of vLLM's model runner V2, `_candidates`, by its own `_init_candidates`."""
    manager = runner.cudagraph_manager
    filled = copy.copy(manager)
    filled.vllm_config = _shadow(runner.vllm_config, wanted)
    filled.compilation_config = filled.vllm_config.compilation_config
    filled.max_num_reqs = wanted["max_num_seqs"]
    filled._candidates, filled._capture_descs = {}, {}
    filled._init_candidates()
    counted = _counted(manager, filled._capture_descs, manager._capture_descs)
    manager._candidates = filled._candidates
    return counted


def _dispatcher_table(runner: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Fill the table of vLLM's model runner V1, `cudagraph_keys`, by its own `initialize_cudagraph_keys`."""
    dispatcher = runner.cudagraph_dispatcher
    filled = copy.copy(dispatcher)
    filled.vllm_config = _shadow(runner.vllm_config, wanted)
    filled.compilation_config = filled.vllm_config.compilation_config
    filled.cudagraph_keys = {mode: set() for mode in dispatcher.cudagraph_keys}
    filled.initialize_cudagraph_keys(filled.cudagraph_mode, filled.uniform_decode_query_len)
    counted = _counted(dispatcher, filled.cudagraph_keys, dispatcher.cudagraph_keys)
    vars(dispatcher).update(vars(filled), autotune_captured=dispatcher.autotune_captured)
    return counted
