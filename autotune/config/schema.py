"""Every field of the configuration: its type, its default, its unit.

A file in conf/ sets only what differs from the defaults here. Files of the groups `backend` and `launcher` take these
in by the name of their class: `defaults: [/LiveConfig@_here_]`.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from autotune.config.bounds import (
    DAY_S,
    bounded,
    duration,
    file_name,
    gpus,
    pairs,
    path,
    positive,
    study,
    three_seeds,
    within,
)
from autotune.errors import InputError


class Kind(Enum):
    """LoadGen's scenarios, and traffic that LoadGen lacks."""

    Offline = "Offline"
    Server = "Server"
    SingleStream = "SingleStream"
    ClosedLoop = "ClosedLoop"  # users, each of whom sends a request when the last one has been answered
    Trace = "Trace"  # requests at the times that the data set has for them

    @property
    def by_loadgen(self) -> bool:
        """True if LoadGen sends the requests and gives the verdict, else autotune."""
        return self in (Kind.Offline, Kind.Server, Kind.SingleStream)


class Answers(Enum):
    """Choice of what a conversation's later prompts hold of its earlier answers."""

    none = "none"  # requests are independent of each other
    received = "received"  # the answers that the server gave
    recorded = "recorded"  # those of the data set


class Endpoint(Enum):
    """Choice of vLLM's way in for the turns of conversations."""

    completions = "completions"  # token ids, through the chat template here
    chat = "chat"  # messages: vLLM's own chat template and its parsing of the answer are in the way


class Rules(Enum):
    """MLPerf's division by whose rules runs are made."""

    none = "none"  # tuning: autotune's own, shorter runs
    closed = "closed"  # a configuration that breaks a rule is refused
    open = "open"  # it runs, and its result tells what breaks a rule


class Mode(Enum):
    """LoadGen's mode."""

    performance = "performance"
    accuracy = "accuracy"  # each sample once, for its answer: neither times nor limits count


class Output(Enum):
    """Choice of what sets the number of tokens that a request generates."""

    reference = "reference"  # the sample's own reference length, with ignore_eos
    natural = "natural"  # the model's own end of sequence, after dataset.max_output_tokens at the latest


class Stop(Enum):
    """Choice of when a Server run ends early; what it has measured by then is a bound."""

    never = "never"
    failed = "failed"  # once it can no longer pass LoadGen's test of the limits
    decided = "decided"  # once it can no longer pass or can no longer fail; then LoadGen gives no verdict of its own


class Hot(Enum):
    """Servers of a study's trials."""

    auto = "auto"  # trials that differ only in what can be changed of a running server share one
    same = "same"  # trials of the same flags share one
    never = "never"  # each trial starts its own


class Check(Enum):
    """Choice of how a configuration shows that its answers got no worse."""

    auto = "auto"  # nll in a study that sweeps what decides a server's numerics, else none
    none = "none"  # not at all
    nll = "nll"  # paired negative log-likelihood of texts, prefill and decode
    rouge = "rouge"  # paired ROUGE of greedy answers against the data set's references
    mlperf = "mlperf"  # the benchmark's own scores of greedy answers, within its bounds


class Duplicates(Enum):
    """Choice of what happens when the sampler proposes a configuration that the study has measured already."""

    lookup = "lookup"  # the sampler gets the earlier result; that takes no engine time and does not count in n_trials
    measure = "measure"  # it runs again, so that the sampler sees the noise


class BudgetOf(Enum):
    """Choice of what a study's budget counts."""

    engine = "engine"  # the time that trials take, summed, without the first start, which compiles for later ones
    wall = "wall"  # the time since the command began, which may go on with a study


MOST_QUERIES = 2_000_000  # of one run: each is kept in memory


@dataclass
class BenchmarkScenario:
    """One scenario of a benchmark of MLPerf's, with its limits at p99; null is no limit."""

    ttft_ms: float | None = positive(None)  # issue to first token, ms
    tpot_ms: float | None = positive(None)  # (latency - TTFT) / (output tokens - 1), ms
    loadgen: str | None = None  # its name in LoadGen's own mlperf.conf; null: the benchmark does not have the scenario
    min_queries: int = within(100, 1, MOST_QUERIES)  # LoadGen's own default


