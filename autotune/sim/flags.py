"""vLLM's flags as its configuration resolves them: defaults filled in, combinations refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from autotune.config import vllm_flags
from autotune.config.schema import Device
from autotune.sim.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags that the simulator models, resolved. Those without a default depend on the device or the model."""

    max_num_seqs: int
    max_num_batched_tokens: int  # vLLM refuses less than max_num_seqs
    max_model_len: int
    block_size: int
    gpu_memory_utilization: float = 0.92
    num_gpu_blocks_override: int | None = None  # of the KV cache
    max_num_active_seqs: int | None = None  # of max_num_seqs; null: all
    long_prefill_token_threshold: int = 0
    long_prefill_token_threshold_adaptive: bool = False  # at least an equal share of the step
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    async_scheduling: bool
    watermark: float = 0.0  # share of the KV cache's blocks
    scheduling_policy: str = "fcfs"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enforce_eager: bool = False
    max_cudagraph_capture_size: int
    cudagraph_capture_sizes: list[int] | None = None

    @property
    def fp8_weights(self) -> bool:
        return self.quantization == "fp8"

    @cached_property
    def graph_sizes(self) -> tuple[int, ...]:
        """Tokens of the captured CUDA graphs, ascending."""
        if self.enforce_eager:
            return ()
        sizes = self.cudagraph_capture_sizes or [1, 2, 4, *range(8, 256, 8), *range(256, 1 << 20, 16)]
        largest = min(self.max_cudagraph_capture_size, self.max_num_batched_tokens)
        return tuple(size for size in sorted(sizes) if size <= largest)


KV_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head")
AUTO = -1  # max_model_len: as long as the model and the memory allow
MODELLED = frozenset(field.name for field in fields(Flags))
# Flags that change nothing in a simulation.
HARMLESS = (
    *("load_format", "dtype", "seed", "disable_log_stats", "enable_logging_iteration_details"),
    *("tokenizer", "tokenizer_mode", "tokenizer_revision", "hf_config_path", "trust_remote_code"),  # data.models knows
    "language_model_only",
)


def resolve(args: Mapping[str, Any], device: Device, shape: Shape) -> Flags:
    """The modelled flags with the values that vLLM would run with, given `args`; null and missing ones are its own."""
    given = {name: value for name, value in args.items() if name in MODELLED and value is not None}
    if given.get("max_model_len", AUTO) == AUTO:
        given["max_model_len"] = shape.max_len
    max_len = given["max_model_len"]
    given.setdefault("block_size", device.default_block_size or device.block_size)
    least = 0 if given.get("enable_chunked_prefill", Flags.enable_chunked_prefill) else max_len
    tokens = given.setdefault("max_num_batched_tokens", max(device.max_num_batched_tokens, least))
    seqs = given.setdefault("max_num_seqs", min(device.max_num_seqs, tokens))
    given["async_scheduling"] = device.async_scheduling and given.get("async_scheduling") is not False
    sizes = given.get("cudagraph_capture_sizes") or [min(512, 2 * seqs)]
    given.setdefault("max_cudagraph_capture_size", max(sizes))
    return Flags(**given)


def refusal(flags: Flags, device: Device, shape: Shape) -> str:
    """The reason why vLLM, or the simulator, would not start with `flags`; empty if it would."""
    tokens, seqs, longest = flags.max_num_batched_tokens, flags.max_num_seqs, flags.max_model_len
    tp, gpus = flags.tensor_parallel_size, vllm_flags.gpus(asdict(flags))
    if tokens < seqs:
        return f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs})"
    if (active := flags.max_num_active_seqs or 0) > seqs:
        return f"max_num_active_seqs ({active}) must be at most max_num_seqs ({seqs})"
    if not flags.enable_chunked_prefill and tokens < longest:
        return f"without chunked prefill max_num_batched_tokens ({tokens}) must be at least max_model_len ({longest})"
    if shape.heads % tp:
        return f"{shape.heads} attention heads can't be split by tensor_parallel_size {tp}"
    if gpus > device.gpus:
        return f"tensor × pipeline × data parallel size {gpus}, and {device.name} has {device.gpus}"
    if flags.pipeline_parallel_size > 1:
        return "the simulator has no pipeline parallelism"
    if flags.quantization not in (None, "fp8"):
        return f"the simulator has no quantization={flags.quantization}"
    if flags.kv_cache_dtype not in KV_DTYPES:
        return f"the simulator has no kv_cache_dtype={flags.kv_cache_dtype}"
    if longest < 1:
        return f"max_model_len={longest} leaves no token"
    if longest > shape.max_len:
        return f"max_model_len={longest}: the model takes at most {shape.max_len} tokens"
    if flags.block_size % device.block_size:
        return f"block_size {flags.block_size}: {device.name} takes multiples of {device.block_size}"
    if device.fp8_tflops is None and flags.fp8_weights:
        return f"{device.name} has no fp8 matrix product"
    return ""
