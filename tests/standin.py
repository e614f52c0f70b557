"""A backend for tests of what is above the seam: answers at once, from the flags alone."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.backend import DryRunOutcome, Measurement, RequestTiming
from autotune.errors import StartError
from autotune.live.leases import devices, lease
from autotune.models import Model
from autotune.schema import LiveConfig, ScenarioConfig

REFUSED, FAILS = 3, 5  # values of max_num_seqs


class Standin:
    Config = LiveConfig

    def __init__(self, config: LiveConfig, cache_dir: Path) -> None:
        self.config = config

    def check(self, args: Mapping[str, Any]) -> None:
        """Takes every flag."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        refused = args.get("max_num_seqs") == REFUSED
        return DryRunOutcome("three is refused" if refused else "", {"max_num_seqs": 8, "enable_chunked_prefill": True})

    def measure(
        self, model: Model, args: Mapping[str, Any], scenario: ScenarioConfig, samples: Path, folder: Path
    ) -> Measurement:
        """`max_num_seqs` tokens/s, with as many ms of TTFT as there are sequences."""
        seqs = args.get("max_num_seqs") or 8
        if seqs == FAILS:
            raise StartError("five fails")
        if self.config.gpus is not None:
            with lease(devices(self.config.gpus), int(args.get("tensor_parallel_size") or 1)) as held:
                started = time.time()
                time.sleep(0.3)
                (folder / "lease.json").write_text(json.dumps([list(held.gpus), started, time.time()]))
        request = RequestTiming(0, 0.0, seqs / 1e3, 1.0, seqs)
        return Measurement(
            [request], 0, "VALID", [], {"tpot_p99_ms": 1.0}, {"start": 0.0, "run": 1.0}, ["vllm", "serve", "x"]
        )
