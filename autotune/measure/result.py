"""result.json: all that a trial leaves behind for the study, for MLflow and for the report."""

import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from autotune.system.files import write_whole

FILE = "result.json"
# Version 0.1 wrote `failed` for a trial that was stopped, with one of these exceptions as its reason.
STOPPED = ("StoppedError", "KeyboardInterrupt", "SystemExit")


class State(StrEnum):
    """How a trial ended."""

    complete = "complete"
    failed = "failed"
    refused = "refused"  # a condition of the space or vLLM's own check forbids it; it took no GPU
    pruned = "pruned"  # the pruner ended it
    interrupted = "interrupted"  # it ended with the study, which queues it again; counts for nothing


@dataclass
class LoadRun:
    """One LoadGen run of a trial that made several on one server: a search over the load, or repeats."""

    folder: str  # of its logs, below the trial's
    role: str  # burst, probe, certify or repeat
    qps: float  # offered
    verdict: str  # VALID or INVALID
    reasons: list[str] = field(default_factory=list)  # why it is not VALID
    stopped_early: bool = False  # once the verdict was certain; the metrics are of what was seen
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    state: State = State.failed
    reason: str = ""  # why it did not complete
    values: list[float] = field(default_factory=list)  # of objective.metrics
    constraints: dict[str, float] = field(default_factory=dict)  # feasible while all are at most 0
    verdict: str = ""  # LoadGen's: VALID or INVALID
    reasons: list[str] = field(default_factory=list)  # why it is not VALID
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)  # 95 % confidence: metric → [low, high]
    bound: str = ""  # what kept it from more: kv, sequences, tokens, queue, arrival, client; of a search ttft or tpot
    runs: list[LoadRun] = field(default_factory=list)  # where there were several
    phases: dict[str, float] = field(default_factory=dict)  # seconds: start, warmup, run, stop, other
    start: dict[str, float] = field(default_factory=dict)  # the first of them by part: import, weights, compile, …
    args: dict[str, Any] = field(default_factory=dict)  # vLLM's flags, as configured
    command: list[str] = field(default_factory=list)  # `vllm serve …`
    params: dict[str, Any] = field(default_factory=dict)  # what the sampler chose; empty for the baseline
    defaults: dict[str, Any] = field(default_factory=dict)  # of the baseline: vLLM's value of what the study sweeps
    overrides: list[str] = field(default_factory=list)  # what the command line and the sampler set
    config: dict[str, str] = field(default_factory=dict)  # model, dataset, scenario, objective by name
    facts: dict[str, str] = field(default_factory=dict)  # versions, hardware, data set's checksum
    started_at: float = 0.0  # seconds since the epoch
    ended_at: float = 0.0
    estimated: bool = False  # simulated, not measured
    duplicate_of: str = ""  # the trial that measured this configuration before, whose result this is
    expected: dict[str, Any] = field(default_factory=dict)  # `values` and `feasible`, as a simulation said before

    def __post_init__(self) -> None:
        self.state = State(self.state)

    @property
    def complete(self) -> bool:
        return self.state is State.complete

    @property
    def ran(self) -> bool:
        """Whether it is a trial of the study that was run, to whatever end."""
        return self.state in (State.complete, State.failed, State.pruned)

    @property
    def feasible(self) -> bool:
        return self.complete and all(value <= 0 for value in self.constraints.values())

    @property
    def engine_s(self) -> float:
        """Seconds that it took an engine, all phases: what a budget and a comparison count."""
        return sum(self.phases.values())

    @property
    def shell_command(self) -> str:
        return shlex.join(self.command)

    def save(self, folder: Path) -> None:
        write_whole(folder / FILE, json.dumps(asdict(self), indent=1))

    @classmethod
    def find(cls, folder: Path) -> "Result | None":
        """The result in `folder`, if there is one."""
        try:
            return cls.load(folder)
        except FileNotFoundError:
            return None

    @classmethod
    def load(cls, folder: Path) -> "Result":
        return cls.of(json.loads((folder / FILE).read_text()))

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Result":
        """The result that a result.json of this version or an earlier one holds."""
        known = {field.name for field in fields(cls)}
        result = cls(**{name: value for name, value in body.items() if name in known})
        if result.state is State.failed and result.reason.startswith(STOPPED):
            result.state = State.interrupted
        result.duplicate_of = result.duplicate_of or result.facts.get("duplicate_of", "")
        result.runs = [LoadRun(**run) for run in body.get("runs", [])]
        return result


def is_complete(folder: Path) -> bool:
    """Whether the trial in `folder` has completed."""
    result = Result.find(folder)
    return result is not None and result.complete
