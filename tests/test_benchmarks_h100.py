import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.config.command_line import compose
from autotune.search.distributions import contains
from autotune.search.space import parse
from autotune.sim import calibrate
from benchmarks.h100 import tables
from tests import studies

ROOT = Path(__file__).parent.parent


# Of their searches each is simulated again, which takes half a minute for all.
SIMULATED = {"verified", "verified-open", "verified-edge", "predicted", "simulated", "simulated-h200", "foretold"}
SHOWN = re.compile(r"<!-- ([\w-]+) -->\n(.*?)\n<!-- end -->", re.DOTALL)
NAMED = {name: table for page in tables.PAGES for name, table in SHOWN.findall(page.read_text())}


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of the same groups are composed by Hydra once."""
    for module in (tables, calibrate):
        monkeypatch.setattr(module, "compose", studies.compose)


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SIMULATED else ()) for name in NAMED]
)
def test_table_of_a_page_is_what_the_data_says(name: str):
    assert NAMED[name] == tables.TABLES[name]()


@pytest.mark.slow
@pytest.mark.usefixtures("composed_once")
def test_search_that_a_page_shows_as_simulated_is_simulated_the_same():
    measured = tables.repeated_of(tables.OPEN)["trial-0"][0]
    again = tables.number(tables.searched_again(measured, tables.slower_host(1.0)))
    assert f"| trial-0, simulated | {again} |" in NAMED["verified-open"]


def test_a_study_that_names_no_space_can_find_what_was_verified():
    config, params, sweeps = compose(["model=llama8b"])
    found, _ = parse(params, sweeps, config.conditions, config.only_if)
    best = tables.repeated_of(tables.VERIFIED)["trial-0"][0].params
    assert best and all(contains(found.parameters[name], value) for name, value in best.items())


@pytest.mark.slow
def test_steps_run_once_and_their_results_make_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = "backend=sim n_trials=2 tracking=none scenario.min_queries=100"
    env = os.environ | {"WORDS": words, "GPUS": "[0]", "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"

    def run() -> str:
        steps = ("offline-closed-sim", "offline-closed")
        script = [str(ROOT / "benchmarks/h100/run.sh"), str(tmp_path), *steps]
        return subprocess.run(script, env=env, check=True, capture_output=True, text=True).stdout

    assert run().count("exit code 0") == 2
    assert run() == ""
    script = str(ROOT / "benchmarks/h100/collect.py")
    collect = [sys.executable, script, str(tmp_path), "one-gpu/host-9", "--data", str(tmp_path)]
    artifact = tmp_path / "multirun/mlartifacts/run/artifacts/result.json"  # MLflow's copy is no trial
    artifact.parent.mkdir(parents=True)
    artifact.write_text("{}")
    subprocess.run(collect, check=True)
    assert [path.name for path in (tmp_path / "one-gpu/host-9").iterdir()] == ["offline-closed"]
    monkeypatch.setattr(tables, "ONE", tmp_path / "one-gpu")
    assert tables.offline().count("| 9 | closed |") == 3
