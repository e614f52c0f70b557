"""What passes between a trial and its LoadGen process, as JSON files in the trial's folder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """RUN.json. Fields as in ScenarioConfig."""

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


@dataclass(frozen=True)
class ClientReport:
    """client.json."""

    failed: int
    errors: list[str]  # the first few, in the server's words
    warmup_s: float
    run_s: float
