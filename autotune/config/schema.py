"""The structured configs: every field typed, with its unit. `conf/` fills them, the command line overrides."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


class Kind(Enum):
    """LoadGen's scenarios."""

    Offline = "Offline"
    Server = "Server"
    SingleStream = "SingleStream"


class Output(Enum):
    """What decides how many tokens a request generates."""

    reference = "reference"  # the sample's own reference length, with ignore_eos
    natural = "natural"  # the model's end of sequence, at most dataset.max_output_tokens


class Stop(Enum):
    """When a Server run ends before its time; what it has shown by then is a bound."""

    never = "never"
    failed = "failed"  # once it can't pass LoadGen's test of the limits any more
    decided = "decided"  # once it can't pass, or can't fail; LoadGen's own verdict is missing then


class Duplicates(Enum):
    """What becomes of a configuration that the study has measured already."""

    lookup = "lookup"  # its result is told again, takes no engine time and is none of n_trials
    measure = "measure"  # it runs again: for a sampler that is to see the noise


class BudgetOf(Enum):
    """What a study's budget counts."""

    engine = "engine"  # start and run of all trials
    wall = "wall"  # the time since the study was started


@dataclass
class Limit:
    """Latency limits at p99; null leaves one out."""

    ttft_ms: float | None = None  # issue to first token, ms
    tpot_ms: float | None = None  # (latency - TTFT) / (output tokens - 1), ms

    def in_seconds(self) -> tuple[float | None, float | None]:
        ttft, tpot = (None if limit is None else limit / 1e3 for limit in (self.ttft_ms, self.tpot_ms))
        return ttft, tpot


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
    shape: Any = None  # `_target_` that makes a folder of its shape, for a backend that needs no weights
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
class LoadSearch:
    """objective=max_qps: how the highest load that holds the limits is looked for, on one server."""

    start_qps: float | None = None  # where the load is about known to be; null: a burst and short runs find it out
    precision: float = 0.04  # the certified load fails if it is raised by this share
    burst: int = 200  # requests at once, to see what the server can take at most
    first_s: float = 10.0  # the shortest run, s; the certifying one lasts scenario.min_duration_s
    growth: float = 3.0  # of the runs between them, from one to the next
    certify_queries: int = 1000  # at least, in the certifying run; LoadGen's test takes 459 and forgives few
    max_runs: int = 25  # then what is certified so far counts


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
    warmup_requests: int = 16  # sent at once before LoadGen starts, until they get no faster; not measured
    seed: int = 1  # of LoadGen's sample order and arrival schedule
    stop: Stop = Stop.failed  # when a Server run ends early: never, failed or decided
    over_share: float | None = None  # of queries that may be over a limit; null: what LoadGen's test allows
    repeats: int = 1  # LoadGen runs on one server, each with the next seed; metrics are their means
    search: LoadSearch = field(default_factory=LoadSearch)
    args: dict[str, Any] = field(default_factory=dict)  # vllm serve flags the scenario's rules ask for

    def limits_s(self) -> tuple[float | None, float | None]:
        """The limits on p99 TTFT and TPOT, in seconds."""
        return Limit(self.ttft_ms, self.tpot_ms).in_seconds()


@dataclass
class EngineConfig:
    # Any `vllm serve` flag by its own name; null leaves vLLM's default. Wins over model.args, scenario.args.
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class LiveConfig:
    """backend=live: real vLLM driven by LoadGen."""

    _target_: str = MISSING
    python: str | None = None  # interpreter that has vLLM; null is the one that runs autotune
    prefix: list[str] = field(default_factory=list)  # words before vLLM's command: [srun, --overlap], a container's
    port: int | None = None  # loopback port for vLLM; null takes a free one
    env: dict[str, str] = field(default_factory=dict)  # added to vLLM's environment
    start_timeout_s: float = 900.0  # from launch to healthy, s
    stop_timeout_s: float = 10.0  # from SIGTERM to SIGKILL, s
    request_timeout_s: float = 600.0  # one HTTP request, s
    run_timeout_s: float = 7200.0  # one LoadGen run with its warm-up, s
    observe_s: float = 1.0  # between two looks at vLLM's /metrics and the GPU while a run goes on, s
    client_processes: int | None = None  # that send requests; null: one for each 16 cores, at least 1, at most 8
    # Beyond these a run is INVALID for its client's sake. What is busy nearly all the time lets tokens wait:
    client_cpu_limit: float = 0.9  # share of a core, of the busiest client process or LoadGen's own
    # What the client may add to TTFT must be small beside the limit that decides the verdict. Null: 0.05 with a GPU;
    # without one vLLM computes on the cores that the client waits for, and the figures are recorded, not judged.
    client_ttft_share: float | None = None  # of scenario.ttft_ms: p99 lateness, p99 loop lag, mean TTFT beyond vLLM's


