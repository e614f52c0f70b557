"""Checks before a study goes on: the same configuration, and the same trials in its storage as in its folder."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from autotune.config.overrides import typed_target
from autotune.config.redact import redact
from autotune.config.schema import Config
from autotune.errors import InputError
from autotune.measure.result import Result
from autotune.results.study import BASELINE, REFERENCES, TRIAL, config_in

# Fields that decide what is asked, or how trials are run, but not what a trial measures.
FREE = (
    *("study", "n_trials", "baseline", "budget", "budget_of", "max_failures", "duplicates", "resume", "warm_start"),
    *("sampler", "seed", "pruner", "prior", "conditions", "only_if", "launcher", "gpus", "baseline_gpu"),
    *("tracking", "secrets", "cache_dir", "backend.python", "backend.port", "backend.pace", "backend.observe_s"),
    *("target_load", "backend.steps", "benchmark", "model.recipe"),  # scenario has the limits that hold
    *("backend.bounds", "scenario.search.best", "accuracy.check", "accuracy.margin", "accuracy.kept_in"),
    *("backend.start_timeout_s", "backend.stop_timeout_s", "backend.run_timeout_s"),
)
FACTS = (
    "vllm",
    "torch",
    "loadgen",
    "environment",
    "simulated",
    "dataset_checksum",
)  # of a result, that decide what it measured


def check_configuration(
    folder: Path, results: Mapping[str, Result], config: Config, swept: Collection[str], facts: Mapping[str, str]
) -> None:
    """Raise InputError if the `results` in `folder` were measured with another configuration, or other `facts`.

    What `swept` names, and what a trial of the study chose itself, may differ.
    """
    measured = next((result.facts for result in results.values() if result.complete), None)
    if measured is None:
        return
    chosen = {*swept, *(name for result in results.values() for name in result.params)}
    then, now = (_fields(one, chosen, config.backend["_target_"]) for one in (config_in(folder, results), config))
    then |= {fact: measured[fact] for fact in FACTS if fact in measured}
    now |= {fact: facts[fact] for fact in FACTS if fact in measured and fact in facts}
    changed = [
        f"{key}={then.get(key, 'unset')} (now {now.get(key, 'unset')})"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not (key in FACTS and key not in now)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"study={folder.name} was measured with {', '.join(changed[:3])}{more}; "
            f"results of both can't be compared: write another study=…, or what it was started with"
        )


def check_trials(stored: Sequence[FrozenTrial], folder: Path, results: Mapping[str, Result]) -> None:
    """Raise InputError unless the trials `stored` by Optuna are those that left their `results` in `folder`."""
    trials = {f"{TRIAL}{trial.number}": trial for trial in stored}
    for name, trial in trials.items():
        swept = trial.state is TrialState.COMPLETE and BASELINE not in trial.user_attrs
        if swept and not (folder / name / "result.json").exists():
            raise InputError(
                f"study={folder.name} exists in that storage, and the results of its trials are not in {folder}; "
                f"go on where it was started, or write another study=…"
            )
    ours = {name: result for name, result in results.items() if name not in REFERENCES}
    strange = [name for name, result in ours.items() if not _is_known(trials.get(name), result)]
    if strange:
        raise InputError(
            f"{folder} holds results that the study's storage does not know ({', '.join(strange[:3])}, …): write "
            f"hydra.sweeper.storage=… as the study was started with, or another study=…; nothing was overwritten"
        )


def _is_known(trial: FrozenTrial | None, result: Result) -> bool:
    """Tell whether `trial` of the storage is the one that left `result`."""
    return trial is not None and (not trial.params or not result.params or trial.params == result.params)


def _fields(config: Config, left_out: Collection[str], backend: str) -> dict[str, Any]:
    """The fields of `config` by key, secrets hidden, without those that are free, swept or null.

    A `backend` of this class has its defaults, whichever of them were written; another class is not even imported.
    """
    typed = config
    if config.backend.get("_target_") == backend:
        typed = replace(config, backend=asdict(typed_target(config.backend, "backend")[1]))
    body = redact(OmegaConf.to_container(OmegaConf.structured(typed), enum_to_str=True))
    found: dict[str, Any] = {}

    def note(node: Any, key: str) -> None:
        if key in FREE or key in left_out or node is None:
            return
        if isinstance(node, dict) and node:
            for name, item in node.items():
                note(item, f"{key}.{name}" if key else str(name))
        elif node not in ({}, []):
            found[key] = node

    note(body, "")
    return found
