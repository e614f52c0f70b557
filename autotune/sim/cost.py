"""The cost of vLLM's work on a device: seconds of a step, bytes of memory, seconds of a start.

FLOPs and bytes are counted from the model's config.json; the device's YAML holds the rates and the few constants
fitted to measurements.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from autotune.config.schema import Device
from autotune.sim.flags import Flags
from autotune.sim.scheduler import Batch
from autotune.sim.shape import Shape

GIB = 1 << 30
PAUSES_BETWEEN = 1.0  # from one trial to the next, of how often they come: as a logarithm; others' programs come and go
POWER = 3.0
# Launching a layer with experts takes so many times as long as a dense one: 1.6 to 2.4 in the steps of seven servers of
# Qwen3-30B-A3B's shape, on three hosts (datasets/steps, docs/simulator.md).
EXPERTS_LAUNCH = 2.0


class Step(NamedTuple):
    """Seconds of one step's parts; numbers, or arrays of many steps."""

    prepare_s: Any  # host, before the GPU can begin
    launch_s: Any  # host, while the GPU may already run
    gpu_s: Any
    return_s: Any  # from the step's end on the GPU to the scheduler
    eager: Any = False  # no CUDA graph holds it


class Work(NamedTuple):
    """Work of a step; numbers, or arrays of many steps."""

    tokens: Any  # a CUDA graph's padding included
    touched: Any  # share of the experts
    attended: Any  # tokens that each prefilled token attends to, summed
    context: Any  # the decodes' tokens in the KV cache, summed
    sequences: Any
    in_graph: Any  # 1 if a CUDA graph holds the step
    prefills: Any  # 1 if it has a prefill
    by_size: Any = 1.0  # factor on the GPU's time, of steps with so many tokens


# Of a step, in seconds: what `seconds` sums. Some are from the device's YAML, the others count bytes and FLOPs.
CONSTANTS = (
    *("fixed_s", "weights_s", "experts_s", "product_s", "token_s", "attended_s", "context_s", "sequence_s"),
    *("return_s", "prepare_s", "prepare_sequence_s", "launch_s", "piecewise_s"),
)
ON_HOST = slice(CONSTANTS.index("prepare_s"), None)


def seconds(constants: Iterable[float], work: Work) -> Step:
    """Seconds of `work` with these CONSTANTS."""
    fixed, weights, experts, product, token, attended, context, sequence, *host = constants
    back, prepare, each, launch, piecewise = host
    products = ((weights + experts * work.touched) ** POWER + (work.tokens * product) ** POWER) ** (1 / POWER)
    return Step(
        prepare + each * work.sequences,
        work.in_graph * work.prefills * piecewise + (1 - work.in_graph) * launch,
        work.by_size
        * (
            fixed
            + products
            + work.tokens * token
            + work.attended * attended
            + work.context * context
            + work.sequences * sequence
        ),
        back,
        1 - work.in_graph,
    )


def size_factor(by_size: Sequence[float], tokens: Any) -> Any:
    """The factor on the GPU's time of steps with `tokens`; `by_size` has its logarithm for 1, 2, 4, … tokens."""
    return np.exp(np.interp(np.log2(np.maximum(tokens, 1)), np.arange(len(by_size)), by_size))


@dataclass(frozen=True)
class Pace:
    """Pace of the host, as it varied from one launch to the next, in their order, by kind of launch."""

    launches: tuple[float, ...] = ()  # factors on the time of steps without a graph …
    pieces: tuple[float, ...] = ()  # … and of those with prefill in one
    pauses: tuple[float, ...] = ()  # seconds for which something else had the host …
    busy_s: float = 0.0  # … in so many seconds; they come at random moments
    seed: int | None = None  # of these moments; None: no pauses

    def factors(self) -> Callable[[bool, bool], float]:
        """The factor on the host's time of one step after the other, as it was recorded from a random moment on."""
        random = np.random.default_rng(self.seed or 0)
        players = [
            itertools.cycle(np.roll(kind, random.integers(len(kind))).tolist()) if kind else None
            for kind in (self.pieces or _relative(self.launches), self.launches or _relative(self.pieces))
        ]

        def factor(launched: bool, eager: bool) -> float:
            player = players[eager]
            return next(player) if launched and player else 1.0

        return factor

    def interruptions(self, run: int) -> Callable[[float], float]:
        """Seconds for which the host is interrupted before a step of a run that begins at some time."""
        if self.seed is None or not self.pauses:
            return lambda _: 0.0
        # Each was seen once, and how often it comes is known no better: the weights of the Bayesian bootstrap.
        known = np.random.default_rng(self.seed)
        weights = known.exponential(size=len(self.pauses)) * known.lognormal(0, PAUSES_BETWEEN)
        every_s, shares = self.busy_s / weights.sum(), weights / weights.sum()
        random = np.random.default_rng((self.seed, run))
        next_s = random.exponential(every_s)

        def pause(now: float) -> float:
            nonlocal next_s
            if now < next_s:
                return 0.0
            next_s = now + random.exponential(every_s)
            return float(random.choice(self.pauses, p=shares))

        return pause