@dataclass
class Device:
    """What a simulated step costs on one GPU (or CPU); autotune.sim.calibrate fits what is marked."""

    name: str = MISSING
    memory_gib: float = MISSING  # what vLLM's gpu_memory_utilization is a share of
    kv_gib: float | None = None  # KV cache by itself, for a CPU; null: what the weights leave
    other_gib: float = 0.22  # memory outside torch's allocator
    workspace_gib: float = 0.44  # besides a step's activations
    activations_gib: float = 1.01  # least that vLLM's memory profile takes for both
    graph_gib: float = 0.019  # one CUDA graph
    tflops: float = MISSING  # bf16, dense, of a large matrix product
    fp8_tflops: float | None = None  # null: it has no fp8 product
    bandwidth_gbs: float = MISSING  # memory, GB/s
    link_gbs: float = 450.0  # one GPU's link to the others, GB/s a direction
    link_s: float = 1e-5  # latency of one all-reduce, s
    math_efficiency: float = 0.91  # fitted: share of tflops that a model's products reach
    attention_efficiency: float = 0.8  # fitted: the same for attention, of what products reach
    bandwidth_efficiency: float = 0.83  # fitted: share of bandwidth_gbs
    step_s: float = 0.0013  # fitted: fixed on the GPU, each step, s
    host_s: float = 0.0016  # fitted: to schedule and prepare a step, s
    host_sequence_s: float = 8e-6  # fitted: the same for each sequence in it, s
    launch_s: float = 4.6e-4  # fitted: to launch a layer that no CUDA graph holds, s
    piecewise_s: float = 2e-4  # fitted: the same in a step with prefill, of whose layers graphs hold all but attention
    fp8_factor: float = 2.4  # fitted: launches of a layer that quantises its inputs against one that does not
    eager_factor: float = 3.0  # launches of enforce_eager against compiled layers
    accept_s: float = 9e-4  # fitted: the API server takes in one request, s
    answer_s: float = 0.017  # fitted: from a step's end to the client, s
    import_s: float = 45.0  # a start's parts, s
    load_gbs: float = 8.0  # weights into memory, GB/s
    compile_s: float = 27.0
    capture_s: float = 0.12  # a CUDA graph
    warmup_s: float = 18.0
    max_num_batched_tokens: int = 8192  # vLLM's defaults on this device, for a server
    max_num_seqs: int = 1024
    block_size: int = 16  # smallest and default
    async_scheduling: bool = True  # whether vLLM schedules a step while the last one runs
    gpus: int = 8  # in one machine


# Device's constants that autotune.sim.calibrate fits.
FITTED = (
    *("math_efficiency", "fp8_tflops", "attention_efficiency", "bandwidth_efficiency"),
    *("step_s", "host_s", "host_sequence_s", "launch_s", "piecewise_s", "fp8_factor", "accept_s", "answer_s"),
)
HOST = ("host_s", "host_sequence_s", "launch_s", "piecewise_s")  # those that the host's processor decides


@dataclass
class SimConfig:
    """backend=sim: vLLM's scheduler on a virtual clock."""

    _target_: str = MISSING
    device: Device = field(default_factory=Device)
    pace: float = 0.0  # real seconds that pass for each simulated one; 0: none


@dataclass
class InlineConfig:
    """launcher=inline: one trial at a time, in the study's process."""

    _target_: str = MISSING
    name: str = "inline"


@dataclass
class LocalConfig:
    """launcher=gpus: trials side by side on this machine."""

    _target_: str = MISSING
    name: str = "gpus"
    n_jobs: int | None = None  # trials at a time; null: one for each GPU


@dataclass
class ClusterConfig:
    """launcher=slurm: trials as jobs of a cluster."""

    _target_: str = MISSING
    name: str = "slurm"
    cluster: str = "slurm"  # or another that submitit has an executor for
    n_jobs: int = 4  # trials at a time, queued ones included
    array: bool = False  # trials that are submitted together become one job array
    canary: bool = False  # a short baseline on each node first
    poll_s: float = 5.0  # between two calls of squeue, s
    parameters: dict[str, Any] = field(default_factory=dict)  # submitit's, by its names; null: the cluster's default


@dataclass
class ObjectiveConfig:
    name: str = MISSING
    metrics: list[str] = MISSING  # keys of result.json's `metrics`
    directions: list[str] = MISSING  # maximize or minimize, one for each metric


@dataclass
class PriorConfig:
    backend: Any = None  # simulates; null: no prior
    trials: int = 200  # simulated
    keep: int = 5  # of them, the best distinct ones, that a study starts with
    devices: int = 8  # that they are simulated on once more: the device's constants may be off
    sigma: float = 0.15  # by how much: standard deviation of the logarithm of each fitted one
    host_sigma: float = 0.5  # the same of what the host's are all multiplied with


@dataclass
class TrackingConfig:
    enabled: bool = True
    uri: str = MISSING  # MLflow tracking URI
    experiment: str = MISSING  # MLflow experiment
    system_metrics_s: float = 10.0  # between samples of the machine that a trial runs on, s; 0: none


@dataclass
class Config:
    study: str = MISSING  # name of the study and of its folder below multirun/
    n_trials: int = 20  # trials of a study, the baseline not counted
    baseline: bool = True  # run vLLM's defaults first
    budget: str | None = None  # 30m, 2h: then nothing new begins, and what runs may end; null is no limit
    budget_of: BudgetOf = BudgetOf.engine
    max_failures: int = 10  # trials that fail in a row end the study
    duplicates: Duplicates = Duplicates.lookup  # a configuration asked for again: lookup or measure
    resume: bool = False  # insist that the study exists; one that does goes on in any case
    sampler: str = "tpe"  # its name; conf/sampler/ sets it
    seed: int = 0  # of the sampler
    warm_start: str | None = None  # a study whose best `prior.keep` configurations this one starts with
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
    prior: PriorConfig = field(default_factory=PriorConfig)
    pruner: Any = None  # `_target_` decides which trials end early; see pruner=
    launcher: dict[str, Any] = field(default_factory=dict)  # `_target_` starts the trials; its other fields
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def register() -> None:
    """Make the schema known to Hydra, with the fields open whose names only vLLM or the backend knows."""
    schema = OmegaConf.structured(Config)
    named_by_others = [schema.engine.args, schema.model.args, schema.scenario.args, schema.backend, schema.launcher]
    for open_node in [*named_by_others, schema.conditions, schema.only_if]:
        OmegaConf.set_struct(open_node, False)
    ConfigStore.instance().store(name="schema", node=schema)
