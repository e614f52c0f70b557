"""The simulated backend: the same seam as live vLLM; what it returns are estimates."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune import progress, vllm_args
from autotune.backend import DryRunOutcome, Measurement, RequestTiming
from autotune.errors import StartError
from autotune.leases import lease_for, leased
from autotune.metrics import summary
from autotune.models import Model
from autotune.redact import redact
from autotune.samples import Samples
from autotune.schema import Kind, ScenarioConfig, SimConfig
from autotune.sim.arrivals import issues
from autotune.sim.cost import GIB, Cost, Shape
from autotune.sim.engine import serve
from autotune.sim.flags import HARMLESS, MODELLED, refusal, resolve, serving
from autotune.sim.kv_cache import KvCache, prefix_keys
from autotune.sim.scheduler import Limits, Request, Scheduler

log = logging.getLogger(__name__)

PUBLISH_S = 2.0  # simulated; as often as a real run publishes


class SimBackend:
    Config = SimConfig
    needs_weights = False

    def __init__(self, config: SimConfig, cache_dir: Path) -> None:
        self.config = config

    def check(self, args: Mapping[str, Any]) -> None:
        unknown = [name for name in args if name not in MODELLED and name not in HARMLESS]
        if unknown:
            log.warning("backend=sim leaves out what it does not model: engine.args.%s", ", ".join(unknown))

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        shape = Shape.of(model.config)
        flags = resolve(args, self.config.device, shape)
        return DryRunOutcome(refusal(flags, self.config.device, shape), flags)

    def measure(
        self, model: Model, args: Mapping[str, Any], scenario: ScenarioConfig, samples: Samples, folder: Path
    ) -> Measurement:
        outcome = self.dry_run(model, args)
        if outcome.refusal:
            raise StartError(outcome.refusal)
        flags = outcome.resolved
        cost = Cost(self.config.device, Shape.of(model.config), serving(flags))
        with lease_for(self.config.gpus, flags) as lease:
            requests = simulate(flags, cost, scenario, samples)
            run_s = max(request.last_token for request in requests)
            if self.config.pace:
                pass_time(requests, cost.start_s(), self.config.pace, folder)
        reasons = over_limits(scenario, requests)
        revision = ["--revision", model.revision] if model.revision else []
        return Measurement(
            requests=requests,
            failed=0,
            verdict="INVALID" if reasons else "VALID",
            reasons=reasons,
            loadgen={},
            phases={"start": cost.start_s(), "run": run_s},
            command=["vllm", "serve", model.path, *revision, *vllm_args.command_line(redact(args))],
            facts={"simulated": self.config.device.name, **leased(lease)},
            estimated=True,
        )


def simulate(flags: Mapping[str, Any], cost: Cost, scenario: ScenarioConfig, samples: Samples) -> list[RequestTiming]:
    """Run LoadGen's `scenario` against the server that resolved `flags` describe. Raises StartError as vLLM would."""
    blocks = cost.kv_tokens() // flags["block_size"]
    check_memory(flags, cost)
    limits = Limits(
        max_num_seqs=flags["max_num_seqs"],
        max_num_batched_tokens=flags["max_num_batched_tokens"],
        long_prefill_token_threshold=flags["long_prefill_token_threshold"],
        enable_chunked_prefill=flags["enable_chunked_prefill"],
        watermark_blocks=int(flags["watermark"] * blocks),
    )
    # vLLM keeps one block for itself.
    caching, size = flags["enable_prefix_caching"], flags["block_size"]
    replicas = [Scheduler(limits, KvCache(blocks - 1, size, caching)) for _ in range(flags["data_parallel_size"])]
    keys: dict[int, list[int]] = {}

    def request(number: int, sample: int, arrival: float) -> Request:
        prompt, output = samples.prompts[sample], int(samples.output_tokens[sample])
        if caching and sample not in keys:
            keys[sample] = prefix_keys(prompt, size)
        return Request(number, len(prompt), output, arrival, keys.get(sample, ()))

    def timing(sample: int, issued: float, done: Request) -> RequestTiming:
        late = cost.device.answer_s
        return RequestTiming(sample, issued, done.first_token + late, done.last_token + late, done.output)

    found: list[RequestTiming] = []
    if scenario.kind is Kind.SingleStream:
        clock = 0.0
        for number, (_, sample) in enumerate(issues(scenario, len(samples))):
            if number >= scenario.min_queries and clock >= scenario.min_duration_s:
                return found
            alone = request(number, sample, clock + cost.device.accept_s)
            serve([alone], replicas[0], cost)
            found.append(timing(sample, clock, alone))
            clock = found[-1].last_token
    issued = list(issues(scenario, len(samples)))
    requests, accepted = [], 0.0
    for number, (time_s, sample) in enumerate(issued):
        accepted = max(accepted, time_s) + cost.device.accept_s  # the API server takes them one by one
        requests.append(request(number, sample, accepted))
    for at, scheduler in enumerate(replicas):
        serve(requests[at :: len(replicas)], scheduler, cost)
    return [timing(sample, at, done) for (at, sample), done in zip(issued, requests, strict=True)]


