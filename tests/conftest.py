import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from autotune.data.models import Model, build_shape
from tests import in_process
from tests.in_process import Done
from tests.slurm_cluster import Slurm, missing_programs, slurm_cluster

# Each of the many processes that tests start would compile all of Hydra and MLflow again where this is set.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

Autotune = Callable[..., "subprocess.CompletedProcess[str]"]
Main = Callable[..., Done]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have the most slow tests: no core idles at the end while the other one starts vLLM."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported need not be looked at in every collection
    gc.set_threshold(100_000)  # and what a test leaves need not be collected often


@pytest.fixture
def main(tmp_path: Path) -> Main:
    """Runs `python -m autotune …` in an empty folder, and in this process: most of a process's time is imports."""
    return partial(in_process.autotune, tmp_path)


@pytest.fixture
def autotune(tmp_path: Path) -> Autotune:
    """Runs `python -m autotune …` in an empty folder, as a process of its own."""
    return partial(autotune_in, tmp_path)


def autotune_in(folder: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "autotune", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **env}, timeout=500)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A shape without weights; its tokenizer makes one token of each byte."""
    folder = tmp_path / "model"
    folder.mkdir()
    build_shape(folder, vocab_size=512)
    return Model(str(folder), None, folder)


@pytest.fixture
def tokenizer(model: Model) -> Tokenizer:
    return model.tokenizer()


def processes_in(folder: Path) -> list[psutil.Process]:
    """What still runs and was started from below `folder`: autotune, guards, vLLM and its workers."""
    found = []
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(folder):
            found.append(process)
    return found


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of one node and four fake GPUs. submitit and SLURM's programs find it."""
    if missing := missing_programs():
        pytest.fail(f"SLURM's programs are missing ({', '.join(missing)}): `make services` installs them")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster
