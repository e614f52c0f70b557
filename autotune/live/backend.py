"""The live backend: a fresh vLLM server for each trial, LoadGen runs against it."""

import csv
import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from autotune.config import vllm_flags
from autotune.config.redact import redact
from autotune.config.schema import Kind, LiveConfig, ScenarioConfig, Stop
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import MeasureError
from autotune.live import audit, gpu, installed_vllm, loadgen_log, metrics_page
from autotune.live.gpu import Gpus, GpuState
from autotune.live.messages import ClientReport, Run
from autotune.live.server import Server, serve
from autotune.measure import progress
from autotune.measure.arrivals import issues
from autotune.measure.backend import DryRunOutcome, Measurement, RequestTiming
from autotune.measure.bottleneck import ServerState
from autotune.measure.early_stopping import watched
from autotune.system.files import write_whole
from autotune.system.host import hardware
from autotune.system.leases import Lease
from autotune.system.process import GuardedProcess

log = logging.getLogger(__name__)

S = TypeVar("S", ServerState, GpuState)

POLL_S = 0.1
IDLE_S = 60.0  # most that requests of a run that was stopped may go on for


class LiveBackend:
    Config = LiveConfig
    needs_weights = True

    def __init__(self, config: LiveConfig, cache_dir: Path) -> None:
        self.config = config
        self._cache_dir = cache_dir
        self._env = tuple(sorted(config.env.items()))
        self.vllm = installed_vllm.installed(config.python or sys.executable, self._env, cache_dir)

    def check(self, args: Mapping[str, Any]) -> None:
        self.vllm.check(args)

    def prepare_dry_runs(self) -> None:
        installed_vllm.probe(self.vllm.python, self._env)  # imports vLLM

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        return installed_vllm.dry_run(self.vllm, self._env, model.folder, args, self._cache_dir)

    @contextmanager
    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, lease: Lease | None
    ) -> Iterator["LiveEngine"]:
        log.info("starting vLLM for %s; its log: %s", model.path, folder / "vllm.log")
        progress.phase(folder, "start")
        with LoadGen(samples, folder) as loadgen:
            gpus = gpus_of(lease, args)
            if others := gpus.others():
                log.warning("not alone on %s: what is measured depends on what they do", others)
            with serve(self.config, self.vllm, model, args, folder, lease) as server:
                facts = self._facts() | ({"gpu_shared_with": others} if others else {})
                yield LiveEngine(
                    server=server,
                    samples=samples,
                    config=self.config,
                    gpus=gpus,
                    facts=facts,
                    command=self.command(model, args),
                    start=server.start,
                    loadgen=loadgen,
                    folder=folder,
                )

    def _facts(self) -> dict[str, str]:
        loadgen = importlib.metadata.version("mlcommons-loadgen")
        return {"vllm": self.vllm.version, "torch": self.vllm.torch, "loadgen": loadgen, **hardware()}

    def command(self, model: Model, args: Mapping[str, Any]) -> list[str]:
        """What a user types to serve the same configuration."""
        revision = ["--revision", model.revision] if model.revision else []
        return ["vllm", "serve", model.path, *revision, *self.vllm.command_line(redact(args))]


def gpus_of(lease: Lease | None, args: Mapping[str, Any]) -> Gpus:
    count = vllm_flags.gpus(args)
    return Gpus(count, ",".join(map(str, lease.gpus))) if lease else Gpus(count)


