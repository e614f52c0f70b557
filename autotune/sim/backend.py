"""The simulated backend: the same interface as live vLLM, with estimates for measurements."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autotune.config import vllm_flags
from autotune.config.redact import redact
from autotune.config.schema import Kind, ScenarioConfig, SimConfig, Stop
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import InputError, StartError
from autotune.measure import progress, traffic
from autotune.measure.backend import DryRunOutcome, Measurement, Recording, RequestTiming
from autotune.measure.bottleneck import ServerState
from autotune.measure.early_stopping import watched
from autotune.measure.limits import limits_of, within
from autotune.measure.objective import LOADED
from autotune.measure.slot import Slot
from autotune.sim.client import SimClient
from autotune.sim.cost import GIB, Cost
from autotune.sim.engine import serve
from autotune.sim.flags import AUTO, HARMLESS, MODELLED, Flags, refusal, resolve
from autotune.sim.kv_cache import KvCache, prefix_keys
from autotune.sim.scheduler import Scheduler
from autotune.sim.shape import Shape

if TYPE_CHECKING:
    from autotune.measure.steps import Steps
    from autotune.sim.twin import Twin

log = logging.getLogger(__name__)

BETWEEN_S = 1.0  # simulated, between two runs in the recorded steps
LONG = 32  # blocks of a prompt; longer ones are found in the prefix cache by several blocks at once
PUBLISH_S = 2.0  # simulated; as often as a real run publishes


@cache
def _tell_of_window(tokens: int) -> None:
    log.info("simulation: layers that see %d tokens are treated as if they saw all; long contexts are too slow", tokens)


class SimBackend:
    Config = SimConfig
    needs_weights = False
    shares = False

    def __init__(self, config: SimConfig, cache_dir: Path) -> None:
        self.config = config
        self.flags = (*MODELLED, *HARMLESS)
        self.facts = {"simulated": config.device.name}
        self.twin: Twin | None = None  # of the server to simulate; None: fitted to the recorded steps, if there are any
        self._steps: list[Steps] = []
        if config.twin:
            from autotune.measure import steps  # pyarrow takes a while to import, as SciPy does for the fit

            self._steps = steps.read_all(config.twin)

    def read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        made = vllm_flags.read(args, vllm_flags.recorded(), "vLLM")
        if unknown := [name for name in made if name not in self.flags]:
            log.warning("simulation: without engine.args.%s, which only real vLLM knows", ", ".join(unknown))
        return made

    def prepare_dry_runs(self) -> None:
        """They take no time."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        shape = Shape.of(model.config)
        if model.config.get("sliding_window") and model.config.get("use_sliding_window", True):
            _tell_of_window(model.config["sliding_window"])
        flags = resolve(args, self.config.device, shape)
        return DryRunOutcome(refusal(flags, self.config.device, shape), asdict(flags))

    def twin_of(self, shape: Shape) -> "Twin | None":
        """The twin of the recorded servers; None if there are none. Raises InputError for those of another model."""
        if self._steps and not (self.twin and self.twin.shape == shape):
            from autotune.sim.twin import fit

            for one in self._steps:
                if one.model and Shape.of(one.model) != shape:
                    why = f"the steps of {one.name} are another model's; name steps of this model"
                    raise InputError(f"backend.twin: {why}")
            self.twin = fit(self._steps, self.config.device, shape)
        return self.twin

    def _cost(self, shape: Shape, flags: Flags) -> Cost:
        """The cost on the device, or on the twin of the recorded servers."""
        twin = self.twin_of(shape)
        return twin.cost(flags) if twin else Cost(self.config.device, shape, flags)

    @contextmanager
    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, slot: Slot
    ) -> Iterator["SimEngine"]:
        device, shape = self.config.device, Shape.of(model.config)
        flags = resolve(args, device, shape)
        if reason := refusal(flags, device, shape):
            raise StartError(reason)
        cost = self._cost(shape, flags)
        if args.get("max_model_len") == AUTO and 0 < cost.kv_tokens() < flags.max_model_len:
            flags = replace(flags, max_model_len=cost.kv_tokens())
            cost = self._cost(shape, flags)
        if missing := out_of_memory(cost):
            raise StartError(missing, cost.start_s)
        words = vllm_flags.command_line(redact(args), vllm_flags.recorded())
        command = ["vllm", "serve", *model.words, *words]
        if self.config.pace:
            pass_time(cost.start_s, self.config.pace, "start", folder)
        yield SimEngine(cost, samples, cost.start(), command, self.facts, self.config, folder)


@dataclass(frozen=True)
class SimEngine:
    """A simulated server; each run finds it idle."""

    cost: Cost
    samples: Samples
    start: dict[str, float]
    command: list[str]
    facts: dict[str, str]
    config: SimConfig
    folder: Path  # the trial's
    estimated: bool = True
    rows: list[tuple[float, ...]] = field(default_factory=list)  # of its steps, on one clock for all runs

    def run(self, scenario: ScenarioConfig, folder: Path) -> Measurement:
        requests, states, rows, total, figures = simulate(
            self.cost, scenario, self.samples, self.config.steps, scenario.stop
        )
        done, reasons = judge(requests, total, scenario)
        run_s = max(request.last_token for request in done)
        began = self.rows[-1][3] + BETWEEN_S if self.rows else 0.0
        self.rows.extend((*(began + time_s for time_s in row[:4]), *row[4:]) for row in rows if row[3] <= run_s)
        if self.config.pace:
            pass_time(run_s, self.config.pace, "run", self.folder, done, scenario)
        return Measurement(
            requests=done,
            failed=0,
            total=total,
            verdict="VALID" if not reasons else "INVALID",
            reasons=reasons,
            loadgen={},
            phases={"run": run_s},
            server=[state for state in states if state.time_s <= run_s],
            figures=figures,
        )

    def recorded(self) -> Recording | None:
        return Recording(np.array(self.rows), self.cost.kv_tokens()) if self.config.steps else None


