"""Studies, each called s and below a folder of its own: in this process on a stand-in, or as a user starts them."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial

from autotune.config import command_line
from autotune.config.overrides import typed
from autotune.config.schema import Config
from autotune.search.space import Space, parse
from autotune.sweep import study as sweep
from autotune.system import interrupt, leases
from tests.in_process import as_it_was

SEQS = "engine.args.max_num_seqs"
SIMULATED = ["model=llama8b", "backend=sim", "space=none", "scenario=offline", "scenario.min_queries=64"]
QUIET = ["study=s", "tracking=none"]
STAND_IN = {"_target_": "tests.standin.StandIn"}
JOURNAL = "multirun/s/study.log"  # a file that Optuna appends to: to make a database takes longer than a study


def study(folder: Path, *arguments: str, simulated: bool = False) -> str:
    """Run a study in this process, on `tests.standin` unless it is `simulated`, without its report; what it said.

    Raises what ends it: InputError, SystemExit.
    """
    words = [*SIMULATED, *QUIET, f"hydra.sweeper.storage=journal://{JOURNAL}", *arguments]
    parser = OverridesParser.create()
    fixed = [word for word in words if not parser.parse_override(word).is_sweep_override()]
    job = composed(fixed, simulated)
    log = folder / "multirun/s/autotune.log"
    before = len(log.read_text()) if log.exists() else 0
    with pytest.MonkeyPatch.context() as patch, as_it_was():
        patch.chdir(folder)
        patch.setattr(leases, "FOLDER", folder / "leases")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # where launcher=gpus finds the stand-in
        patch.setattr(sweep.Sweep, "_write_report", lambda *_: None)
        interrupt.install()
        logging.getLogger().setLevel(logging.INFO)
        sweep.run(job.hydra.sweeper, job, Composed(job), words)
    return log.read_text()[before:]


class Composed:
    """Stands for Hydra's loader, which would compose again what has been composed."""

    def __init__(self, job: DictConfig) -> None:
        self._job = job

    def load_sweep_config(self, job: DictConfig, overrides: list[str]) -> DictConfig:
        return self._job


def configured(*words: str) -> Config:
    """The configuration of a simulated trial, in a third of the time that Hydra takes for a command line."""
    return typed(composed(list(words), simulated=True))


def compose(words: list[str], defaults: Sequence[str] = ()) -> tuple[Config, dict[str, Any], list[str]]:
    """`command_line.compose` of a simulated trial, for the many that a calibration and the tables of a page read."""
    return configured(*defaults, *words), {}, []


def composed(words: list[str], simulated: bool) -> DictConfig:
    """What Hydra makes of `words`: groups by Hydra, once for each choice of them, then fields, which takes no time."""
    groups = [word for word in words if (command_line.CONF / word.partition("=")[0]).is_dir()]
    fields = OmegaConf.from_dotlist([word for word in words if word not in groups])
    made = OmegaConf.merge(chosen(tuple(groups), simulated), fields)
    assert isinstance(made, DictConfig)
    return made


@cache
def chosen(groups: tuple[str, ...], simulated: bool) -> DictConfig:
    command_line.register()
    with hydra.initialize_config_dir(str(command_line.CONF)):
        config = hydra.compose("config", overrides=list(groups), return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    if not simulated:
        config.backend = STAND_IN
    return config


def space(*sweeps: str, conditions: Mapping[str, str] = {}, only_if: Mapping[str, str] = {}) -> Space:
    """The search space that these words of a command line span."""
    return parse({}, sweeps, conditions, only_if)[0]


def asked(folder: Path) -> list[FrozenTrial]:
    """What Optuna's journal of `study` holds."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    return optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend)).trials


def command(*arguments: str) -> list[str]:
    words = {word.partition("=")[0]: word for word in (*SIMULATED, *QUIET, *arguments)}  # the last one of each key
    return [sys.executable, "-m", "autotune", "-m", *words.values()]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "AUTOTUNE_LEASES": str(folder / "leases")}


def autotune(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, env=environment(folder), timeout=120
    )


def trials(folder: Path) -> list[FrozenTrial]:
    """What the database of a study that a user started holds, as soon as the study has said something."""
    log = folder / "multirun/s/autotune.log"
    if not log.exists() or not log.stat().st_size:  # opened before, the database would be made by both sides
        return []
    return optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/multirun/s/study.db").trials