@dataclass
class BenchmarkScenarios:
    """A benchmark's scenarios, by the names of conf/scenario/."""

    offline: BenchmarkScenario = field(default_factory=BenchmarkScenario)
    server: BenchmarkScenario = field(default_factory=BenchmarkScenario)
    interactive: BenchmarkScenario = field(default_factory=BenchmarkScenario)
    single_stream: BenchmarkScenario = field(default_factory=BenchmarkScenario)


@dataclass
class Generation:
    """Bounds of an answer, tokens, and how each of its tokens is drawn."""

    max_tokens: int = within(128, 1, 1e6)
    min_tokens: int = within(1, 1, 1e6)
    temperature: float = 0.0  # 0: the likeliest token


@dataclass
class Score:
    """Bounds of a score."""

    least: float = 0.0
    most: float | None = None


@dataclass
class BenchmarkConfig:
    """A benchmark of MLPerf's: what a submission is held to."""

    name: str | None = None  # the submission checker's; null: none
    round: str | None = None  # the last one that has it
    system_type: str | None = None  # datacenter or edge
    samples: int | None = within(None, 1, MOST_QUERIES)  # of a performance run
    dataset: str = "dataset.path=<MLPerf's own file>"  # words that choose its data set
    accuracy_samples: int | None = within(None, 1, MOST_QUERIES)
    performance: Generation = field(default_factory=Generation)
    accuracy: Generation = field(default_factory=Generation)
    scenarios: BenchmarkScenarios = field(default_factory=BenchmarkScenarios)
    needs: list[list[str]] = field(default_factory=list)  # scenarios of a closed submission: one of each list
    speculation: list[str] = field(default_factory=list)  # scenarios in which the rules allow speculative decoding
    scorer: str | None = None  # of the answers
    scores: dict[str, Score] = field(default_factory=dict)  # that they must have
    tests: list[str] = field(default_factory=list)  # compliance tests of a closed submission
    lacks: list[str] = field(default_factory=list)  # what autotune can't do of it
    loadgen: list[str] = field(default_factory=list)  # versions whose mlperf.conf is the round's
    checker: str | None = None  # commit of mlcommons/inference whose checker these figures are


@dataclass
class Recipe:
    """Flags that vLLM's or the model's own authors recommend: a study's second baseline."""

    args: dict[str, Any] = field(default_factory=dict)  # flags of `vllm serve`, beside those that the model needs
    source: str = ""  # where they were read
    date: str = ""  # of the last change there, as 2026-03-08


@dataclass
class ModelConfig:
    name: str = bounded(MISSING, file_name)  # short name, used in study names
    path: str | None = bounded(None, path)  # Hugging Face id or local folder
    revision: str | None = None  # git revision on the Hub
    build: Any = None  # its `_target_` makes the model's folder where no path is given
    shape: Any = None  # its `_target_` makes a folder without weights, for a backend that needs none
    args: dict[str, Any] = field(default_factory=dict)  # flags of `vllm serve` that the model needs
    recipe: Recipe = field(default_factory=Recipe)
    draft: str = "default"  # vLLM's speculative_config with what the model has for it, for space=speculation


@dataclass
class DatasetConfig:
    name: str = bounded(MISSING, file_name)
    # A file of records, used instead of `records`, unless these have a `path` of their own.
    path: str | None = bounded(None, path)
    records: Any = None  # its `_target_` yields the records where no path is given
    count: int | None = within(None, 1, 1e7)  # samples to use; null is all
    output: Output = Output.reference  # what ends an answer: its reference's length, or the model
    max_output_tokens: int = within(128, 1, 1e6)  # upper bound of a request's output length, tokens
    min_output_tokens: int = within(2, 1, 1e6)  # lower bound; TPOT is undefined for one token


@dataclass
class LoadSearch:
    """Settings of the search, on one server, for the highest load that keeps the limits: queries/s, or users."""

    # First load, queries/s or users, if the result is roughly known; null: a burst and short runs find it.
    start_qps: float | None = positive(None, 1e6)
    # The study sets it: the best trial's load so far. A trial is asked for it first, and left if it does not hold it.
    best: float | None = positive(None, 1e6)
    precision: float = positive(0.04, 1)  # a load that is higher than the certified one by this share fails
    burst: int = within(200, 1, MOST_QUERIES)  # requests sent at once, to measure the most that the server can take
    # Length of the shortest runs, s; a certifying run lasts scenario.min_duration_s.
    first_s: float = positive(10.0, DAY_S)
    # Factor by which runs grow longer on the way from the shortest to the certifying ones.
    growth: float = within(3.0, 1.01, 1000)
    # Least queries of a certifying run; LoadGen's test needs 459, with none over a limit.
    certify_queries: int = within(1000, 1, MOST_QUERIES)
    max_runs: int = within(25, 1, 1000)  # most runs; after them the highest load that is certified by then counts


