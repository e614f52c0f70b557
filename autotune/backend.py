"""The seam between what is tuned and what measures it: a backend returns per-request timings and counters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from autotune.models import Model
from autotune.samples import Samples
from autotune.schema import ScenarioConfig


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
    """What one run of one server configuration showed."""

    requests: list[RequestTiming]  # those that completed
    failed: int  # requests that did not
    verdict: str  # LoadGen's: VALID or INVALID
    reasons: list[str]  # why it is not VALID
    loadgen: dict[str, float]  # LoadGen's own figures, named as in result.json
    phases: dict[str, float]  # seconds by phase: start, warmup, run, stop
    command: list[str]  # `vllm serve …` that starts the same server
    facts: dict[str, str] = field(default_factory=dict)  # versions and hardware
    estimated: bool = False  # simulated, not measured


@dataclass(frozen=True)
class DryRunOutcome:
    """What vLLM makes of a configuration before it takes a GPU."""

    refusal: str  # its reason; empty if it accepts
    resolved: dict[str, Any]  # the value of each flag that it would run with, defaults included


class Backend(Protocol):
    needs_weights: bool  # or a model's shape will do
    estimates: bool  # nothing runs on the machine's hardware

    def check(self, args: Mapping[str, Any]) -> None:
        """Raise InputError for vLLM flags that can't be served. Cheap; takes no GPU."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        """Whether vLLM's own configuration accepts `args`, and what they resolve to. Takes no GPU."""

    def measure(
        self, model: Model, args: Mapping[str, Any], scenario: ScenarioConfig, samples: Samples, folder: Path
    ) -> Measurement:
        """Serve `model` with vLLM's flags `args`, send `samples` as `scenario` says; logs go to `folder`.

        Raises StartError or MeasureError.
        """
