"""result.json: what a trial leaves for the study, for MLflow and for the report."""

import json
import shlex
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from autotune.config.redact import redact
from autotune.errors import InputError
from autotune.system.files import write_whole
from autotune.text import first_line

FILE = "result.json"
# Version 0.1 wrote `failed` for an interrupted trial, with one of these exceptions as its reason.
STOPPED = ("StoppedError", "KeyboardInterrupt", "SystemExit")
MOST = 1e15  # of a number: more than any rate, and a time that a calendar has


class State(StrEnum):
    """End of a trial."""

    complete = "complete"
    failed = "failed"
    refused = "refused"  # a condition of the space or vLLM's own check forbids it; it took no GPU
    pruned = "pruned"  # the pruner ended it
    interrupted = "interrupted"  # it ended with the study, which queues it again; it counts for nothing


@dataclass
class RunRecord:
    """One run of LoadGen, of a trial that made several on its server: a search for the highest load, or repeats."""

    folder: str  # of its logs, within the trial's
    role: str  # burst, probe, certify or repeat
    qps: float  # offered: queries/s, or the users of a closed loop
    verdict: str  # VALID or INVALID
    reasons: list[str] = field(default_factory=list)  # why it is not VALID
    stopped_early: bool = False  # once the verdict was certain; the metrics are of the requests that had ended
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    state: State = State.failed
    reason: str = ""  # why it did not complete
    values: list[float] = field(default_factory=list)  # of objective.metrics
    constraints: dict[str, float] = field(default_factory=dict)  # feasible if all are at most 0
    verdict: str = ""  # VALID or INVALID
    verdict_by: str = "LoadGen"  # or autotune, for traffic that LoadGen can't send
    reasons: list[str] = field(default_factory=list)  # why it is not VALID
    metrics: dict[str, float] = field(default_factory=dict)
    # 95 % confidence, of accuracy 90 %: metric → [low, high]
    intervals: dict[str, list[float]] = field(default_factory=dict)
    bound: str = ""  # bottleneck: kv, cache, sequences, tokens, queue, arrival or client; of a search also ttft or tpot
    # What breaks a rule of MLPerf's closed division, and which; with rules=open.
    deviations: list[str] = field(default_factory=list)
    accuracy: str = ""  # verdict of the study's gate: same numerics, passed, refused or unknown, and why
    runs: list[RunRecord] = field(default_factory=list)  # where there were several
    phases: dict[str, float] = field(default_factory=dict)  # seconds: start, warmup, run, accuracy, stop, other
    start: dict[str, float] = field(default_factory=dict)  # seconds of the start by part: import, weights, compile, …
    args: dict[str, Any] = field(default_factory=dict)  # vLLM's flags, as configured
    command: list[str] = field(default_factory=list)  # `vllm serve …`
    # Values that the sampler chose; empty for the baseline. Objects and lists are text.
    params: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)  # baseline only: vLLM's values of the parameters swept
    overrides: list[str] = field(default_factory=list)  # key=value, from the command line and the sampler
    config: dict[str, str] = field(default_factory=dict)  # names of model, dataset, scenario and objective
    facts: dict[str, str] = field(default_factory=dict)  # environment: versions, hardware, data set's checksum
    started_at: float = 0.0  # seconds since the epoch
    ended_at: float = 0.0
    estimated: bool = False  # simulated, not measured
    duplicate_of: str = ""  # earlier trial of the same configuration, of which this is the result
    expected: dict[str, Any] = field(default_factory=dict)  # `values` and `feasible` that a simulation estimated

    def __post_init__(self) -> None:
        self.state = State(self.state)
        self.reason = redact(self.reason)

    @property
    def complete(self) -> bool:
        return self.state is State.complete

    @property
    def ran(self) -> bool:
        """True if the trial took an engine and counts for the study, however it ended."""
        return self.state in (State.complete, State.failed, State.pruned)

    @property
    def feasible(self) -> bool:
        return self.complete and all(value <= 0 for value in self.constraints.values())

    @property
    def holds_limits(self) -> bool:
        """True if it is feasible but for its answers, of which a simulation says nothing."""
        return self.complete and all(value <= 0 for name, value in self.constraints.items() if name != "accuracy")

    @property
    def shared_server(self) -> bool:
        """True if its server stayed from an earlier trial, or was started for several."""
        return self.facts.get("server", "").startswith("shared")

    @property
    def engine_s(self) -> float:
        """Seconds that the trial took an engine, all phases: the cost by which budgets and comparisons go."""
        return sum(self.phases.values())

    @property
    def shell_command(self) -> str:
        return shlex.join(self.command)

    def save(self, folder: Path) -> None:
        write_whole(folder / FILE, json.dumps(redact(asdict(self)), indent=1))

    @classmethod
    def find(cls, folder: Path) -> "Result | None":
        """The result in `folder`; None if there is none. Raises InputError for a broken one."""
        try:
            return cls.load(folder)
        except FileNotFoundError:
            return None

    @classmethod
    def load(cls, folder: Path) -> "Result":
        """The result in `folder`. Raises FileNotFoundError if there is none, InputError for a broken one."""
        try:
            return cls.of(json.loads((folder / FILE).read_text()))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise InputError(f"{folder / FILE}: not the result of a trial ({first_line(error)}); delete it") from None

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Result":
        """The result in a result.json of this version or an earlier one. Raises ValueError, TypeError or KeyError."""
        own: Any = cls
        known = _kinds(own)
        if not isinstance(body, dict):
            raise TypeError(f"it holds {json.dumps(body)[:40]}")
        for name in known.keys() & body.keys():
            if not _fits(body[name], known[name]):
                raise ValueError(_misfit(body[name], known[name], name))
        result = cls(**{name: value for name, value in body.items() if name in known})
        if result.complete and not result.values:
            raise ValueError("it is complete without a value")
        of_0_1 = "expected" not in body
        if of_0_1 and result.state is State.failed and result.reason.startswith(STOPPED):
            result.state = State.interrupted
        result.duplicate_of = result.duplicate_of or result.facts.get("duplicate_of", "")
        result.runs = [RunRecord(**run) for run in body.get("runs", [])]
        return result


@cache
def _kinds(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    return get_type_hints(kind)


def _fits(value: Any, kind: Any) -> bool:
    """True if `value`, read from JSON, is of the type `kind`."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if outer is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if is_dataclass(outer):
        return isinstance(value, dict) and all(_fits(value[name], _kinds(kind)[name]) for name in value)
    if outer is UnionType:
        return any(_fits(value, one) for one in inner)
    if outer is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST
    return outer is Any or isinstance(value, str if outer is State else outer)


def _misfit(value: Any, kind: Any, key: str) -> str:
    """The innermost part of `value` that is not of its type in `kind`, by its key: "`metrics.tpot_p99_ms` is null"."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items if get_origin(kind) in (dict, list) else ():
        if not _fits(item, inner := get_args(kind)[-1]):
            return _misfit(item, inner, f"{key}.{name}")
    return f"`{key}` is {json.dumps(value)[:40]}"