@dataclass
class ScenarioConfig:
    name: str = bounded(MISSING, file_name)
    kind: Kind = MISSING  # who sends what when
    # Queries/s. Server: rate of Poisson arrivals; Offline: expected rate, which sets the query's size.
    qps: float = positive(1.0, 1e6)
    users: int = within(16, 1, 100_000)  # of a ClosedLoop, each of whom waits for the answer
    scale: float = positive(1.0, 1e6)  # of a Trace: 2 sends its requests twice as fast
    from_s: float = within(0.0, 0, 1e9)  # of a Trace: what comes earlier is left out, s since its first request
    to_s: float | None = positive(None, 1e9)  # of a Trace: what comes then or later is left out; null is to its end
    ramp_s: float = within(10.0, 0, DAY_S)  # over which the users of a ClosedLoop begin, evenly, s
    # Other than none: conversations, of which a turn is sent when the last one has been answered; qps counts them.
    answers: Answers = Answers.none
    endpoint: Endpoint = Endpoint.completions  # of conversations
    think_s: float = within(0.0, 0, DAY_S)  # from an answer to the next turn: the mean of exponential pauses, s
    ttft_ms: float | None = positive(None)  # limit on p99 TTFT, ms; null is no limit
    tpot_ms: float | None = positive(None)  # limit on p99 TPOT, ms; null is no limit
    latency_ms: float | None = positive(None)  # limit on p99 of the latency to the last token, ms; null is no limit
    # Limits on p99 TTFT by the prompt's length, each [most tokens, ms]; prompts that are longer than all have ttft_ms.
    ttft_by_prompt: Any = field(default_factory=list, metadata={"rule": pairs})
    min_duration_s: float = within(60.0, 0, 7 * DAY_S)  # a run lasts at least so long, s
    max_duration_s: float = within(0.0, 0, 7 * DAY_S)  # and at most, s; 0 is no limit; cuts a Trace short
    min_queries: int = within(100, 1, MOST_QUERIES)  # a run has at least so many
    max_queries: int = within(0, 0, MOST_QUERIES)  # and at most; 0 is no limit; cuts a Trace short
    # Requests sent together before a run, again and again until they get no faster.
    warmup_requests: int = within(16, 0, 1e5)
    seed: int = 1  # of the order of samples and of arrival times
    # Instead, LoadGen's three: of the order in which it loads samples, of that in which it issues them, of the times.
    seeds: list[int] | None = field(default=None, metadata={"rule": three_seeds})
    equal_issue: bool = False  # LoadGen issues each sample equally often, for which it makes the run longer
    benchmark: str | None = None  # name of a benchmark in LoadGen's own mlperf.conf, which then holds; null: none
    mode: Mode = Mode.performance  # LoadGen's
    audit: dict[str, Any] = field(default_factory=dict)  # settings of a compliance test, as in its audit.config
    stop: Stop = Stop.failed  # when a Server run ends early
    # Share of queries that may exceed a limit; null: what LoadGen's test allows.
    over_share: float | None = within(None, 0, 1)
    repeats: int = within(1, 1, 1000)  # runs of LoadGen on one server, each with the next seed; metrics are their means
    search: LoadSearch = field(default_factory=LoadSearch)
    args: dict[str, Any] = field(default_factory=dict)  # flags of `vllm serve` that the scenario's rules demand

    @property
    def load_field(self) -> str:
        """The field that has the load which is offered."""
        return {Kind.ClosedLoop: "users", Kind.Trace: "scale"}.get(self.kind, "qps")

    @property
    def loadgen_seeds(self) -> list[int]:
        """Seeds of the order in which LoadGen loads samples, of that in which it issues them, and of the times."""
        return self.seeds or [self.seed] * 3

    @property
    def load(self) -> float:
        return float(getattr(self, self.load_field))

    def with_load(self, load: float) -> "ScenarioConfig":
        offered: Any = round(load) if self.kind is Kind.ClosedLoop else load
        return replace(self, **{self.load_field: offered})

    @property
    def load_unit(self) -> str:
        rate = "queries/s" if self.answers is Answers.none else "sessions/s"
        return {Kind.ClosedLoop: "users", Kind.Trace: "× the trace"}.get(self.kind, rate)

    @property
    def by_loadgen(self) -> bool:
        """True if LoadGen sends the requests and gives the verdict, else autotune."""
        return self.kind.by_loadgen and self.answers is Answers.none

    @property
    def verdict_by(self) -> str:
        return "LoadGen" if self.by_loadgen else "autotune"


