"""Studies as a user starts them, on a simulated server; each is called s, below a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

SEQS = "engine.args.max_num_seqs"
SIMULATED = ["model=llama8b", "backend=sim", "space=none", "scenario=offline", "scenario.min_queries=64"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "autotune", "-m", *SIMULATED, "study=s", "tracking=none", *arguments]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "AUTOTUNE_LEASES": str(folder / "leases")}


def autotune(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, env=environment(folder), timeout=120
    )


def trials(folder: Path) -> list[FrozenTrial]:
    """What Optuna's storage holds, as soon as the study has said something."""
    log = folder / "multirun/s/autotune.log"
    if not log.exists() or not log.stat().st_size:  # opened before, the database would be made by both sides
        return []
    return optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/multirun/s/study.db").trials