class LoadGen(GuardedProcess):
    """LoadGen's process: gets the samples ready, then waits for run.json in `folder`."""

    def __init__(self, samples: Samples, folder: Path) -> None:
        self.folder = folder
        (folder / "run.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "autotune.live.loadgen", str(samples.path.resolve()), str(folder)]
        super().__init__(command, folder / "loadgen.log", {}, stop_timeout_s=1.0)

    def begin(self, run: Run) -> None:
        write_whole(self.folder / "run.json", json.dumps(asdict(run), indent=1))

    def last_words(self) -> str:
        lines = (self.folder / "loadgen.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"see {self.folder / 'loadgen.log'}"


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
    loadgen: LoadGen | None  # one that is ready, for the first run
    folder: Path  # the trial's
    estimated: bool = False

    def run(self, scenario: ScenarioConfig, folder: Path) -> Measurement:
        ready, self.loadgen = self.loadgen, None
        with ready or LoadGen(self.samples, folder) as loadgen:
            if not ready:
                self._await_idle()
            run = self._run(scenario, folder, first=ready is not None)
            states, gpu_states = self._watch(loadgen, run)
        return self._measured(run, scenario, states, gpu_states)

    def _run(self, scenario: ScenarioConfig, folder: Path, first: bool) -> Run:
        total = 0
        if scenario.kind is Kind.Server:
            total = sum(1 for _ in issues(scenario, len(self.samples)))
            total = min(total, scenario.max_queries or total)
        # With a longest duration the run may end with fewer queries, of which fewer may be over a limit.
        cut = scenario.stop is Stop.decided and scenario.max_duration_s > 0
        return Run(
            folder=str(folder),
            url=self.server.url,
            model=self.server.model,
            kind=scenario.kind.value,
            qps=scenario.qps,
            ttft_ms=scenario.ttft_ms,
            tpot_ms=scenario.tpot_ms,
            min_duration_s=scenario.min_duration_s,
            max_duration_s=scenario.max_duration_s,
            min_queries=scenario.min_queries,
            max_queries=scenario.max_queries,
            warmup_requests=scenario.warmup_requests,
            warmup_rounds=Run.warmup_rounds if first else 1,  # later the connections alone are new
            seed=scenario.seed,
            stop=(Stop.failed if cut else scenario.stop).value,
            over_share=scenario.over_share,
            request_timeout_s=self.config.request_timeout_s,
            client_processes=self.config.client_processes or max(1, min(8, len(os.sched_getaffinity(0)) // 16)),
            client_cpu_limit=self.config.client_cpu_limit,
            client_ttft_share=audit.ttft_share(self.config),
            total=total,
        )

    def _await_idle(self) -> None:
        """A run that was stopped leaves requests behind, which vLLM drops when it notices."""
        deadline = time.monotonic() + IDLE_S
        while (state := metrics_page.state(self.server.url, 0.0)) is None or state.running + state.waiting > 0:
            self._check(deadline, f"vLLM still had requests of the last run after {IDLE_S:.0f} s")
            time.sleep(POLL_S)

    def _watch(self, loadgen: LoadGen, run: Run) -> tuple[list[ServerState], list[GpuState]]:
        """Let LoadGen make `run`, and look at the server and its GPUs meanwhile, on time.perf_counter's clock.

        Raises MeasureError if the server ends, LoadGen does, or it takes longer than run_timeout_s.
        """
        loadgen.begin(run)
        if run.folder == str(self.folder):
            progress.phase(self.folder, "run")
        states: list[ServerState] = []
        gpu_states: list[GpuState] = []
        deadline = time.monotonic() + self.config.run_timeout_s
        code, next_look = None, 0.0
        while code is None:
            code = loadgen.wait(POLL_S)
            self._check(
                deadline, f"LoadGen had not finished after backend.run_timeout_s={self.config.run_timeout_s:.0f}"
            )
            if code is not None or time.monotonic() >= next_look:
                next_look = time.monotonic() + self.config.observe_s
                now = time.perf_counter()
                states += [state for state in [metrics_page.state(self.server.url, now)] if state]
                gpu_states += self.gpus.read(now)
        if code:
            self.server.check_alive()
            raise MeasureError(f"LoadGen's process ended with exit code {code}: {loadgen.last_words()}")
        return states, gpu_states

    def _check(self, deadline: float, too_late: str) -> None:
        self.server.check_alive()
        progress.check(self.folder)
        if time.monotonic() > deadline:
            raise MeasureError(too_late)

    def _measured(
        self, run: Run, scenario: ScenarioConfig, states: list[ServerState], gpu_states: list[GpuState]
    ) -> Measurement:
        """What the run's files show. Raises MeasureError if no request was answered."""
        folder = Path(run.folder)
        client = ClientReport(**json.loads((folder / "client.json").read_text()))
        requests = read_requests(folder / "requests.csv")
        total = run.total if client.stopped else len(requests) + client.failed
        if not requests:
            raise MeasureError(f"every request failed: {client.errors[0]}")
        reasons = watched(requests, total, scenario).reasons()
        verdict = "INVALID" if reasons else "VALID"
        found: dict[str, float] = {}
        if not client.stopped:
            loadgen = loadgen_log.read(folder / "mlperf_log_detail.txt")
            found = loadgen.figures
            if scenario.over_share is None:
                verdict, reasons = loadgen.verdict, list(loadgen.reasons)
        if client.reasons:
            verdict, reasons = "INVALID", [*client.reasons, *reasons]
        if client.failed:
            verdict = "INVALID"
            reasons.insert(0, f"{client.failed} of {len(requests) + client.failed} requests failed: {client.errors[0]}")
        states, gpu_states = since(client.began, states), since(client.began, gpu_states)
        figures = client.figures | gpu.figures(gpu_states)
        if gpu_states:
            gpu.write(gpu_states, folder)
            figures["gpu_j_per_token"] = figures["gpu_energy_j"] / sum(request.output_tokens for request in requests)
        if slowed := figures.get("gpu_slowed_share"):
            log.warning("the GPU was slowed down by heat or its protection for %.0f %% of the run", slowed * 100)
        return Measurement(
            requests=requests,
            failed=client.failed,
            total=total,
            verdict=verdict,
            reasons=reasons,
            loadgen=found,
            phases={"warmup": client.warmup_s, "run": client.run_s},
            server=states,
            figures=figures,
            facts=self.facts,
        )


def since(began: float, states: list[S]) -> list[S]:
    """Those after `began`, with their times from it on."""
    return [replace(state, time_s=state.time_s - began) for state in states if state.time_s >= began]


def read_requests(path: Path) -> list[RequestTiming]:
    with path.open(newline="") as file:
        return [
            RequestTiming(
                int(row["sample"]),
                float(row["issued"]),
                float(row["first_token"]),
                float(row["last_token"]),
                int(row["output_tokens"]),
            )
            for row in csv.DictReader(file)
        ]
