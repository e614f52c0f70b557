"""Checks before a study begins: its parts fit together. And before it goes on: it is the same study."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from autotune.config.overrides import leaves, typed_target, with_fields
from autotune.config.redact import redact
from autotune.config.schema import RECIPE, Config, Rules
from autotune.config.vllm_flags import FLAG, as_text, gpus, numbered, written_in
from autotune.errors import InputError
from autotune.measure import rules
from autotune.measure.backend import DryRunOutcome
from autotune.measure.prepare import Prepared
from autotune.measure.result import Result
from autotune.results.study import BASELINE, REFERENCES, TRIAL, config_in, first_in, reference_params
from autotune.search.distributions import ends
from autotune.search.space import Space, swept_flags, value_of
from autotune.sweep.lookup import Lookup
from autotune.system.files import expanded
from autotune.system.leases import devices
from autotune.text import mostly, shorten

log = logging.getLogger(__name__)

# Fields that decide what is asked, or how trials are run, but not what a trial measures.
FREE = (
    *("study", "n_trials", "baseline", "budget", "budget_of", "max_failures", "duplicates", "resume", "warm_start"),
    *("sampler", "seed", "pruner", "prior", "conditions", "only_if", "launcher", "gpus", "baseline_gpu"),
    *("tracking", "secrets", "cache_dir", "backend.python", "backend.port", "backend.pace", "backend.observe_s"),
    *("target_load", "backend.steps", "benchmark", "model.recipe"),  # scenario has the limits that hold
    *("backend.bounds", "scenario.search.best", "accuracy.check", "accuracy.margin", "accuracy.kept_in"),
    "accuracy.texts",  # each check has its own number; other texts' scores are not compared
    *("backend.start_timeout_s", "backend.stop_timeout_s", "backend.run_timeout_s"),
)
REFUSALS_IN_A_ROW = 100  # then the space is at fault
# Facts of a result that decide what it measured.
FACTS = ("vllm", "torch", "loadgen", "environment", "simulated", "dataset_checksum", "model_checksum")
# Beginnings of fields with which, if they are swept, a trial may have data and a model of its own.
OF_DATA = (
    "dataset.",
    "model.",
    "scenario.answers",
    "scenario.endpoint",
    f"{FLAG}tokenizer",
    f"{FLAG}trust_remote_code",
)


def each(space: Space) -> list[tuple[str, Any]]:
    """The parameters, each with each of its choices or with the ends of its range."""
    return [(name, value) for name, distribution in space.parameters.items() for value in ends(distribution)]


def check_secrets(space: Space) -> None:
    """Raise InputError for a parameter whose values are secrets."""
    for name, value in each(space):
        if str(redact(value, name)) != str(value):
            raise InputError(f"{name}: a secret can't be swept, as every trial tells its parameters; set it once")


def check_together(space: Space, config: Config, prepared: Prepared) -> None:
    """Raise InputError for values that vLLM or MLPerf's rules don't take, and for a baseline that can't be run."""
    check_rules(space, config, prepared)
    check_values(space, prepared)
    check_gpus(space, config, prepared)
    check_recipe(config, prepared)


def check_rules(space: Space, config: Config, prepared: Prepared) -> None:
    """Raise InputError for a parameter with a value that breaks a rule of MLPerf's closed division."""
    if config.rules is not Rules.closed:
        return
    for name, value in each(space):
        changed = config if name.startswith(FLAG) else with_fields(config, {name: value_of(value)})
        if broken := rules.deviations(changed, prepared.args | swept_flags({name: value}, prepared.args)):
            raise InputError(f"{name}: its value {broken[0]}; leave it out of the space, or write rules=open")


def check_values(space: Space, prepared: Prepared) -> None:
    """Raise InputError for fixed flags, and for values of swept objects, that vLLM's command line does not take."""
    objects = [
        {name: value}
        for name, value in each(space)
        if isinstance(value_of(value), dict) or name.count(".") > FLAG.count(".")
    ]
    for params in [{}, *objects]:
        outcome = prepared.dry_run(swept_flags(params, prepared.args))
        if not outcome.readable:
            raise InputError(f"engine.args: vLLM can't read {shorten(params) or 'a flag'}: {outcome.refusal}")


