"""What passes between a trial and its LoadGen process, as JSON files in the trial's folder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """run.json. Fields as in ScenarioConfig, but for the first and last ones."""

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
    stop: str
    over_share: float | None
    request_timeout_s: float
    total: int  # queries that LoadGen is going to issue, at most


@dataclass(frozen=True)
class ClientReport:
    """client.json."""

    failed: int
    errors: list[str]  # the first few, in the server's words
    began: float  # the run, on time.perf_counter's clock, which all processes of a machine share
    warmup_s: float
    run_s: float
    stopped: bool  # before LoadGen's own end
