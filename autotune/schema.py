"""The structured configs: every field typed, with its unit. `conf/` fills them, the command line overrides."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


class Kind(Enum):
    """LoadGen's scenarios."""

    Offline = "Offline"
    Server = "Server"
    SingleStream = "SingleStream"


class Output(Enum):
    """What decides how many tokens a request generates."""

    reference = "reference"  # the sample's own reference length, with ignore_eos
    natural = "natural"  # the model's end of sequence, at most dataset.max_output_tokens


@dataclass
class Limit:
    """Latency limits at p99; null leaves one out."""

    ttft_ms: float | None = None  # issue to first token, ms
    tpot_ms: float | None = None  # (latency - TTFT) / (output tokens - 1), ms


@dataclass
class Limits:
    """A model's MLPerf limits by scenario; a model MLPerf does not list has llama3.1-8b's."""

    server: Limit = field(default_factory=lambda: Limit(2000, 100))
    interactive: Limit = field(default_factory=lambda: Limit(500, 30))


@dataclass
class ModelConfig:
    name: str = MISSING  # short name, used in study names
    path: str | None = None  # Hugging Face id or local folder
    revision: str | None = None  # git revision on the Hub
    build: Any = None  # `_target_` that makes the model's folder when no path is given
    args: dict[str, Any] = field(default_factory=dict)  # vllm serve flags that belong to the model
    limits: Limits = field(default_factory=Limits)


@dataclass
class DatasetConfig:
    name: str = MISSING
    path: str | None = None  # JSON or JSONL; wins over `records`, unless they have a `path` of their own
    records: Any = None  # `_target_` that yields such records when no path is given
    count: int | None = None  # samples to use; null is all
    output: Output = Output.reference
    max_output_tokens: int = 128  # upper bound of a request's output length, tokens
    min_output_tokens: int = 2  # lower bound; TPOT is undefined for one token


@dataclass
class ScenarioConfig:
    name: str = MISSING
    kind: Kind = MISSING
    qps: float = 1.0  # Server: Poisson arrival rate; Offline: expected rate, sizes the query (queries/s)
    ttft_ms: float | None = None  # limit on p99 TTFT, ms; null is none
    tpot_ms: float | None = None  # limit on p99 TPOT, ms; null is none
    min_duration_s: float = 60.0  # LoadGen's min_duration, s
    max_duration_s: float = 0.0  # LoadGen's max_duration, s; 0 is none
    min_queries: int = 100  # LoadGen's min_query_count
    max_queries: int = 0  # LoadGen's max_query_count; 0 is none
    warmup_requests: int = 16  # sent at once before LoadGen starts, not measured
    seed: int = 1  # of LoadGen's sample order and arrival schedule
    args: dict[str, Any] = field(default_factory=dict)  # vllm serve flags the scenario's rules ask for


@dataclass
class EngineConfig:
    # Any `vllm serve` flag by its own name; null leaves vLLM's default. Wins over model.args, scenario.args.
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class LiveConfig:
    """backend=live: real vLLM driven by LoadGen."""

    _target_: str = MISSING
    python: str | None = None  # interpreter that has vLLM; null is the one that runs autotune
    port: int | None = None  # loopback port for vLLM; null takes a free one
    gpus: Any = None  # as Config.gpus
    env: dict[str, str] = field(default_factory=dict)  # added to vLLM's environment
    start_timeout_s: float = 900.0  # from launch to healthy, s
    stop_timeout_s: float = 10.0  # from SIGTERM to SIGKILL, s
    request_timeout_s: float = 600.0  # one HTTP request, s
    run_timeout_s: float = 7200.0  # one LoadGen run with its warm-up, s


@dataclass
class ObjectiveConfig:
    name: str = MISSING
    metrics: list[str] = MISSING  # keys of result.json's `metrics`
    directions: list[str] = MISSING  # maximize or minimize, one for each metric


@dataclass
class TrackingConfig:
    enabled: bool = True
    uri: str = MISSING  # MLflow tracking URI
    experiment: str = MISSING  # MLflow experiment


@dataclass
class Config:
    study: str = MISSING  # name of the study and of its folder below multirun/
    n_trials: int = 20  # trials of a study, the baseline not counted
    baseline: bool = True  # run vLLM's defaults first
    seed: int = 0  # of the sampler
    # GPUs that trials may lease: a list of indices, `all`, or null for no leases (vLLM takes what it sees).
    gpus: Any = None
    baseline_gpu: int | None = None  # GPU for the baseline; null is any of `gpus`
    conditions: dict[str, str] = field(default_factory=dict)  # what must hold between parameters, by name
    only_if: dict[str, str] = field(default_factory=dict)  # parameter → when it is swept at all
    cache_dir: str = MISSING  # built models, prepared samples, what is known of the installed vLLM

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    # `_target_` is the backend's class; its `Config` types the other fields (backend=live: LiveConfig).
    backend: dict[str, Any] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    launcher: dict[str, Any] = field(default_factory=dict)  # `_target_` starts the trials; its other fields
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def register() -> None:
    """Make the schema known to Hydra, with the fields open whose names only vLLM or the backend knows."""
    schema = OmegaConf.structured(Config)
    named_by_others = [schema.engine.args, schema.model.args, schema.scenario.args, schema.backend, schema.launcher]
    for open_node in [*named_by_others, schema.conditions, schema.only_if]:
        OmegaConf.set_struct(open_node, False)
    ConfigStore.instance().store(name="schema", node=schema)


def typed(config: DictConfig) -> Config:
    """The composed configuration as the dataclasses above, interpolations resolved."""
    body = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.set_struct(body, False)
    typed_config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), body))
    assert isinstance(typed_config, Config)
    return typed_config
