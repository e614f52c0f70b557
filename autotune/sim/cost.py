"""What vLLM's work costs on a device: seconds of a step, bytes of memory, seconds of a start.

FLOPs and bytes are counted from the model's config.json; the device's YAML holds the rates and the few constants
fitted to measurements.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from autotune.config.schema import Device
from autotune.errors import InputError
from autotune.sim.scheduler import Batch

GIB = 1 << 30
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Shape:
    """A dense decoder, as its config.json describes it; numbers of parameters, heads and tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool  # the embedding is the output layer, too
    max_len: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Raises InputError for a model that is not a dense decoder."""
        missing = [name for name in FIELDS if not isinstance(config.get(name), int)]
        if missing or any("expert" in name for name in config):
            why = f"config.json has no {missing[0]}" if missing else "it has experts"
            raise InputError(f"backend=sim knows dense decoders, and this model is none ({why}); use backend=live")
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            max_len=config.get("max_position_embeddings", 4096),
        )

    @property
    def linear(self) -> int:
        """Parameters that each token is multiplied with, all layers."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding(self) -> int:
        return self.hidden * self.vocab


@dataclass(frozen=True)
class Serving:
    """The flags of `vllm serve` that cost depends on, resolved."""

    tensor_parallel_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    fp8_weights: bool
    fp8_kv: bool
    async_scheduling: bool
    enforce_eager: bool
    graph_sizes: tuple[int, ...]  # tokens of the captured CUDA graphs, ascending


class Step(NamedTuple):
    """Seconds of one step's parts."""

    prepare_s: float  # host, before the GPU can begin
    launch_s: float  # host, while the GPU may run already
    gpu_s: float


class Cost:
    def __init__(self, device: Device, shape: Shape, serving: Serving) -> None:
        self.device, self.shape, self.serving = device, shape, serving
        tp = serving.tensor_parallel_size
        products = device.tflops * 1e12 * device.math_efficiency
        quantised = (device.fp8_tflops or 0.0) * 1e12 * device.math_efficiency if serving.fp8_weights else products
        bandwidth = device.bandwidth_gbs * 1e9 * device.bandwidth_efficiency
        self.weight_bytes = shape.linear * (1 if serving.fp8_weights else 2) / tp
        self.output_bytes = shape.embedding * 2 / tp
        self.kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_size * (1 if serving.fp8_kv else 2) / tp
        # Tokens read and written around the matrix products: norms, residuals, rotations, activations.
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
        more = device.eager_factor if serving.enforce_eager else device.fp8_factor if serving.fp8_weights else 1.0
        self._launch_s = device.launch_s * shape.layers * more
        self._piecewise_s = device.piecewise_s * shape.layers

    def step(self, batch: Batch) -> Step:
        device, sizes = self.device, self.serving.graph_sizes
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
        """Tokens that fit the KV cache of one GPU's share. Negative if the weights alone do not fit."""
        device, serving, shape = self.device, self.serving, self.shape
        if device.kv_gib is not None:
            return int(device.kv_gib * GIB / self.kv_bytes)
        tp = serving.tensor_parallel_size
        weights = self.weight_bytes + (1 if shape.tied else 2) * self.output_bytes
        step = 2 * serving.max_num_batched_tokens * (3 * shape.hidden + 2 * shape.intermediate / tp)
        activations = max(device.activations_gib * GIB, device.workspace_gib * GIB + step)
        room = device.memory_gib * serving.gpu_memory_utilization * GIB - device.other_gib * GIB - weights - activations
        return int(room / self.kv_bytes)

    def logits_bytes(self) -> float:
        """What vLLM's sampler takes while it warms up with max_num_seqs sequences: float32 logits, twice."""
        return 2 * 4 * self.serving.max_num_seqs * self.shape.vocab / self.serving.tensor_parallel_size

    def spare_bytes(self) -> float:
        """Memory that gpu_memory_utilization leaves, less the CUDA graphs; a CPU has enough."""
        if self.device.kv_gib is not None:
            return math.inf
        left = (1 - self.serving.gpu_memory_utilization) * self.device.memory_gib
        graphs = sum(size <= self.serving.max_num_seqs for size in self.serving.graph_sizes)
        return (left - self.device.graph_gib * graphs) * GIB

    @property
    def start_s(self) -> float:
        """Seconds from launch to healthy, with nothing cached of this configuration."""
        return sum(self.start().values())

    def start(self) -> dict[str, float]:
        """The same by part."""
        device = self.device
        return {
            "import": device.import_s,
            "weights": (self.weight_bytes + 2 * self.output_bytes) / (device.load_gbs * 1e9),
            "compile": 0.0 if self.serving.enforce_eager else device.compile_s,
            "graphs": device.capture_s * len(self.serving.graph_sizes),
            "warmup": device.warmup_s,
        }
