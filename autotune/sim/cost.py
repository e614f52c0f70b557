"""The cost of vLLM's work on a device: seconds of a step, bytes of memory, seconds of a start.

FLOPs and bytes are counted from the model's config.json; the device's YAML holds the rates and the few constants
fitted to measurements.
"""

import math
from bisect import bisect_left
from typing import NamedTuple

from autotune.config.schema import Device
from autotune.sim.flags import Flags
from autotune.sim.scheduler import Batch
from autotune.sim.shape import Shape

GIB = 1 << 30


class Step(NamedTuple):
    """Seconds of one step's parts."""

    prepare_s: float  # host, before the GPU can begin
    launch_s: float  # host, while the GPU may already run
    gpu_s: float


class Cost:
    """The cost on `device` of serving a model of `shape` with `flags`; bytes and FLOPs are one GPU's share."""

    def __init__(self, device: Device, shape: Shape, flags: Flags) -> None:
        self.device, self.shape, self.flags = device, shape, flags
        tp = flags.tensor_parallel_size
        products = device.tflops * 1e12 * device.math_efficiency
        quantised = (device.fp8_tflops or 0.0) * 1e12 * device.math_efficiency if flags.fp8_weights else products
        bandwidth = device.bandwidth_gbs * 1e9 * device.bandwidth_efficiency
        self.weight_bytes = shape.linear * (1 if flags.fp8_weights else 2) / tp
        self.output_bytes = shape.embedding * 2 / tp
        self.kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_size * (1 if flags.fp8_kv else 2) / tp
        # A token's bytes around the matrix products: norms, residuals, rotations, activations.
        token_bytes = 2 * shape.layers * (10 * shape.hidden + 4 * shape.intermediate / tp)
        self._weights_s = self.weight_bytes / bandwidth
        self._output_s = self.output_bytes / bandwidth
        self._product_s = 2 * shape.linear / tp / quantised  # a token
        self._token_s = token_bytes / bandwidth
        self._logits_s = 2 * shape.embedding / tp / products + 6 * 4 * shape.vocab / tp / bandwidth  # a sequence
        self._attended_s = (
            4 * shape.layers * shape.heads * shape.head_size / tp / (products * device.attention_efficiency)
        )
        self._context_s = self.kv_bytes / (bandwidth * device.attention_efficiency)
        if tp > 1:  # two all-reduces a layer
            self._token_s += 4 * shape.layers * shape.hidden * 2 * (tp - 1) / tp / (device.link_gbs * 1e9)
        self._fixed_s = device.step_s + (2 * shape.layers * device.link_s if tp > 1 else 0.0)
        more = device.eager_factor if flags.enforce_eager else device.fp8_factor if flags.fp8_weights else 1.0
        self._launch_s = device.launch_s * shape.layers * more
        self._piecewise_s = device.piecewise_s * shape.layers

    def step(self, batch: Batch) -> Step:
        """Seconds of the step that computes `batch`."""
        device, sizes = self.device, self.flags.graph_sizes
        tokens = batch.tokens
        sequences = batch.decodes + len(batch.chunks)
        launch_s = 0.0
        if sizes and tokens <= sizes[-1]:
            tokens = sizes[bisect_left(sizes, tokens)]  # a graph computes its padding, too
            launch_s = self._piecewise_s if batch.chunks else 0.0
        else:
            launch_s = self._launch_s
        products = (self._weights_s**3 + (tokens * self._product_s) ** 3) ** (1 / 3)
        gpu_s = (
            self._fixed_s
            + products
            + tokens * self._token_s
            + batch.attended * self._attended_s
            + batch.context * self._context_s
            + self._output_s
            + sequences * self._logits_s
        )
        return Step(device.host_s + device.host_sequence_s * sequences, launch_s, gpu_s)

    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds; negative if the weights alone do not fit the GPU."""
        device, flags, shape = self.device, self.flags, self.shape
        if device.kv_gib is not None:
            return int(device.kv_gib * GIB / self.kv_bytes)
        tp = flags.tensor_parallel_size
        weights = self.weight_bytes + (1 if shape.tied else 2) * self.output_bytes
        step = 2 * flags.max_num_batched_tokens * (3 * shape.hidden + 2 * shape.intermediate / tp)
        activations = max(device.activations_gib * GIB, device.workspace_gib * GIB + step)
        room = device.memory_gib * flags.gpu_memory_utilization * GIB - device.other_gib * GIB - weights - activations
        return int(room / self.kv_bytes)

    def logits_bytes(self) -> float:
        """Memory that vLLM's sampler takes in its warm-up with max_num_seqs sequences: float32 logits, twice."""
        return 2 * 4 * self.flags.max_num_seqs * self.shape.vocab / self.flags.tensor_parallel_size

    def spare_bytes(self) -> float:
        """Memory that gpu_memory_utilization leaves, less the CUDA graphs; infinite on a CPU."""
        if self.device.kv_gib is not None:
            return math.inf
        left = (1 - self.flags.gpu_memory_utilization) * self.device.memory_gib
        graphs = sum(size <= self.flags.max_num_seqs for size in self.flags.graph_sizes)
        return (left - self.device.graph_gib * graphs) * GIB

    @property
    def start_s(self) -> float:
        """Seconds from launch to healthy, without vLLM's cache of compiled code."""
        return sum(self.start().values())

    def start(self) -> dict[str, float]:
        """Seconds from launch to healthy, by part."""
        device = self.device
        return {
            "import": device.import_s,
            "weights": (self.weight_bytes + 2 * self.output_bytes) / (device.load_gbs * 1e9),
            "compile": 0.0 if self.flags.enforce_eager else device.compile_s,
            "graphs": device.capture_s * len(self.flags.graph_sizes),
            "warmup": device.warmup_s,
        }
