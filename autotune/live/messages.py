"""Messages and files between a trial and the processes that make its LoadGen runs."""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from autotune.config.schema import LiveConfig, ScenarioConfig
from autotune.system.files import write_whole

PATH_BYTES = 4096  # of a run's folder, at most, in a message that asks for the run
STOP = b"stop"  # a message: end the run
WARMUP_ROUNDS = 10  # of a server that has just started, at most


@dataclass(frozen=True)
class RunSpec:
    """run.json: one LoadGen run. Fields named as in LiveConfig are its, with null resolved."""

    folder: Path  # for LoadGen's logs, requests.csv and client.json
    url: str  # of vLLM's server
    model: str  # the name that it serves
    scenario: ScenarioConfig
    request_timeout_s: float
    client_processes: int = 1
    connections: int = 1024  # to the server, at most, of all client processes; other requests wait for one
    max_model_len: int | None = None  # vLLM's; null: it is not known
    keep_answers: bool = False  # LoadGen gets each answer's token ids, as int32, rather than only their number
    client_cpu_limit: float = LiveConfig.client_cpu_limit
    client_ttft_share: float | None = None  # null: what the client adds to TTFT is recorded, not judged
    warmup_rounds: int = WARMUP_ROUNDS  # of scenario.warmup_requests, at most
    total: int = 0  # queries that LoadGen is going to issue, at most; 0 where no limits are tested
    has_metrics: bool = True  # vLLM's; false with its disable_log_stats

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1, default=_plain))

    @classmethod
    def load(cls, path: Path) -> "RunSpec":
        fields = json.loads(path.read_text())
        scenario = OmegaConf.to_object(OmegaConf.merge(ScenarioConfig, fields["scenario"]))
        return cls(**{**fields, "folder": Path(fields["folder"]), "scenario": scenario})


def _plain(value: Any) -> str:
    return value.name if isinstance(value, Enum) else str(value)


@dataclass(frozen=True)
class ClientReport:
    """client.json."""

    failed: int
    errors: list[str]  # the first few, in the server's words
    began: float  # the run, on time.perf_counter's clock, which all processes of a machine share
    warmup_s: float
    run_s: float
    stopped: bool  # before LoadGen's own end
    processes: list[dict[str, float]] = field(default_factory=list)  # each one's client.ProcessReport
    figures: dict[str, float] = field(default_factory=dict)  # named as in result.json
    reasons: list[str] = field(default_factory=list)  # why the client makes the run INVALID