@dataclass
class EngineConfig:
    # Any flag of `vllm serve` by its own name; null is vLLM's default. They win over model.args and scenario.args.
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class AccuracyConfig:
    """Gate for configurations with other numerics than the baseline's: quantization, dtypes, attention backends."""

    check: Check = Check.auto
    # One-sided 95 % bound on how much worse a token is predicted than by the baseline, nats: a perplexity that is 3 %
    # higher. In a model of 135M, int8 weights took 0.001, fp8 ones 0.026 (at most 0.029), int4 ones 0.36.
    # Of rouge, a share of the baseline's (conf/accuracy/rouge.yaml has another).
    margin: float = positive(0.03, 10)
    # Prompts of the data set, at most. With 133 texts the bound of fp8 was 0.003 above its mean.
    texts: int = within(256, 2, 1e5)
    # Of each, at most: vLLM holds the whole vocabulary's probabilities for all of them, beside what it has planned.
    tokens: int = within(512, 2, 1e6)
    kept_in: str | None = None  # the study sets it: the folder with the scores of each numerics; null keeps none


@dataclass
class LiveConfig:
    """backend=live: real vLLM, driven by LoadGen."""

    _target_: str = MISSING
    python: str | None = None  # interpreter that has vLLM; null is the one that runs autotune
    prefix: list[str] = field(default_factory=list)  # words before vLLM's command: [srun, --overlap], a container's
    port: int | None = within(None, 1, 65535)  # vLLM's port on the loopback interface; null takes a free one
    env: dict[str, str] = field(default_factory=dict)  # added to vLLM's environment
    start_timeout_s: float = positive(900.0)  # from launch to healthy, s
    stop_timeout_s: float = 10.0  # from SIGTERM to SIGKILL, s
    request_timeout_s: float = positive(600.0)  # one HTTP request, s; what waits for a connection has not begun
    run_timeout_s: float = positive(7200.0)  # one run of LoadGen with its warm-up, s
    steps: bool = True  # the engine's steps are recorded in steps.parquet: what was in each, and its times
    hot: Hot = Hot.auto  # whether trials share a server: where it can be changed, with equal flags, or never
    # The study sets it: flags with which a shared server starts, the most of what is swept; null: trials share none.
    bounds: dict[str, Any] | None = None
    observe_s: float = positive(1.0, 3600)  # between two observations of vLLM's /metrics and the GPU during a run, s
    # Processes that send requests; null: one for each 16 cores, at least 1, at most 8.
    client_processes: int | None = within(None, 1, 1024)
    # A run is INVALID if its client was too slow. A process that is busy nearly all the time delays tokens:
    client_cpu_limit: float = positive(0.9)  # share of a core, for the busiest client process and for LoadGen's own
    # The client's own part of TTFT must be small beside the limit. Null: 0.05 with a GPU. Without one, vLLM computes on
    # the cores that the client waits for, so the figures are recorded, not judged.
    client_ttft_share: float | None = None  # of scenario.ttft_ms: p99 lateness, p99 loop lag, mean TTFT that it adds


