"""A study of thousands of trials: the work to read and show it goes with their number."""

import cProfile
import json
import pstats
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from autotune.commands import compare, export
from autotune.config.schema import Config, Kind, ModelConfig, ObjectiveConfig, ScenarioConfig, TrackingConfig
from autotune.measure.result import Result
from autotune.measure.trial import as_yaml
from autotune.results import beside, figures, report, sections, summary
from autotune.results.study import Study, load

PARETO = ObjectiveConfig("pareto", ["tokens_per_s", "ttft_p99_ms"], ["maximize", "minimize"])
OFF = TrackingConfig(enabled=False, uri="", experiment="")


def study(folder: Path, count: int) -> Study:
    """A study whose trials are all on the Pareto front, so that as many as can be have to be compared."""
    scenario = ScenarioConfig("offline", Kind.Offline)
    config = Config("s", model=ModelConfig("m"), scenario=scenario, objective=PARETO, tracking=OFF, cache_dir="")
    config.dataset.name = "d"
    results = {}
    for number in range(count):
        metrics = dict.fromkeys([name for name, _, _ in summary.COLUMNS], float(number))
        params, values = {"engine.args.max_num_seqs": number}, [float(number), float(number)]
        command = ["vllm", "serve", "x"]
        results[f"trial-{number}"] = Result("complete", values=values, metrics=metrics, command=command, params=params)
    return Study(folder, config, results)


def calls(work: Callable[[Any], object], *arguments: Any) -> int:
    """How many functions `work` calls."""
    profile = cProfile.Profile()
    profile.runcall(work, *arguments)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def drawn(one: Study) -> None:
    """Everything of the report that goes through all trials, but Optuna's estimates of importance."""
    for part in (report.columns, report.facts, report.failures, report.headline, sections.bounds):
        part(one)
    figures.optuna_study(one, PARETO.metrics, PARETO.directions)


@pytest.mark.parametrize("work", [summary.render, summary.headline, compare.column_of, drawn])
def test_work_to_show_a_study_goes_with_the_number_of_its_trials(work: Callable[[Study], object], tmp_path: Path):
    few, many = study(tmp_path, 50), study(tmp_path, 400)
    work(study(tmp_path, 10))  # what is imported on the way is counted in neither
    assert calls(work, many) < 1.3 * 8 * calls(work, few)


class Logged:
    """Stands for MLflow, which is asked for each trial once."""

    def __init__(self, *_: object) -> None: ...

    def log_trial(self, *_: object) -> None: ...

    def summarise(self, *_: object) -> None: ...

    end = summarise


def exported(folder: Path) -> str:
    return export.text(export.Export(str(folder), export.Format.command, "trial-1"))


def logged(folder: Path) -> int:
    return beside.follow(OFF, "s", folder, [])


@pytest.mark.parametrize("work", [lambda folder: load(str(folder)), exported, logged], ids=["load", "export", "log"])
def test_work_to_read_a_study_goes_with_the_number_of_its_trials(
    work: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(beside, "Tracker", Logged)
    for count in (10, 80):
        one = study(tmp_path / str(count), count)
        for name, result in one.results.items():
            (one.folder / name).mkdir(parents=True)
            (one.folder / name / "result.json").write_text(json.dumps(asdict(result)))
        for name in ("trial-0", "trial-1"):
            (one.folder / name / "config.yaml").write_text(as_yaml(one.config))
    work(tmp_path / "10")
    assert calls(work, tmp_path / "80") < 1.3 * 8 * calls(work, tmp_path / "10")
