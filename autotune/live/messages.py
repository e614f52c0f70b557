"""What passes between a trial and its LoadGen process, as JSON files."""

from dataclasses import dataclass, field

from autotune.config.schema import LiveConfig


@dataclass(frozen=True)
class Run:
    """run.json. Fields as in ScenarioConfig and LiveConfig, but for the first and last ones."""

    folder: str  # for LoadGen's logs, requests.csv and client.json
    url: str
    model: str
    kind: str
    qps: float
    ttft_ms: float | None
    tpot_ms: float | None
    min_duration_s: float
    max_duration_s: float
    min_queries: int
    max_queries: int
    warmup_requests: int
    seed: int
    request_timeout_s: float
    warmup_rounds: int = 10  # of those requests, at most
    stop: str = "never"
    over_share: float | None = None
    client_processes: int = 1
    client_cpu_limit: float = LiveConfig.client_cpu_limit
    client_ttft_share: float | None = None  # null: what the client adds to TTFT is recorded, not judged
    total: int = 0  # queries that LoadGen is going to issue, at most; 0 where no limits are tested


@dataclass(frozen=True)
class ClientReport:
    """client.json."""

    failed: int
    errors: list[str]  # the first few, in the server's words
    began: float  # the run, on time.perf_counter's clock, which all processes of a machine share
    warmup_s: float
    run_s: float
    stopped: bool  # before LoadGen's own end
    processes: list[dict[str, float]] = field(default_factory=list)  # each one's client.Report
    figures: dict[str, float] = field(default_factory=dict)  # named as in result.json
    reasons: list[str] = field(default_factory=list)  # why the client makes the run INVALID