@dataclass
class Device:
    """The cost of a simulated step on one GPU, or on a CPU; `autotune calibrate` fits the fields marked `fitted`."""

    name: str = MISSING
    memory_gib: float = positive(MISSING, 1e5)  # of which vLLM takes the share gpu_memory_utilization
    # Size of the KV cache, for a CPU; null: the memory that the weights leave.
    kv_gib: float | None = positive(None, 1e5)
    other_gib: float = 0.22  # memory outside torch's allocator
    workspace_gib: float = 0.44  # besides a step's activations
    activations_gib: float = 1.01  # least that vLLM's memory profile takes for activations and workspace
    graph_gib: float = 0.019  # one CUDA graph
    tflops: float = positive(MISSING)  # of a large, dense matrix product in bf16
    fp8_tflops: float | None = positive(None)  # the same in fp8; null: the device multiplies no fp8
    bandwidth_gbs: float = positive(MISSING)  # memory, GB/s
    link_gbs: float = positive(450.0)  # one GPU's link to the others, GB/s in each direction
    link_s: float = 1e-5  # latency of one all-reduce, s
    math_efficiency: float = positive(0.91, 2)  # fitted: share of tflops that a model's matrix products reach
    # Fitted: speed of attention, as a share of what the matrix products reach.
    attention_efficiency: float = positive(0.8, 2)
    bandwidth_efficiency: float = positive(0.83, 2)  # fitted: share of bandwidth_gbs
    step_s: float = 0.0013  # fitted: constant part of each step on the GPU, s
    host_s: float = 0.0016  # fitted: to schedule and prepare a step, s
    host_sequence_s: float = 8e-6  # fitted: the same, for each sequence in the step, s
    launch_s: float = 4.6e-4  # fitted: to launch a layer outside CUDA graphs, s
    piecewise_s: float = 2e-4  # fitted: the same in a step with prefill, where graphs hold all but attention, s
    # Fitted: launches of a layer that quantises its inputs, relative to one that does not.
    fp8_factor: float = positive(2.4)
    eager_factor: float = positive(3.0)  # launches of a layer with enforce_eager, relative to a compiled one
    accept_s: float = 9e-4  # fitted: for the API server to take in one request, s
    answer_s: float = 0.017  # fitted: from a step's end to the client, s
    import_s: float = 45.0  # parts of a server's start from here on, s
    load_gbs: float = positive(8.0)  # speed at which weights are loaded, GB/s
    compile_s: float = 27.0
    capture_s: float = 0.12  # for each CUDA graph
    warmup_s: float = 18.0
    max_num_batched_tokens: int = within(8192, 1, 1e7)  # vLLM's defaults on this device, for a server
    max_num_seqs: int = within(1024, 1, 1e6)
    block_size: int = within(16, 1, 1e5)  # the smallest
    default_block_size: int | None = within(None, 1, 1e5)  # vLLM's; null: the smallest
    async_scheduling: bool = True  # vLLM schedules a step while the last one runs
    gpus: int = within(8, 1, 1e4)  # in one machine


# Device's constants that `autotune calibrate` fits.
FITTED = (
    *("math_efficiency", "fp8_tflops", "attention_efficiency", "bandwidth_efficiency"),
    *("step_s", "host_s", "host_sequence_s", "launch_s", "piecewise_s", "fp8_factor", "accept_s", "answer_s"),
)
HOST = ("host_s", "host_sequence_s", "launch_s", "piecewise_s")  # those that depend on the host's processor


@dataclass
class SimConfig:
    """backend=sim: vLLM's scheduler on a virtual clock."""

    _target_: str = MISSING
    device: Device = field(default_factory=Device)
    # Recorded steps (steps.parquet, or a folder of trials) of servers that the simulated one is to be a twin of.
    twin: list[str] = field(default_factory=list)
    steps: bool = False  # the engine's steps are recorded in steps.parquet, as a live one's are
    pace: float = within(0.0, 0, 100)  # real seconds that pass for each simulated one; 0: as fast as it computes


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
    n_jobs: int | None = within(None, 1, 1024)  # trials at a time; null: one for each of `gpus`


@dataclass
class ClusterConfig:
    """launcher=slurm: trials as jobs of a cluster."""

    _target_: str = MISSING
    name: str = "slurm"
    cluster: str = "slurm"  # or another cluster that submitit has an executor for
    n_jobs: int = within(4, 1, 1e5)  # trials at a time, those in SLURM's queue included
    array: bool = False  # submit trials that start together as one job array
    canary: bool = False  # run a short baseline on each node first; slow nodes are named, broken ones get no trials
    poll_s: float = positive(5.0, 3600)  # between two calls of squeue, s
    parameters: dict[str, Any] = field(default_factory=dict)  # submitit's, by its names; null is the cluster's default


@dataclass
class ObjectiveConfig:
    name: str = MISSING
    metrics: list[str] = MISSING  # keys of result.json's `metrics`
    directions: list[str] = MISSING  # maximize or minimize, one for each metric


@dataclass
class PriorConfig:
    backend: Any = None  # it simulates the study; null: no prior
    trials: int = within(200, 1, 1e5)  # simulated ones
    keep: int = within(5, 0, 1000)  # best distinct ones, with which the study starts
    # The best are simulated again on this many devices, as the device's fitted constants may be off.
    devices: int = within(8, 0, 1000)
    sigma: float = within(0.15, 0, 2)  # how far off: the standard deviation of each constant's logarithm
    # Of a factor that the host's share: those were off by 1.8 and more, the GPU's were not.
    host_sigma: float = within(0.5, 0, 2)


