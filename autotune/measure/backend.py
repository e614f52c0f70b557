"""The interface of backends: a backend starts a server, and each run on the server returns timings."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from autotune.config.schema import ScenarioConfig
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.measure.bottleneck import ServerState
from autotune.measure.slot import Slot


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request; times are in seconds on the run's clock."""

    sample: int  # index of its sample
    issued: float
    first_token: float
    last_token: float
    output_tokens: int
    prompt_tokens: int = 0  # 0: not known, in a requests.csv of version 0.2
    session: int = -1  # the number of its conversation in the run; -1: none

    @property
    def ttft(self) -> float:
        return self.first_token - self.issued

    @property
    def tpot(self) -> float:
        """Seconds for each output token after the first: MLPerf's (latency - TTFT) / (output tokens - 1)."""
        return (self.last_token - self.first_token) / max(1, self.output_tokens - 1)

    @property
    def latency(self) -> float:
        return self.last_token - self.issued


@dataclass(frozen=True)
class Measurement:
    """The timings and figures of one run on a server."""

    requests: list[RequestTiming]  # those that completed
    failed: int  # number of requests that did not
    total: int  # number of requests of a run to its end, even if this one was stopped early
    verdict: str  # LoadGen's: VALID or INVALID
    reasons: list[str]  # why it is not VALID
    loadgen: dict[str, float]  # LoadGen's own figures, named as in result.json
    phases: dict[str, float]  # seconds by phase: warmup, run
    server: list[ServerState] = field(default_factory=list)  # observed during the run
    figures: dict[str, float] = field(default_factory=dict)  # the backend's own, named as in result.json

    @property
    def stopped_early(self) -> bool:
        return len(self.requests) + self.failed < self.total


@dataclass(frozen=True)
class DryRunOutcome:
    """vLLM's answer to a configuration, before it takes a GPU."""

    refusal: str  # its reason to refuse; empty if it accepts
    resolved: dict[str, Any]  # each flag's value that it would run with, defaults included
    readable: bool = True  # false: it refuses a value, whatever the other flags are
    compiled: str = ""  # a key of what it compiles: another one compiles anew; empty if that is not known


@dataclass(frozen=True)
class Recording:
    """The steps that an engine recorded of itself."""

    rows: NDArray[np.float64]  # one for each step, with the columns of measure/steps.py
    kv_tokens: int | None = None  # that its KV cache holds
    missing: str = ""  # why steps are missing


class Engine(Protocol):
    """A server that runs."""

    samples: Samples  # that its runs send
    start: dict[str, float]  # seconds from launch to healthy, by part: import, weights, compile, …
    command: list[str]  # `vllm serve …` that starts the same server
    facts: dict[str, str]  # versions, hardware, and which server it is
    estimated: bool  # simulated, not measured

    def run(self, scenario: ScenarioConfig, folder: Path) -> Measurement:
        """Make a run of `scenario`; logs go to `folder`, which exists. Raises MeasureError."""

    def recorded(self) -> Recording | None:
        """Its steps by now; None if it is not to record them."""


@runtime_checkable
class Scorer(Protocol):
    """An engine whose answers can be judged; a simulation has none."""

    def prefilled(self, texts: Sequence[list[int]]) -> list[NDArray[np.float64]]:
        """The log-probability of each token after a text's first one, in prefill. Raises MeasureError."""

    def decoded(
        self, prompts: Sequence[tuple[list[int], int]], temperature: float
    ) -> list[tuple[list[int], NDArray[np.float64]]]:
        """Answers to prompts, of so many tokens at most, and their log-probabilities. Raises MeasureError."""


class Backend(Protocol):
    needs_weights: bool  # else the model's shape is enough
    shares: bool  # trials may share a server
    facts: dict[str, str]  # versions of what measures, as in result.json
    flags: Collection[str]  # the names of those that it knows

    def read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """`args` as vLLM reads them. Raises InputError for flags that it can't be given. Fast; takes no GPU."""

    def prepare_dry_runs(self) -> None:
        """Begin whatever the first dry run would wait for, and return at once."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        """Ask vLLM's own configuration whether it accepts `args`, and which values they resolve to. Takes no GPU."""

    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, slot: Slot
    ) -> AbstractContextManager[Engine]:
        """Serve `model` with vLLM's flags `args` until the block ends; logs go to the trial's `folder`.

        It takes the GPUs of the lease in `slot`, or without one those that it sees, and may stay there for the next
        trial. Raises StartError.
        """
