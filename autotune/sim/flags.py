"""What vLLM makes of its flags: defaults filled in, combinations refused, a server described."""

from collections.abc import Mapping
from typing import Any

from autotune.config import vllm_flags
from autotune.config.schema import Device
from autotune.sim.cost import Serving, Shape

# Flags that the simulator models, with vLLM's defaults; None: it depends on the device, the model or other flags.
MODELLED: dict[str, Any] = {
    "max_num_seqs": None,
    "max_num_batched_tokens": None,
    "max_model_len": None,
    "block_size": None,
    "gpu_memory_utilization": 0.92,
    "long_prefill_token_threshold": 0,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "async_scheduling": None,
    "watermark": 0.0,
    "scheduling_policy": "fcfs",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "enforce_eager": False,
    "max_cudagraph_capture_size": None,
    "cudagraph_capture_sizes": None,
}
# Flags that change nothing that is simulated.
HARMLESS = ("load_format", "dtype", "seed", "disable_log_stats", "enable_logging_iteration_details")


def resolve(args: Mapping[str, Any], device: Device, shape: Shape) -> dict[str, Any]:
    """Every modelled flag with the value that vLLM would run with."""
    given = {name: value for name, value in args.items() if name in MODELLED and value is not None}
    flags = MODELLED | {"max_model_len": shape.max_len, "block_size": device.block_size} | given
    if flags["max_num_batched_tokens"] is None:
        least = 0 if flags["enable_chunked_prefill"] else flags["max_model_len"]
        flags["max_num_batched_tokens"] = max(device.max_num_batched_tokens, least)
    if flags["max_num_seqs"] is None:
        flags["max_num_seqs"] = min(device.max_num_seqs, flags["max_num_batched_tokens"])
    flags["async_scheduling"] = device.async_scheduling and flags["async_scheduling"] is not False
    if flags["max_cudagraph_capture_size"] is None:
        flags["max_cudagraph_capture_size"] = max(
            flags["cudagraph_capture_sizes"] or [min(512, 2 * flags["max_num_seqs"])]
        )
    return flags


def refusal(flags: Mapping[str, Any], device: Device, shape: Shape) -> str:
    """Why vLLM, or the simulator, would not start with these resolved flags; empty if it would."""
    tokens, seqs, longest = flags["max_num_batched_tokens"], flags["max_num_seqs"], flags["max_model_len"]
    if tokens < seqs:
        return f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs})"
    if not flags["enable_chunked_prefill"] and tokens < longest:
        return f"without chunked prefill max_num_batched_tokens ({tokens}) must be at least max_model_len ({longest})"
    if shape.heads % flags["tensor_parallel_size"]:
        return f"{shape.heads} attention heads can't be split by tensor_parallel_size {flags['tensor_parallel_size']}"
    if vllm_flags.gpus(flags) > device.gpus:
        return f"tensor × pipeline × data parallel size {vllm_flags.gpus(flags)}, and {device.name} has {device.gpus}"
    if flags["pipeline_parallel_size"] > 1:
        return "the simulator has no pipeline parallelism"
    if flags["block_size"] % device.block_size:
        return f"block_size {flags['block_size']}: {device.name} takes multiples of {device.block_size}"
    if device.fp8_tflops is None and flags["quantization"] == "fp8":
        return f"{device.name} has no fp8 matrix product"
    return ""


def serving(flags: Mapping[str, Any]) -> Serving:
    """The part of resolved flags that a step's cost depends on."""
    sizes = flags["cudagraph_capture_sizes"] or [1, 2, 4, *range(8, 256, 8), *range(256, 1 << 20, 16)]
    largest = min(flags["max_cudagraph_capture_size"], flags["max_num_batched_tokens"])
    return Serving(
        tensor_parallel_size=flags["tensor_parallel_size"],
        max_num_seqs=flags["max_num_seqs"],
        max_num_batched_tokens=flags["max_num_batched_tokens"],
        gpu_memory_utilization=flags["gpu_memory_utilization"],
        fp8_weights=flags["quantization"] == "fp8",
        fp8_kv=str(flags["kv_cache_dtype"]).startswith("fp8"),
        async_scheduling=flags["async_scheduling"],
        enforce_eager=flags["enforce_eager"],
        graph_sizes=() if flags["enforce_eager"] else tuple(size for size in sorted(sizes) if size <= largest),
    )
