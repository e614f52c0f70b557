"""The live backend: a vLLM server for each trial, fresh or shared with others, and LoadGen runs against it."""

import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from autotune.config import vllm_flags
from autotune.config.redact import redact
from autotune.config.schema import Hot, LiveConfig, ScenarioConfig, Stop
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.live import audit, gpu, hot, metrics_page, recording, scoring
from autotune.live.gpu import Gpus, GpuState
from autotune.live.installed_vllm import find_vllm
from autotune.live.load_generator import WARMUP_ROUNDS, ClientReport, LoadGenerator, RunSpec
from autotune.live.server import DYING_S, Server, inherited
from autotune.measure import loadgen_log, progress, series, traffic
from autotune.measure.backend import DryRunOutcome, Measurement, Recording, RequestTiming
from autotune.measure.bottleneck import ServerState
from autotune.measure.early_stopping import watched
from autotune.measure.limits import known_to_loadgen, limits_of
from autotune.measure.metrics import from_requests
from autotune.measure.objective import LOADED
from autotune.measure.slot import Slot
from autotune.system.files import read_rows, write_rows
from autotune.system.host import hardware

log = logging.getLogger(__name__)

S = TypeVar("S", ServerState, GpuState)

POLL_S = 0.1
WARM_S = 5.0  # for which vLLM's API server keeps idle connections (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)
IDLE_S = 60.0  # for which requests of a stopped run may go on, at most


@cache
def _tell_of(variables: str) -> None:
    if variables:
        log.info("vLLM gets %s from the environment: unset what is not meant to be measured", variables)


class LiveBackend:
    Config = LiveConfig
    needs_weights = True

    def __init__(self, config: LiveConfig, cache_dir: Path) -> None:
        self.config = config
        self.shares = config.hot is not Hot.never
        self.vllm = find_vllm(config.python or sys.executable, tuple(sorted(config.env.items())), cache_dir)
        for name in config.env:
            self.vllm.check_variable(name)
        loadgen = importlib.metadata.version("mlcommons-loadgen")
        self.flags = self.vllm.flags.keys()
        self.facts = {"vllm": self.vllm.version, "torch": self.vllm.torch, "loadgen": loadgen}
        switches = {name: value for name, value in redact(inherited(config)).items() if name.startswith("VLLM_")}
        self.facts["environment"] = " ".join(f"{name}={value}" for name, value in switches.items())
        _tell_of(self.facts["environment"])

    def read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return self.vllm.read(args)

    def prepare_dry_runs(self) -> None:
        self.vllm.probe()

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        return self.vllm.dry_run(model.folder, args)

    @contextmanager
    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, slot: Slot
    ) -> Iterator["LiveEngine"]:
        progress.phase(folder, "start")
        with LoadGenerator(samples, folder / "clients.log") as load:
            leased = slot.lease.visible if slot.lease else None
            gpus = Gpus(vllm_flags.gpus(args), self.config.env.get("CUDA_VISIBLE_DEVICES", leased))
            if others := "" if slot.server else gpus.others():
                log.warning("other processes on %s: they change what is measured", others)
            facts = self.facts | hardware() | ({"gpu_shared_with": others} if others else {})

            def engine(server: Server) -> LiveEngine:
                return LiveEngine(
                    server=server,
                    samples=samples,
                    config=self.config,
                    gpus=gpus,
                    facts=facts | {"server": server.told},
                    command=["vllm", "serve", *model.words, *self.vllm.command_line(redact(args))],
                    start=server.start,
                    load=load,
                    folder=folder,
                    has_metrics=not args.get("disable_log_stats"),
                    resolved=self.dry_run(model, args).resolved,
                )

            def rate(server: Server) -> float:
                run_folder = folder / hot.REFERENCE.name
                run_folder.mkdir(exist_ok=True)
                run = engine(server).run(hot.REFERENCE, run_folder)
                recording.forget(server.scratch)
                return from_requests(run.requests, ())["samples_per_s"]

            with hot.Sharing(self.config, self.vllm, model, folder, slot, rate).serving(args) as server:
                if not args.get("disable_log_stats"):
                    metrics_page.check(server.url)
                yield engine(server)