def check_memory(flags: Mapping[str, Any], cost: Cost) -> None:
    """Raise StartError for what vLLM would run out of memory on."""
    tokens, longest = cost.kv_tokens(), flags["max_model_len"]
    share = f"gpu_memory_utilization={flags['gpu_memory_utilization']:g}"
    if tokens <= 0:
        raise StartError(f"no memory is left for the KV cache (simulated); raise {share} or tensor_parallel_size")
    if tokens < longest:
        raise StartError(
            f"the KV cache holds {tokens} tokens (simulated), max_model_len={longest} needs more; raise {share}"
        )
    if (missing := cost.logits_bytes() - cost.spare_bytes()) > 0:
        raise StartError(
            f"CUDA out of memory (simulated): logits of max_num_seqs={flags['max_num_seqs']} sequences need "
            f"{missing / GIB:.1f} GiB more than {share} leaves"
        )


def pass_time(requests: Sequence[RequestTiming], start_s: float, pace: float, folder: Path) -> None:
    """Let `pace` real seconds pass for each simulated one, and publish what a real run would.

    Raises StoppedError if the trial is asked to end.
    """
    began = time.monotonic()
    progress.phase(folder, "start")
    run_s, running, step = max(request.last_token for request in requests), False, 0
    while (simulated_s := (time.monotonic() - began) / pace - start_s) < run_s:
        progress.check(folder)
        if simulated_s > 0 and not running:
            running = True
            progress.phase(folder, "run")
        while (step + 1) * PUBLISH_S <= simulated_s:
            elapsed_s = (step + 1) * PUBLISH_S
            tokens = sum(generated(request, elapsed_s) for request in requests)
            ended = sum(request.last_token <= elapsed_s for request in requests)
            rates = {"tokens_per_s": tokens / elapsed_s, "samples_per_s": ended / elapsed_s}
            progress.publish(folder, step, rates)
            step += 1
        time.sleep(min(0.05, pace * PUBLISH_S / 4, max(0.0, pace * (run_s - simulated_s))))


def generated(request: RequestTiming, at_s: float) -> float:
    """Tokens of `request` until `at_s`, as if they came evenly."""
    if at_s <= request.first_token:
        return 0.0
    share = (at_s - request.first_token) / max(1e-9, request.last_token - request.first_token)
    return 1 + (request.output_tokens - 1) * min(1.0, share)


def over_limits(scenario: ScenarioConfig, requests: Sequence[RequestTiming]) -> list[str]:
    """Why LoadGen would not call the run VALID."""
    found = []
    for name, limit_ms in (("ttft", scenario.ttft_ms), ("tpot", scenario.tpot_ms)):
        if limit_ms is not None:
            p99_ms = summary(name, [getattr(request, name) for request in requests])[f"{name}_p99_ms"]
            if p99_ms > limit_ms:
                found.append(f"p99 {name.upper()} of {p99_ms:.0f} ms is over its limit of {limit_ms:g} ms")
    return found
