"""The seam between what is tuned and what measures it: a backend starts a server, each run on it returns timings."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from autotune.config.schema import ScenarioConfig
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.measure.bottleneck import ServerState
from autotune.system.leases import Lease


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request; times are seconds on the run's clock."""

    sample: int  # index into the samples
    issued: float
    first_token: float
    last_token: float
    output_tokens: int

    @property
    def ttft(self) -> float:
        return self.first_token - self.issued

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; MLPerf's (latency - TTFT) / (output tokens - 1)."""
        return (self.last_token - self.first_token) / max(1, self.output_tokens - 1)

    @property
    def latency(self) -> float:
        return self.last_token - self.issued


@dataclass(frozen=True)
class Measurement:
    """What one run on one server showed."""

    requests: list[RequestTiming]  # those that completed
    failed: int  # requests that did not
    total: int  # requests of the whole run, also where it was stopped before
    verdict: str  # LoadGen's: VALID or INVALID
    reasons: list[str]  # why it is not VALID
    loadgen: dict[str, float]  # LoadGen's own figures, named as in result.json
    phases: dict[str, float]  # seconds by phase: warmup, run
    server: list[ServerState] = field(default_factory=list)  # through the run
    figures: dict[str, float] = field(default_factory=dict)  # what else was measured, named as in result.json
    facts: dict[str, str] = field(default_factory=dict)  # versions and hardware

    @property
    def stopped_early(self) -> bool:
        return len(self.requests) + self.failed < self.total


@dataclass(frozen=True)
class DryRunOutcome:
    """What vLLM makes of a configuration before it takes a GPU."""

    refusal: str  # its reason; empty if it accepts
    resolved: dict[str, Any]  # the value of each flag that it would run with, defaults included


class Engine(Protocol):
    """A server that has started."""

    start: dict[str, float]  # seconds from launch to healthy, by part: import, weights, compile, …
    command: list[str]  # `vllm serve …` that starts the same server
    estimated: bool  # simulated

    def run(self, scenario: ScenarioConfig, folder: Path) -> Measurement:
        """Send the samples as `scenario` says; logs go to `folder`, which exists. Raises MeasureError."""


class Backend(Protocol):
    needs_weights: bool  # or a model's shape will do

    def check(self, args: Mapping[str, Any]) -> None:
        """Raise InputError for vLLM flags that can't be served. Cheap; takes no GPU."""

    def prepare_dry_runs(self) -> None:
        """Dry runs will follow: begin what the first of them would wait for, and return at once."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        """Whether vLLM's own configuration accepts `args`, and what they resolve to. Takes no GPU."""

    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, lease: Lease | None
    ) -> AbstractContextManager[Engine]:
        """Serve `model` with vLLM's flags `args` for as long as the block lasts; logs go to the trial's `folder`.

        Without a `lease` it takes the GPUs that it sees.

        Raises StartError.
        """