def _relative(factors: tuple[float, ...]) -> tuple[float, ...]:
    """The pace of the other kind of launch, none of this kind being recorded: how it varied, not how fast it was."""
    return tuple((np.array(factors) / np.mean(factors)).tolist()) if factors else ()


class Cost:
    """The cost on `device` of serving a model of `shape` with `flags`; bytes and FLOPs are one GPU's share."""

    def __init__(self, device: Device, shape: Shape, flags: Flags) -> None:
        self.device, self.shape, self.flags = device, shape, flags
        self.pace, self.more_kv_bytes = Pace(), 0.0  # a twin knows them …
        self.by_size: tuple[float, ...] = (0.0,)  # … and this, for `size_factor`
        self._size_factors: dict[int, float] = {}
        self.runs = itertools.count()  # that are simulated
        tp = flags.tensor_parallel_size
        products = device.tflops * 1e12 * device.math_efficiency
        quantised = (device.fp8_tflops or 0.0) * 1e12 * device.math_efficiency if flags.fp8_weights else products
        bandwidth = device.bandwidth_gbs * 1e9 * device.bandwidth_efficiency
        attention = products * device.attention_efficiency
        size = min(shape.weight_bytes, 1.0) if flags.fp8_weights else shape.weight_bytes
        self.weight_bytes = (shape.linear + shape.expert * shape.experts) * size / tp
        self.output_bytes = shape.embedding * 2 / tp
        self.kv_bytes = shape.layers * shape.kv_values * (1 if str(flags.kv_cache_dtype).startswith("fp8") else 2) / tp
        # A token's bytes around the matrix products: norms, residuals, rotations, activations.
        token_bytes = 2 * shape.layers * (10 * shape.hidden + 4 * shape.width / tp)
        token_s, fixed_s = token_bytes / bandwidth, device.step_s + self.output_bytes / bandwidth
        if tp > 1:  # two all-reduces a layer
            token_s += 4 * shape.layers * shape.hidden * 2 * (tp - 1) / tp / (device.link_gbs * 1e9)
            fixed_s += 2 * shape.layers * device.link_s
        more = device.eager_factor if flags.enforce_eager else device.fp8_factor if flags.fp8_weights else 1.0
        self.constants: tuple[float, ...] = (
            fixed_s,
            shape.linear * size / tp / bandwidth,
            shape.expert * shape.experts * size / tp / bandwidth,
            2 * shape.active / tp / quantised,
            token_s,
            4 * shape.layers * shape.heads * shape.head_size / tp / attention,
            self.kv_bytes / (bandwidth * device.attention_efficiency),
            2 * shape.embedding / tp / products + 6 * 4 * shape.vocab / tp / bandwidth,
            0.0,
            device.host_s,
            device.host_sequence_s,
            device.launch_s * shape.layers * (EXPERTS_LAUNCH if shape.experts else 1.0) * more,
            device.piecewise_s * shape.layers,
        )

    def step(self, batch: Batch) -> Step:
        """Seconds of the step that computes `batch`."""
        tokens, prefills, sizes = batch.tokens, len(batch.chunks), self.flags.graph_sizes
        in_graph = bool(sizes) and tokens <= sizes[-1]
        padded = sizes[bisect_left(sizes, tokens)] if in_graph else tokens  # a graph computes its padding, too
        if padded not in self._size_factors:
            self._size_factors[padded] = float(size_factor(self.by_size, padded))
        factor, sequences = self._size_factors[padded], batch.decodes + prefills
        touched = self.shape.touched(tokens)
        work = Work(padded, touched, batch.attended, batch.context, sequences, in_graph, prefills > 0, factor)
        return seconds(self.constants, work)

    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds; negative if the weights alone do not fit the GPU."""
        device, flags, shape = self.device, self.flags, self.shape
        if flags.num_gpu_blocks_override is not None:
            return flags.num_gpu_blocks_override * flags.block_size
        if device.kv_gib is not None:
            return int(device.kv_gib * GIB / self.kv_bytes)
        tp = flags.tensor_parallel_size
        weights = self.weight_bytes + (1 if shape.tied else 2) * self.output_bytes
        step = 2 * flags.max_num_batched_tokens * (3 * shape.hidden + 2 * shape.width / tp)
        activations = max(device.activations_gib * GIB, device.workspace_gib * GIB + step)
        room = device.memory_gib * flags.gpu_memory_utilization * GIB - device.other_gib * GIB - weights - activations
        return int((room + self.more_kv_bytes) / self.kv_bytes)

    def missing_bytes(self) -> float:
        """Memory that vLLM's sampler lacks in its warm-up; it takes float32 logits of max_num_seqs sequences twice.

        The share that gpu_memory_utilization leaves has to hold them, beside the CUDA graphs. A CPU lacks none.
        """
        device, flags = self.device, self.flags
        if device.kv_gib is not None:
            return -math.inf
        logits = 2 * 4 * flags.max_num_seqs * self.shape.vocab / flags.tensor_parallel_size
        graphs = sum(size <= flags.max_num_seqs for size in flags.graph_sizes)
        left = (1 - flags.gpu_memory_utilization) * device.memory_gib - device.graph_gib * graphs
        return logits - left * GIB

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
