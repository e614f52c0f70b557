"""A stand-in for vLLM, whose trials take no time: more sequences are more tokens/s and a higher TPOT."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

from autotune.config.schema import Kind, ScenarioConfig
from autotune.config.vllm_flags import recorded
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import StartError
from autotune.measure import progress
from autotune.measure.backend import DryRunOutcome, Measurement, RequestTiming
from autotune.measure.slot import Slot

DEFAULTS = {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.9}
FASTEST = 256  # sequences; beyond, TPOT grows faster than they do
LEAST_MEMORY = 0.5  # of gpu_memory_utilization
FLATTERED = 1.1  # factor by which a server that trials share is too fast
START_S = 100.0  # that a start claims to take


@dataclass
class StandInConfig:
    _target_: str = MISSING
    steps: int = 0  # how often a run publishes what it has measured so far
    pace_s: float = 0.02  # between them
    shares: bool = False
    bounds: dict[str, Any] | None = None  # as a live backend's


class StandIn:
    Config = StandInConfig
    needs_weights = False
    facts: ClassVar[dict[str, str]] = {}
    flags: ClassVar[tuple[str, ...]] = tuple(recorded())

    def __init__(self, config: StandInConfig, cache_dir: Path) -> None:
        self.config = config
        self.shares = config.shares

    def read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Take every flag as it is."""
        return dict(args)

    def prepare_dry_runs(self) -> None:
        """They take no time."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        resolved = DEFAULTS | {name: value for name, value in args.items() if value is not None}
        tokens = resolved["max_num_batched_tokens"]
        seqs = resolved.setdefault("max_num_seqs", min(1024, tokens))
        refusal = f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs})" if tokens < seqs else ""
        return DryRunOutcome(refusal, resolved)

    @contextmanager
    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, slot: Slot
    ) -> Iterator["StandInEngine"]:
        resolved = self.dry_run(model, args).resolved
        if resolved["gpu_memory_utilization"] < LEAST_MEMORY:
            raise StartError("no memory is left for the KV cache", START_S)
        shared = slot.shares and self.config.bounds is not None
        if shared and slot.server is None:
            slot.server = slot.keep(nullcontext(folder.name))
        facts = {"server": f"shared: started by {slot.server} in {os.getpid()}" if shared else "fresh"}
        flattered = FLATTERED if shared else 1.0
        yield StandInEngine(resolved["max_num_seqs"], folder, self.config, facts, flattered)


@dataclass(frozen=True)
class StandInEngine:
    seqs: int
    folder: Path  # the trial's
    config: StandInConfig
    facts: dict[str, str]
    speed: float
    start: dict[str, float] = field(default_factory=lambda: {"import": START_S})
    command: list[str] = field(default_factory=lambda: ["vllm", "serve", "model"])
    estimated: bool = True

    def run(self, scenario: ScenarioConfig, folder: Path) -> Measurement:
        """`seqs` requests at once, of 100 tokens each."""
        tpot_s = 0.01 + 0.0001 * self.seqs + 0.0005 * max(0, self.seqs - FASTEST)
        last_s = (0.01 + 99 * tpot_s) / self.speed
        for step in range(self.config.steps):
            progress.publish(self.folder, step, {"tokens_per_s": 100 * self.seqs / last_s})
            progress.check(self.folder)
            time.sleep(self.config.pace_s)
        requests = [RequestTiming(number, 0.0, 0.01, last_s, 100) for number in range(self.seqs)]
        held = scenario.kind is not Kind.Server or scenario.qps < self.seqs / last_s
        verdict, reasons = ("VALID", []) if held else ("INVALID", ["TPOT over its limit"])
        return Measurement(requests, 0, len(requests), verdict, reasons, {}, {"run": last_s})

    def recorded(self) -> None:
        """It has no steps."""