class Simulated(NamedTuple):
    """A run of the simulated server; of several replicas (data parallelism) states and steps are the first one's."""

    requests: list[RequestTiming]
    states: list[ServerState]  # over time
    rows: list[tuple[float, ...]]  # of its steps, if they are asked for
    total: int  # requests; those are left out of `requests` that a stopped run did not end
    figures: dict[str, float]  # of all replicas, named as in result.json


def simulate(
    cost: Cost, scenario: ScenarioConfig, samples: Samples, record: bool = False, stop: Stop = Stop.never
) -> Simulated:
    """Send the requests of `scenario` to the server that `cost` describes; `record` its steps.

    Where there is one replica, what would come after `stop` has ended the run may be left out.
    """
    flags = cost.flags
    blocks = cost.kv_tokens() // flags.block_size - 1  # vLLM keeps one for itself
    caching, size = flags.enable_prefix_caching, flags.block_size
    # What the prompts of a trace or of a conversation share is exact: blocks are found one by one.
    exact = scenario.kind is Kind.Trace or samples.continued
    span = max(1, int(samples.prompt_tokens.mean() / size / LONG)) if caching and not exact else 1

    def keys(sample: int) -> list[int]:
        return prefix_keys(samples.prompts[sample], size * span) if caching else []

    known = keys if scenario.kind is Kind.Trace else cache(keys)  # few of a trace's prompts are sent twice

    count = flags.data_parallel_size
    sources = [traffic.source(scenario, samples, at, count, flags.max_model_len) for at in range(count)]
    until = stop if count == 1 else Stop.never
    clients = [SimClient(scenario, one, samples, cost.device, known, size, until) for one in sources]
    replicas = [Scheduler(flags, KvCache(blocks, size, caching, span)) for _ in range(count)]
    observers = [serve(client, one, cost, record) for client, one in zip(clients, replicas, strict=True)]
    timings = [timing for client in clients for timing in client.timings]
    totals = [one.total for one in sources]
    total = len(timings) if None in totals else sum(filter(None, totals))
    figures = {
        "prefix_hit_tokens": float(sum(one.hits for one in replicas)),
        "prefix_query_tokens": float(sum(one.queries for one in replicas)),
    }
    figures = (figures if caching else {}) | traffic.figures(sources)
    return Simulated(timings, observers[0].states, observers[0].rows, total, figures)


def judge(requests: list[RequestTiming], total: int, scenario: ScenarioConfig) -> tuple[list[RequestTiming], list[str]]:
    """The `requests` that end before scenario.stop ends the run, and LoadGen's reasons to call it INVALID."""
    if scenario.kind not in LOADED or not limits_of(scenario):
        return requests, []
    ended = sorted(requests, key=lambda request: request.last_token)
    stop = Stop.never if scenario.kind is Kind.ClosedLoop else scenario.stop  # as live: how long it gets is not known
    watch = watched(ended, total, scenario, stop)
    return ended[: watch.seen], watch.reasons()


def out_of_memory(cost: Cost) -> str:
    """Describe the allocation for which vLLM would lack memory while it starts; empty if it has enough."""
    tokens, longest = cost.kv_tokens(), cost.flags.max_model_len
    share = f"gpu_memory_utilization={cost.flags.gpu_memory_utilization:g}"
    if tokens <= cost.flags.block_size:  # vLLM keeps one for itself
        return f"no memory is left for the KV cache (simulated); raise {share} or tensor_parallel_size"
    if tokens < longest:
        return f"the KV cache holds {tokens} tokens (simulated), max_model_len={longest} needs more; raise {share}"
    if (missing := cost.missing_bytes()) > 0:
        return (
            f"CUDA out of memory (simulated): logits of max_num_seqs={cost.flags.max_num_seqs} sequences need "
            f"{missing / GIB:.1f} GiB more than {share} leaves"
        )
    return ""


def pass_time(
    simulated_s: float,
    pace: float,
    phase: str,
    folder: Path,
    requests: Sequence[RequestTiming] = (),
    scenario: ScenarioConfig | None = None,
) -> None:
    """Let `pace` real seconds pass for each simulated one, and publish rates as a run does. Raises StoppedError."""
    progress.phase(folder, phase)
    began, step = time.monotonic(), 1
    while (now_s := (time.monotonic() - began) / pace) < simulated_s:
        progress.check(folder)
        while scenario and step * PUBLISH_S <= now_s:
            progress.publish(folder, step - 1, published(requests, step * PUBLISH_S, scenario))
            step += 1
        time.sleep(min(0.05, pace * PUBLISH_S / 4, max(0.0, pace * (simulated_s - now_s))))


def published(requests: Sequence[RequestTiming], until_s: float, scenario: ScenarioConfig) -> dict[str, float]:
    """The rates that a real run publishes after `until_s`."""
    ended = [request for request in requests if request.last_token <= until_s]
    held = limits_of(scenario)
    good = sum(within(request, held) for request in ended)
    tokens = sum(generated(request, until_s) for request in requests)
    counts = {"tokens_per_s": tokens, "samples_per_s": len(ended), "goodput_per_s": good}
    return {name: count / until_s for name, count in counts.items()}


def generated(request: RequestTiming, at_s: float) -> float:
    """Tokens that `request` has generated by `at_s`, spread evenly between its first and its last."""
    if at_s <= request.first_token:
        return 0.0
    share = (at_s - request.first_token) / max(1e-9, request.last_token - request.first_token)
    return 1 + (request.output_tokens - 1) * min(1.0, share)
