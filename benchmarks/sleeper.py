"""A stand-in for vLLM in benchmarks of the sweep: its trials sleep."""

import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune import progress
from autotune.backend import DryRunOutcome, Measurement, RequestTiming
from autotune.leases import lease_for, leased
from autotune.models import Model
from autotune.samples import Samples
from autotune.schema import ScenarioConfig, SimConfig

SIGMA = 0.8


class Sleeper:
    """A backend whose trials take a log-normal time of median `pace` seconds, the same for the same parameters."""

    Config = SimConfig
    needs_weights = False

    def __init__(self, config: SimConfig, cache_dir: Path) -> None:
        self.config = config

    def check(self, args: Mapping[str, Any]) -> None:
        """Takes every flag."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        return DryRunOutcome("", {})

    def measure(
        self, model: Model, args: Mapping[str, Any], scenario: ScenarioConfig, samples: Samples, folder: Path
    ) -> Measurement:
        seqs = int(args.get("max_num_seqs") or 1)
        sleep_s = self.config.pace * math.exp(random.Random(seqs).gauss(0, SIGMA))
        with lease_for(self.config.gpus, args) as lease:
            began = time.time()
            while time.time() < began + sleep_s:
                progress.check(folder)
                time.sleep(min(0.05, max(0.0, began + sleep_s - time.time())))
        value = 1000 - abs(seqs - 700)
        phases = {"start": 0.0, "run": sleep_s}
        facts = {"slept": f"{began} {time.time()}", **leased(lease)}
        return Measurement([RequestTiming(0, 0.0, 0.5, 1.0, value)], 0, "VALID", [], {}, phases, ["sleep"], facts)
