"""The live backend: a fresh vLLM server for each measurement, LoadGen against it."""

import csv
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autotune import progress
from autotune.backend import DryRunOutcome, Measurement, RequestTiming
from autotune.errors import MeasureError
from autotune.facts import hardware
from autotune.leases import lease_for, leased
from autotune.live import flags, loadgen_log
from autotune.live.dry_run import dry_run
from autotune.live.run import ClientReport, Run
from autotune.live.server import Server, serve
from autotune.models import Model
from autotune.process import GuardedProcess
from autotune.redact import redact
from autotune.samples import Samples
from autotune.schema import LiveConfig, ScenarioConfig

log = logging.getLogger(__name__)

POLL_S = 0.1


class LiveBackend:
    Config = LiveConfig
    needs_weights = True
    estimates = False

    def __init__(self, config: LiveConfig, cache_dir: Path) -> None:
        self.config = config
        self._cache_dir = cache_dir
        self._env = tuple(sorted(config.env.items()))
        self.vllm = flags.installed(config.python or sys.executable, self._env, cache_dir)

    def check(self, args: Mapping[str, Any]) -> None:
        self.vllm.check(args)

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        return dry_run(self.vllm, self._env, model.folder, args, self._cache_dir)

    def measure(
        self, model: Model, args: Mapping[str, Any], scenario: ScenarioConfig, samples: Samples, folder: Path
    ) -> Measurement:
        log.info("starting vLLM for %s; its log: %s", model.path, folder / "vllm.log")
        progress.phase(folder, "start")
        with (
            lease_for(self.config.gpus, args) as lease,
            start_loadgen(samples, folder) as loadgen_process,
            serve(self.config, self.vllm, model, args, folder, lease) as server,
        ):
            run_loadgen(loadgen_process, server, scenario, folder, self.config)
            stopping = time.monotonic()
        phases = {"start": server.start_s, "stop": time.monotonic() - stopping}
        measured = self.measured(folder, phases, self.command(model, args))
        return replace(measured, facts={**measured.facts, **leased(lease)})

    def measured(self, folder: Path, phases: dict[str, float], command: list[str]) -> Measurement:
        """What the LoadGen run in `folder` showed. Raises MeasureError if no request was answered."""
        client = ClientReport(**json.loads((folder / "client.json").read_text()))
        loadgen = loadgen_log.read(folder / "mlperf_log_detail.txt")
        requests = read_requests(folder / "requests.csv")
        reasons = list(loadgen.reasons)
        if client.failed:
            total = len(requests) + client.failed
            reasons.insert(0, f"{client.failed} of {total} requests failed: {client.errors[0]}")
        if not requests:
            raise MeasureError(f"every request failed: {client.errors[0]}")
        return Measurement(
            requests=requests,
            failed=client.failed,
            verdict="INVALID" if client.failed else loadgen.verdict,
            reasons=reasons,
            loadgen=loadgen.figures,
            phases={**phases, "warmup": client.warmup_s, "run": client.run_s},
            command=command,
            facts={
                "vllm": self.vllm.version,
                "torch": self.vllm.torch,
                "loadgen": loadgen.version.split()[0],
                **hardware(),
            },
        )

    def command(self, model: Model, args: Mapping[str, Any]) -> list[str]:
        """What a user types to serve the same configuration."""
        revision = ["--revision", model.revision] if model.revision else []
        return ["vllm", "serve", model.path, *revision, *self.vllm.command_line(redact(args))]


def start_loadgen(samples: Samples, folder: Path) -> GuardedProcess:
    """LoadGen's process, which gets the samples ready and then waits for run_loadgen."""
    (folder / "run.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "autotune.live.loadgen", str(samples.path.resolve()), str(folder)]
    return GuardedProcess(command, folder / "loadgen.log", {}, stop_timeout_s=1.0)


def run_loadgen(
    process: GuardedProcess, server: Server, scenario: ScenarioConfig, folder: Path, config: LiveConfig
) -> None:
    """One LoadGen run against `server`, in the `process` that start_loadgen made for `folder`.

    Raises MeasureError if the server ends, the run does, or it takes longer than run_timeout_s.
    """
    run = Run(
        url=server.url,
        model=server.model,
        kind=scenario.kind.value,
        qps=scenario.qps,
        ttft_ms=scenario.ttft_ms,
        tpot_ms=scenario.tpot_ms,
        min_duration_s=scenario.min_duration_s,
        max_duration_s=scenario.max_duration_s,
        min_queries=scenario.min_queries,
        max_queries=scenario.max_queries,
        warmup_requests=scenario.warmup_requests,
        seed=scenario.seed,
        request_timeout_s=config.request_timeout_s,
    )
    draft = folder / ".run.json"
    draft.write_text(json.dumps(asdict(run), indent=1))
    draft.rename(folder / "run.json")
    progress.phase(folder, "run")
    deadline = time.monotonic() + config.run_timeout_s
    while (code := process.wait(POLL_S)) is None:
        server.check_alive()
        progress.check(folder)
        if time.monotonic() > deadline:
            raise MeasureError(f"LoadGen had not finished after backend.run_timeout_s={config.run_timeout_s:.0f}")
    if code:
        server.check_alive()
        output = folder / "loadgen.log"
        lines = output.read_text(errors="replace").strip().splitlines()
        raise MeasureError(f"LoadGen's process ended with exit code {code}: {lines[-1] if lines else output}")


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