def check_gpus(space: Space, config: Config, prepared: Prepared) -> None:
    """Raise InputError if the baseline's GPU is none of the study's, and for a trial that takes more than these."""
    swept = [{name: value} for name, value in each(space) if name.startswith(FLAG)]
    for params in [{}, *swept] if config.gpus else []:
        if (count := gpus(prepared.args | swept_flags(params, prepared.args))) > len(devices(config.gpus)):
            what = f"with {shorten(params)} a trial" if params else "a trial"
            raise InputError(f"gpus={config.gpus}: {what} takes {count}; write more of them, or leave it out")
    if config.baseline_gpu is not None and config.gpus is not None and config.baseline_gpu not in devices(config.gpus):
        raise InputError(f"baseline_gpu={config.baseline_gpu}: gpus={config.gpus} does not hold it; write one of them")


def check_recipe(config: Config, prepared: Prepared) -> None:
    """Raise InputError for a recipe that is asked for, and that vLLM refuses."""
    params = reference_params(config).get(RECIPE, {})
    with written_in("model.recipe.args"):
        read = prepared.backend.read(swept_flags(params, prepared.args))
    refusal = prepared.dry_run(read).refusal if params else ""
    if refusal:
        raise InputError(f"baseline={RECIPE}: vLLM refuses {shorten(params)}: {refusal}; leave it out")


def check_new(config: Config, folder: Path, space: Space, prepared: Prepared, defaults: DryRunOutcome) -> None:
    """Raise InputError for a study that is to go on and is not in `folder`, or if vLLM refuses all that it tries."""
    if folder.exists():
        return
    if config.resume:
        raise InputError(f"resume=true: there is no study in {folder}; write study=<its name>")
    lookup = Lookup(prepared, space, defaults.resolved)
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    refusals = [defaults.refusal]
    while refusals[-1]:
        if len(refusals) > REFUSALS_IN_A_ROW:
            told = f"vLLM refuses its defaults and {REFUSALS_IN_A_ROW} combinations of the space"
            raise InputError(f"{told}: {mostly(refusals)}; change what is fixed, or the space")
        refusals.append(lookup.check(space.suggest(drawn.ask(), lookup.known))[0])
    if defaults.refusal:
        log.warning("vLLM refuses the configuration even without a sweep: %s", defaults.refusal)


def check_configuration(
    folder: Path, results: Mapping[str, Result], config: Config, swept: Collection[str], facts: Mapping[str, str]
) -> None:
    """Raise InputError if the `results` in `folder` were measured with another configuration, or other `facts`.

    What a trial chose itself may differ, unless it is not `swept` now, but fixed: of two trials with equal parameters
    one would be taken for the other.
    """
    measured = next((result.facts for result in results.values() if result.complete), None)
    if measured is None:
        return
    first, backend = first_in(folder, results), config.backend["_target_"]
    fixed = [f"{key}." for key in _fields(config, swept, backend)]
    # A trial that ended without its study has not noted its parameters.
    chosen = results[first].params or ([] if first in REFERENCES else swept)
    chosen = [name for name in chosen if not any(key.startswith(f"{name}.") for key in fixed)]
    then, now = (_fields(one, chosen, backend) for one in (config_in(folder, first), config))
    changed = [
        f"{key}={then.get(key, 'unset')} (now {now.get(key, 'unset')})"
        for key in sorted(then.keys() | now.keys())
        if not _same(then.get(key), now.get(key))
    ]
    if changed := [*changed, *other_facts(measured, facts)]:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"study={folder.name} was measured with {', '.join(changed[:3])}{more}; "
            f"results of both can't be compared: write another study=…, or what it was started with"
        )


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values of a field are equal (4K is 4096), or name the same file or folder."""
    if one == other or as_text(numbered(one)) == as_text(numbered(other)):
        return True
    with suppress(OSError, ValueError):  # there is none, or the text can't be a path
        return expanded(str(one)).samefile(expanded(str(other)))
    return False


def other_facts(measured: Mapping[str, str], facts: Mapping[str, str]) -> list[str]:
    """The facts of a result that decide what it `measured`, and are others than the study's."""
    both = [fact for fact in FACTS if fact in measured and fact in facts]
    return [f"{fact}={measured[fact]} (now {facts[fact]})" for fact in both if measured[fact] != facts[fact]]


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
    without = tuple(f"{key}." for key in (*FREE, *left_out))
    found = {key.replace("-", "_"): one for key, one in leaves(body)}  # vLLM's flags have either
    return {key: one for key, one in found.items() if one not in (None, []) and not f"{key}.".startswith(without)}
