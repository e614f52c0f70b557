"""Rooms lie on floors and imports point down; each outside library has one home."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autotune"
FILES = sorted(PACKAGE.rglob("*.py"))
# The top floor first. Rooms of one floor know nothing of each other.
FLOORS = [
    {"__main__"},
    {"commands"},
    {"sweep"},
    {"search"},
    {"results", "live", "sim"},
    {"measure"},
    {"data"},
    {"config", "system"},
    {"errors", "text"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HOMES = {
    "mlflow": {"results"},
    "plotly": {"results"},
    "optuna": {"commands", "results", "search", "sweep"},
    "mlperf_loadgen": {"live"},
    "vllm": {"live"},
    "sqlalchemy": {"results", "sweep"},
    "submitit": {"sweep"},
}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def module(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def imported(file: Path) -> set[str]:
    """Every module that `file` imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_room_has_a_floor():
    assert {room(file) for file in FILES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path):
    if room(file) == "__init__":
        return
    used = {name.split(".")[1] for name in imported(file) if name.startswith("autotune.")}
    for other in used & FLOOR.keys() - {room(file)}:
        assert FLOOR[room(file)] < FLOOR[other], f"{room(file)} imports {other}"


def test_no_two_files_import_each_other():
    modules = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for file in FILES
    }
    below = {}
    for file in FILES:
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        below[name] = imported(file) & modules - {name, name.rpartition(".")[0]}
    while leaves := {name for name, used in below.items() if not used & below.keys()}:
        below = {name: used for name, used in below.items() if name not in leaves}
    assert not below, f"a circle among {sorted(below)}"


@pytest.mark.parametrize(("library", "homes"), HOMES.items())
def test_library_is_imported_only_at_home(library: str, homes: set[str]):
    names = {file: imported(file) for file in FILES}
    users = {room(file) for file, used in names.items() if any(f"{name}.".startswith(f"{library}.") for name in used)}
    assert users == homes
