"""Fit a device's constants to measured trials:

    autotune calibrate STEPS|FOLDER … [--predict STEPS …] [--out FILE] [backend/device=h100] [model=…]
    autotune calibrate RESULT.json|FOLDER … [--out FILE] [--check] [backend/device=h100]

STEPS are recorded steps (steps.parquet, .csv, .csv.xz) of one model on one kind of GPU; `FILE:flag=value,…` says
vLLM's flags where the file does not. The constants are fitted to them within seconds. `--predict` says how well they
tell the steps of other servers. A folder stands for every steps.parquet below it, and where there is none for every
result.json-like file: each trial is simulated as it was configured, and the constants change until rates and latencies
agree, within minutes. Prints the device's YAML with the error that is left, and writes it to FILE.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import HydraException
from numpy.typing import NDArray
from omegaconf.errors import OmegaConfBaseException
from scipy.optimize import least_squares

from autotune.config import bounds
from autotune.config.advice import told
from autotune.config.command_line import Parser, compose, errors_in_one_line
from autotune.config.schema import FITTED, HOST, Device, Kind, ScenarioConfig
from autotune.data.samples import Samples
from autotune.errors import AutotuneError, InputError
from autotune.measure import runs, steps
from autotune.measure.metrics import from_requests
from autotune.measure.prepare import prepare, prepare_samples
from autotune.measure.result import Result
from autotune.sim import from_steps
from autotune.sim.backend import SimBackend, simulate
from autotune.sim.cost import Cost
from autotune.sim.flags import resolve
from autotune.sim.shape import Shape
from autotune.system.files import read_json

BOUNDS = {
    "math_efficiency": (0.3, 1.1),
    "fp8_tflops": (100, 4000),
    "attention_efficiency": (0.1, 2.0),
    "bandwidth_efficiency": (0.3, 1.0),
    "step_s": (1e-5, 1e-2),
    "host_s": (1e-4, 1e-2),
    "host_sequence_s": (1e-7, 1e-3),
    "launch_s": (1e-5, 1e-2),
    "piecewise_s": (1e-6, 1e-2),
    "fp8_factor": (1.0, 4.0),
    "accept_s": (1e-4, 2e-3),
    "answer_s": (1e-4, 5e-2),
}
# The metrics that are compared, each with a relative error that weighs as much as the others'.
OFFLINE = {"samples_per_s": 0.02}
ONLINE = {"ttft_p50_ms": 0.3, "ttft_p99_ms": 0.1, "tpot_p50_ms": 0.2, "tpot_p99_ms": 0.1}
SLOWER = (0.5, 1.0, 2.0)  # a fit starts from the device with its host's constants times each; the best result counts
PRIOR = 0.1  # weight of a constant's change, in logarithms: a constant that no trial shows keeps its value
SEEDS = 4  # draws that are averaged where the measured run had other samples than the simulated one
KEPT = ("experiment", "model", "dataset", "scenario", "engine.", "objective")


@dataclass(frozen=True)
class Case:
    """One measured run."""

    name: str
    shape: Shape
    args: dict[str, Any]
    draws: list[tuple[ScenarioConfig, Samples]]
    measured: dict[str, float]
    start_s: float | None

    def tolerances(self) -> dict[str, float]:
        compared = OFFLINE if self.draws[0][0].kind is Kind.Offline else ONLINE
        return {metric: tolerance for metric, tolerance in compared.items() if metric in self.measured}

    def estimated(self, device: Device) -> dict[str, float]:
        """The compared metrics, simulated."""
        cost = self.cost(device)
        simulated = [from_requests(simulate(cost, *draw).requests, []) for draw in self.draws]
        return {metric: float(np.mean([run[metric] for run in simulated])) for metric in self.tolerances()}

    def cost(self, device: Device) -> Cost:
        return Cost(device, self.shape, resolve(self.args, device, self.shape))


@errors_in_one_line()
def main() -> None:
    parser = Parser(
        prog="autotune calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+")
    parser.add_argument("--out", type=Path, help="write the device's YAML here")
    parser.add_argument("--check", action="store_true", help="fit nothing: print the error that the device leaves")
    parser.add_argument("--predict", nargs="+", default=[], help="recorded steps to predict from the others")
    arguments, overrides = parser.parse_known_intermixed_args()
    given = [word for word in arguments.results if not is_override(word)]
    to_predict = [word for word in arguments.predict if not is_override(word)]
    overrides += [word for word in arguments.results + arguments.predict if is_override(word)]
    if to_predict or any(map(steps.hold_steps, given)):
        recorded, predicted = steps.read_all(given), steps.read_all(to_predict)
        text = from_steps.report(recorded, predicted, start_device(overrides), model(overrides))
    else:
        text = from_results([Path(word) for word in given], overrides, arguments.check)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    print(text)


def is_override(word: str) -> bool:
    """True for `backend/device=h200`, false for a file, and for `FILE:flag=value`."""
    return "=" in word and not Path(word).exists() and not Path(word.rpartition(":")[0] or "=").exists()


def from_results(given: Sequence[Path], overrides: Sequence[str], check: bool) -> str:
    """The YAML of a device that is fitted to the trials in `given`, or with `check` the error that it leaves."""
    if missing := [str(path) for path in given if not path.exists()]:
        raise InputError(f"{missing[0]}: no such file or folder; give result.json files, or folders that hold some")
    files = sorted(file for path in given for file in (path.rglob("*.json") if path.is_dir() else [path]))
    cases = [case for file, name in names(files).items() for case in read(file, name)]
    if not cases:
        raise InputError("no measured trial among the results; give result.json files, or folders that hold some")
    device = start_device(overrides)
    if not check:
        print(f"fitting {device.name} to {len(cases)} runs: some seconds for each", file=sys.stderr)
    return as_yaml(device if check else fit(cases, device), cases)


def start_device(overrides: Sequence[str]) -> Device:
    """The device that `overrides` of autotune's name, which a fit begins with."""
    config, _, _ = compose(overrides, ["model=tiny", "backend=sim"])
    backend = prepare(config).backend
    if not isinstance(backend, SimBackend):
        raise InputError("backend: calibrate fits a simulated device; leave it out, or write backend=sim")
    return backend.config.device


