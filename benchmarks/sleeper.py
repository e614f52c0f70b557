"""A stand-in for vLLM in benchmarks of the sweep: its trials sleep."""

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from autotune.config.schema import ScenarioConfig, SimConfig
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.measure import progress
from autotune.measure.backend import DryRunOutcome, Measurement, RequestTiming
from autotune.measure.slot import Slot

SIGMA = 0.8


@dataclass
class SleeperConfig(SimConfig):
    bounds: dict[str, Any] | None = None  # as a live backend's


class Sleeper:
    """A backend whose trials take a log-normal time of median `pace` seconds, the same for the same parameters.

    They share servers as those on real vLLM do.
    """

    Config = SleeperConfig
    needs_weights = False
    shares = True
    facts: ClassVar[dict[str, str]] = {}
    flags: ClassVar[tuple[str, ...]] = ("max_num_seqs",)

    def __init__(self, config: SleeperConfig, cache_dir: Path) -> None:
        self.config = config

    def read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Take every flag as it is."""
        return dict(args)

    def prepare_dry_runs(self) -> None:
        """They take no time."""

    def dry_run(self, model: Model, args: Mapping[str, Any]) -> DryRunOutcome:
        return DryRunOutcome("", {})

    @contextmanager
    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, slot: Slot
    ) -> Iterator["Asleep"]:
        seqs = int(args.get("max_num_seqs") or 1)
        sleep_s = self.config.pace * math.exp(random.Random(seqs).gauss(0, SIGMA))
        if slot.shares and self.config.bounds is not None and slot.server is None:
            slot.server = slot.keep(nullcontext(folder.name))
        told = f"shared: started by {slot.server}" if slot.server else "fresh"
        yield Asleep(sleep_s, 1000 - abs(seqs - 700), folder, {"server": told})


@dataclass(frozen=True)
class Asleep:
    """One request, of `tokens` tokens in a second, after `sleep_s`."""

    sleep_s: float
    tokens: int
    folder: Path
    facts: dict[str, str]
    start: dict[str, float] = field(default_factory=dict)
    command: list[str] = field(default_factory=lambda: ["sleep"])
    estimated: bool = False

    def run(self, scenario: ScenarioConfig, folder: Path) -> Measurement:
        began = time.time()
        while (left_s := began + self.sleep_s - time.time()) > 0:
            progress.check(self.folder)
            time.sleep(min(0.05, left_s))
        slept = {"slept_from": began, "slept_to": time.time()}
        request = RequestTiming(0, 0.0, 0.5, 1.0, self.tokens)
        return Measurement([request], 0, 1, "VALID", [], {}, {"run": self.sleep_s}, figures=slept)

    def recorded(self) -> None:
        """It has no steps."""