def connections(flags: Mapping[str, Any]) -> int:
    """The most connections to a server with vLLM's resolved `flags`: enough that as many requests wait there as run."""
    running = (flags.get("max_num_seqs") or 0) * (flags.get("data_parallel_size") or 1)
    return max(RunSpec.connections, 2 * running)


@dataclass
class LiveEngine:
    """A vLLM server that is healthy."""

    server: Server
    samples: Samples
    config: LiveConfig
    gpus: Gpus
    facts: dict[str, str]
    command: list[str]
    start: dict[str, float]
    load: LoadGenerator
    folder: Path  # the trial's
    has_metrics: bool  # vLLM's; false with its disable_log_stats
    resolved: Mapping[str, Any]  # vLLM's flags
    estimated: bool = False
    ended: float | None = None  # the last run, on time.monotonic's clock

    def run(self, scenario: ScenarioConfig, folder: Path) -> Measurement:
        if self.ended is not None and self.has_metrics:
            self._await_idle()
        spec = self._spec(scenario, folder)
        self.load.begin(spec)
        try:
            states, gpu_states = self._watch(spec)
        except BaseException:
            self.load.cancel()
            raise
        self.ended = time.monotonic()
        return self._measured(spec, states, gpu_states)

    def prefilled(self, texts: Sequence[list[int]]) -> list[scoring.Floats]:
        check = partial(progress.check, self.folder)
        return scoring.prefilled(self.server, texts, self.config.request_timeout_s, check)

    def decoded(
        self, prompts: Sequence[tuple[list[int], int]], temperature: float
    ) -> list[tuple[list[int], scoring.Floats]]:
        check = partial(progress.check, self.folder)
        return scoring.decoded(self.server, prompts, temperature, self.config.request_timeout_s, check)

    def recorded(self) -> Recording | None:
        if not self.config.steps:
            return None
        return recording.read(self.server.scratch, self.server.kv_tokens)

    def _spec(self, scenario: ScenarioConfig, folder: Path) -> RunSpec:
        total = 0  # not known
        if scenario.kind in LOADED:
            total = traffic.source(scenario, self.samples).total or 0
            total = min(total, scenario.max_queries or total)
        # LoadGen's max_duration_s may end the run with fewer queries than `total`, of which fewer may be over a limit:
        # that it passes is never certain before its end.
        cut = scenario.stop is Stop.decided and scenario.max_duration_s > 0 and scenario.kind.by_loadgen
        stop = Stop.never if not total else Stop.failed if cut else scenario.stop
        return RunSpec(
            folder=folder,
            url=self.server.url,
            model=self.server.model,
            scenario=replace(scenario, stop=stop, args={}),  # flags may hold secrets
            request_timeout_s=self.config.request_timeout_s,
            client_processes=self.config.client_processes or max(1, min(8, len(os.sched_getaffinity(0)) // 16)),
            connections=connections(self.resolved),
            max_model_len=self.resolved.get("max_model_len"),
            keep_answers=self.samples.continued or scenario.benchmark is not None,
            client_cpu_limit=self.config.client_cpu_limit,
            client_ttft_share=audit.ttft_share(self.config),
            warmup_rounds=self._warmup_rounds(),
            total=total,
            has_metrics=self.has_metrics,
        )

    def _warmup_rounds(self) -> int:
        """Rounds of warm-up, at most; none where the last run has warmed all up, and an idle server was seen since."""
        if self.ended is None:
            return WARMUP_ROUNDS
        return 0 if self.has_metrics and time.monotonic() - self.ended < WARM_S else 1

    def _await_idle(self) -> None:
        """Wait until vLLM has dropped the requests that a stopped run left behind. Raises MeasureError after IDLE_S."""
        deadline = time.monotonic() + IDLE_S
        while (state := metrics_page.state(self.server.url, 0.0)) is None or state.running + state.waiting > 0:
            self._check(deadline, f"vLLM still had requests of the last run after {IDLE_S:.0f} s")
            time.sleep(POLL_S)

    def _watch(self, spec: RunSpec) -> tuple[list[ServerState], list[GpuState]]:
        """Wait for the run to end, and observe the server and its GPUs meanwhile, on time.perf_counter's clock.

        Raises MeasureError if the server ends, LoadGen fails, the run takes longer than run_timeout_s, or a metric of
        vLLM's is missing.
        """
        states: list[ServerState] = []
        gpu_states: list[GpuState] = []
        deadline = time.monotonic() + self.config.run_timeout_s
        code, next_s = None, 0.0
        while code is None:
            code = self.load.wait(POLL_S)
            self._check(deadline, f"the run had not ended after backend.run_timeout_s={self.config.run_timeout_s:.0f}")
            if code is not None or time.monotonic() >= next_s:
                next_s = time.monotonic() + self.config.observe_s
                now = time.perf_counter()
                if self.has_metrics and (state := metrics_page.state(self.server.url, now)):
                    states.append(state)
                gpu_states += self.gpus.read(now)
        if code:
            self.server.process.wait(DYING_S)  # a vLLM that dies takes a while to end, and its reason is the better one
            self.server.check_alive()
            raise MeasureError(f"LoadGen's process ended with exit code {code}: {self.load.last_line()}")
        return states, gpu_states

    def _check(self, deadline: float, too_late: str) -> None:
        self.server.check_alive()
        progress.check(self.folder)
        if time.monotonic() > deadline:
            raise MeasureError(too_late)

    def _measured(self, spec: RunSpec, states: list[ServerState], gpu_states: list[GpuState]) -> Measurement:
        """Read the run's files and judge it. Raises MeasureError if every request failed."""
        folder, scenario = spec.folder, spec.scenario
        client = ClientReport(**json.loads((folder / "client.json").read_text()))
        requests = read_rows(folder / "requests.csv", RequestTiming)
        total = spec.total if client.stopped else len(requests) + client.failed
        if not requests:
            raise MeasureError(f"every request failed: {client.errors[0]}")
        reasons = watched(requests, total, scenario).reasons()
        verdict = "INVALID" if reasons else "VALID"
        loadgen_figures: dict[str, float] = {}
        if not client.stopped and scenario.by_loadgen:
            loadgen = loadgen_log.read(folder / "mlperf_log_detail.txt")
            loadgen_figures = loadgen.figures
            if scenario.over_share is None and all(map(known_to_loadgen, limits_of(scenario))):
                verdict, reasons = loadgen.verdict, list(loadgen.reasons)
            elif scenario.over_share is None and loadgen.verdict != "VALID":
                verdict, reasons = loadgen.verdict, [*reasons, *loadgen.reasons]
        if client.reasons:
            verdict, reasons = "INVALID", [*client.reasons, *reasons]
        if client.failed:
            verdict = "INVALID"
            reasons.insert(0, f"{client.failed} of {len(requests) + client.failed} requests failed: {client.errors[0]}")
        states, gpu_states = since(client.began, states), since(client.began, gpu_states)
        figures = client.figures | gpu.figures(gpu_states)
        if gpu_states:
            write_rows(folder / series.GPU, GpuState, gpu_states)
            figures["gpu_j_per_token"] = figures["gpu_energy_j"] / sum(request.output_tokens for request in requests)
        if slowed := figures.get("gpu_slowed_share"):
            log.warning("the GPU was slowed down by heat or its protection for %.0f %% of the run", slowed * 100)
        return Measurement(
            requests=requests,
            failed=client.failed,
            total=total,
            verdict=verdict,
            reasons=reasons,
            loadgen=loadgen_figures,
            phases={"warmup": client.warmup_s, "run": client.run_s},
            server=states,
            figures=figures,
        )


def since(began: float, states: list[S]) -> list[S]:
    """The states from `began` on, with their times counted from it."""
    return [replace(state, time_s=state.time_s - began) for state in states if state.time_s >= began]