@dataclass
class TrackingConfig:
    enabled: bool = True  # tracking=none switches it off
    uri: str = MISSING  # MLflow's tracking URI
    experiment: str = MISSING  # MLflow's experiment
    system_metrics_s: float = 10.0  # between samples of the machine (CPU, memory, disk, network, GPUs), s; 0 takes none


@dataclass
class Config:
    study: str = bounded(MISSING, study)  # name of the study and of its folder in multirun/
    n_trials: int = within(20, 1, 1e7)  # trials of a study, beside the baseline
    # What runs first, to compare with: defaults (vLLM's), recipe (model.recipe), a list of both; true is defaults.
    baseline: Any = True
    # 30m, 2h: after it no trial starts, and those that run may end; null is no limit.
    budget: str | None = bounded(None, duration)
    budget_of: BudgetOf = BudgetOf.engine  # what it counts: the time of trials, or that of the clock
    price_per_gpu_hour: float | None = positive(None)  # in any currency: trials then say what a million tokens cost
    # Load (queries/s, or users of a closed loop) for which the study says how many GPUs serve it, and at what price.
    target_load: float | None = positive(None)
    max_failures: int = within(10, 1, 1e7)  # trials that fail in a row end the study
    duplicates: Duplicates = Duplicates.lookup  # what happens to a configuration that was measured already
    resume: bool = False  # refuse to begin a new study; one that exists is continued in any case
    sampler: str = "auto"  # its name; conf/sampler/ sets it
    seed: int = 0  # of the sampler
    rules: Rules = Rules.none  # MLPerf's, that runs keep; conf/rules/ sets what follows from it
    warm_start: str | None = bounded(None, path)  # a study whose best `prior.keep` configurations are tried first
    # GPUs that trials may lease: a list of indices, or `all`; null: no leases, vLLM takes what it sees.
    gpus: Any = field(default=None, metadata={"rule": gpus})
    baseline_gpu: int | None = None  # GPU for the baseline; null is any of `gpus`
    conditions: dict[str, str] = field(default_factory=dict)  # rules between parameters, by name
    only_if: dict[str, str] = field(default_factory=dict)  # parameter → condition without which it is not swept
    secrets: list[str] = field(default_factory=list)  # fields and variables to hide beside those whose names say so
    cache_dir: str = bounded(MISSING, path)  # built models, prepared samples, what is known of the installed vLLM

    model: ModelConfig = field(default_factory=ModelConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    # `_target_` is the backend's class, whose `Config` types the other fields: LiveConfig, SimConfig, your own.
    backend: dict[str, Any] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    accuracy: AccuracyConfig = field(default_factory=AccuracyConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    pruner: Any = None  # `_target_` is an Optuna pruner, which decides the trials that end early
    launcher: dict[str, Any] = field(default_factory=dict)  # likewise: InlineConfig, LocalConfig, ClusterConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


DEFAULTS, RECIPE = "defaults", "recipe"  # what a study is compared with


def baselines(config: Config) -> list[str]:
    """The words of `config.baseline`. Raises InputError for another one, and for the recipe of a model without."""
    written = config.baseline
    words: list[Any] = written if isinstance(written, list) else [DEFAULTS] if written is True else [written]
    words = [] if written is False else words
    if wrong := [word for word in words if word not in (DEFAULTS, RECIPE)]:
        raise InputError(f"baseline={wrong[0]}: write false, defaults, recipe, or [defaults,recipe]")
    if RECIPE in words and not config.model.recipe.args:
        raise InputError(
            f"baseline={RECIPE}: {config.model.name} has none; leave it out, or write model.recipe.args.<flag>=<value>"
        )
    return list(dict.fromkeys(words))


def register() -> None:
    """Make the schema known to Hydra, with the fields open whose names only vLLM, a backend or a launcher knows."""
    schema = OmegaConf.structured(Config)
    flags = [schema.engine.args, schema.model.args, schema.model.recipe.args, schema.scenario.args]
    flags += [schema.scenario.audit, schema.benchmark.scores]
    for open_node in [*flags, schema.backend, schema.launcher, schema.conditions, schema.only_if]:
        OmegaConf.set_struct(open_node, False)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    for settings in (LiveConfig, SimConfig, InlineConfig, LocalConfig, ClusterConfig):
        store.store(name=settings.__name__, node=settings)