def model(overrides: Sequence[str]) -> dict[str, Any] | None:
    """The config.json of the model that `overrides` name, if they name one."""
    if not any(override.startswith("model") for override in overrides):
        return None
    return prepare(compose(overrides, ["backend=sim"])[0]).model.config


def names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for the trial in each file: its path below the folder that all share; of a result.json, its folder's."""
    paths = {file: file.resolve() for file in files}
    trials = {file: path.parent if path.stem == "result" else path.with_suffix("") for file, path in paths.items()}
    shared = os.path.commonpath([trial.parent for trial in trials.values()]) if trials else ""
    return {file: str(trial.relative_to(shared)) for file, trial in trials.items()}


def read(file: Path, name: str) -> list[Case]:
    """The runs of the trial in `file`; none if it is another kind of file, or the trial measured nothing."""
    try:
        body = read_json(file)
        if body.get("state") != "complete" or body.get("estimated"):
            return []
        result = Result.of({"values": [0.0], **body})  # the objective is none of a calibration's figures
        config, _, _ = compose(kept(result.overrides), ["backend=sim"])
        prepared = prepare(config)
        samples = prepare_samples(config, prepared)
        measured = runs.whole(config.scenario, result)
        for _, scenario, metrics in measured:
            bounds.check(scenario, "scenario")
            compared = {metric: metrics[metric] for metric in metrics.keys() & (OFFLINE | ONLINE)}
            bounds.check(compared, "metrics", items=bounds.number(above=0))
    except (AutotuneError, HydraException, OmegaConfBaseException, ValueError, TypeError, KeyError) as error:
        print(f"{file} left out: {told(error)}", file=sys.stderr)
        return []
    same = result.facts.get("dataset_checksum") == samples.checksum
    shape, start_s = Shape.of(prepared.model.config), result.phases.get("start")
    cases = []
    for run, scenario, metrics in measured:
        seeds = [scenario.seed] if same or scenario.kind is Kind.Offline else range(1, SEEDS + 1)
        draws = [(dataclasses.replace(scenario, seed=seed), samples) for seed in seeds]
        cases.append(Case(f"{name} {run}".rstrip(), shape, prepared.args, draws, metrics, start_s))
    return cases


def kept(overrides: Sequence[str]) -> list[str]:
    """The overrides that describe what was measured; of those of one key, a study's after the user's, the last."""
    described = [override for override in overrides if override.lstrip("+~").startswith(KEPT)]
    return list({override.partition("=")[0].lstrip("+"): override for override in described}.values())


def fit(cases: Sequence[Case], start: Device) -> Device:
    """`start` with its FITTED constants moved to where `cases` agree best."""
    with ProcessPoolExecutor() as pool:
        fits = list(pool.map(fit_from, repeat(cases), repeat(start), SLOWER))
    fitted = min(fits, key=lambda fit: fit[1])[0]
    if longer := [case.start_s - case.cost(fitted).start_s for case in cases if case.start_s]:
        fitted = dataclasses.replace(fitted, warmup_s=max(0.0, fitted.warmup_s + float(np.mean(longer))))
    return fitted


def fit_from(cases: Sequence[Case], start: Device, slower: float) -> tuple[Device, float]:
    """Fit from `start` with its host's constants times `slower`; returns the device and the cost that is left."""
    names = [name for name in FITTED if getattr(start, name) is not None]
    first = np.array([getattr(start, name) for name in names])
    bounds = 1 + np.log(np.array([BOUNDS[name] for name in names]).T / first)

    # A constant is solved for as 1 + its change in logarithms, so that least_squares steps all by the same share.
    def device(solved: NDArray[np.float64]) -> Device:
        constants: dict[str, Any] = dict(zip(names, map(float, first * np.exp(solved - 1)), strict=True))
        return dataclasses.replace(start, **constants)

    def residuals(solved: NDArray[np.float64]) -> list[float]:
        errors = [
            np.log(estimate / case.measured[metric]) / case.tolerances()[metric]
            for case in cases
            for metric, estimate in case.estimated(device(solved)).items()
        ]
        return [*errors, *(PRIOR * (solved - 1))]

    inside = np.clip(1 + np.log(slower) * np.isin(names, HOST), bounds[0] + 1e-6, bounds[1] - 1e-6)
    solution = least_squares(residuals, inside, bounds=bounds, diff_step=0.05, loss="soft_l1", ftol=3e-3, max_nfev=30)
    return device(solution.x), float(solution.cost)


def errors(cases: Sequence[Case], device: Device) -> dict[str, Mapping[str, float]]:
    """The error of each simulated metric by case, as a share of the measured one."""
    return {
        case.name: {name: value / case.measured[name] - 1 for name, value in case.estimated(device).items()}
        for case in cases
    }


def as_yaml(device: Device, cases: Sequence[Case]) -> str:
    """A file for conf/backend/device/, with the error that is left as comments."""
    lines = [f"# {device.name} and {len(cases)} measured runs; the error of what is simulated:"]
    for name, by_metric in errors(cases, device).items():
        shown = ", ".join(f"{metric.removesuffix('_ms')} {error:+.1%}" for metric, error in by_metric.items())
        lines.append(f"#   {name}: {shown}")
    return "\n".join(lines) + "\n" + from_steps.device_yaml(device)


if __name__ == "__main__":
    main()
