"""Each outside library has one home, and imports point down (CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autotune"
FILES = sorted(PACKAGE.rglob("*.py"))
HOMES = {
    "mlflow": {"tracking.py"},
    "plotly": {"figures.py", "report.py"},
    "optuna": {
        "space.py",
        "summary.py",
        "report.py",
        "figures.py",
        "plan.py",
        "sweep/samplers.py",
        "sweep/pruners.py",
        "sweep/study.py",
        "sweep/storage.py",
        "sweep/display.py",
        "sweep/estimate.py",
        "sweep/prior.py",
        "sweep/tell.py",
    },
    "mlperf_loadgen": {"live/loadgen.py"},
    "vllm": {"live/probe.py"},
    "sqlalchemy": {"sweep/storage.py", "tracking.py"},
    "submitit": {"sweep/launchers.py"},
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(("library", "homes"), HOMES.items())
def test_library_is_imported_only_at_home(library: str, homes: set[str]):
    users = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imported(file))
    }
    assert users == homes


@pytest.mark.parametrize("backends", [("live", "sim"), ("sim", "live")])
def test_backends_know_nothing_of_each_other(backends: tuple[str, str]):
    one, other = backends
    for file in (PACKAGE / one).glob("*.py"):
        assert not any(name.startswith(f"autotune.{other}") for name in imported(file)), file


@pytest.mark.parametrize("file", sorted((PACKAGE / "live").glob("*.py")), ids=lambda file: file.name)
def test_live_knows_nothing_of_what_is_above_it(file: Path):
    above = {"autotune.sweep", "autotune.trial", "autotune.report", "autotune.tracking", "autotune.compose"}
    assert not above & imported(file)
