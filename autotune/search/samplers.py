"""The sampler that `sampler=` names."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.samplers import GridSampler

from autotune.config import CONF, bounds
from autotune.config.schema import Config
from autotune.config.vllm_flags import FLAG
from autotune.errors import InputError
from autotune.measure.result import Result
from autotune.search.optuna_private import Grid
from autotune.search.space import Space
from autotune.sim.flags import MODELLED
from autotune.text import one_line

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # some samplers are
warnings.filterwarnings("ignore", "Constraints have been set, but CmaEs")  # its values are penalised instead

AUTO = "auto"  # a name that stands for another sampler's
LIVE = "autotune.live.backend.LiveBackend"
TWIN = "autotune.search.twin.TwinSampler"
MOST_GRID = 1000  # points of a grid, unless n_trials says more
MOST = 1e5  # trials, candidates, individuals: a sampler's memory
LEAST = {"inc_popsize": -1}  # as Optuna writes that CMA-ES does not restart
ABOVE_0 = ("n_ei_candidates", "sigma0", "proposal_s")
WHITELIST = ("optuna.*", "optuna_integration.*", "hydra_plugins.*", "autotune.search.twin.*")


def check_name(name: str, option: str) -> None:
    """Raise InputError if `name` is that of a sampler of ours which takes another one of Hydra's than `option`."""
    file = CONF / f"sampler/{name}.yaml"
    if file.exists() and option != OmegaConf.load(file).defaults[0]["override /hydra/sweeper/sampler"]:
        raise InputError(
            f"sampler: {name}: its name alone; in a file's defaults list, write: override /sampler: {name}"
        )


def chosen(sampler: Any, choices: Mapping[str, str], config: Config, space: Space) -> tuple[Any, str]:
    """The configuration of the sampler that a study uses, and its name; of sampler=auto also why it is TPE.

    `choices` are Hydra's options by group. Raises InputError for what it can't be made with.
    """
    check_name(config.sampler, choices["hydra/sweeper/sampler"])
    make_sampler(sampler, space, config)
    if config.sampler != AUTO or not sampler._target_.endswith("TPESampler"):
        return sampler, config.sampler
    options = {name: value for name, value in sampler.items() if name not in ("_target_", "seed")}
    twin = OmegaConf.create({"_target_": TWIN, "_partial_": True, "seed": sampler.seed, "tpe": options})
    why = _unlike_twin(config, space)
    if not why:
        try:
            instantiate(twin, _execution_whitelist_=WHITELIST)(config, space, {})
        except InputError as error:
            why = one_line(error)
    return (sampler, f"tpe ({AUTO}: {why})") if why else (twin, f"twin ({AUTO})")


def check_grid(space: Space, config: Config | None) -> None:
    """Raise InputError for more points than a study can run, and for other trials that it is to begin with."""
    if space.grid_size > max(MOST_GRID, min(config.n_trials if config else 0, MOST)):
        sizes = sorted(((len(values), name) for name, values in space.grid.items()), reverse=True)
        told = ", ".join(f"{name} has {size:,} values" for size, name in sizes[:3])
        whole = f", or n_trials={space.grid_size} to run them all" if space.grid_size <= MOST else ""
        raise InputError(
            f"sampler=grid: {space.grid_size:,} points, each a trial, as {told}; "
            f"thin them out with range(low,high,step=…) or choice(…), or write sampler=tpe{whole}"
        )
    if config and (config.warm_start or config.prior.backend):
        raise InputError("sampler=grid: it runs every point; leave out warm_start and prior")


def _unlike_twin(config: Config, space: Space) -> str:
    """The reason why a twin is of no use to a study; empty if it is."""
    flags = {name.removeprefix(FLAG) for name in space.parameters}
    modelled = not flags.isdisjoint(MODELLED) or any(name.startswith("scenario.") for name in flags)
    if config.backend.get("_target_") != LIVE:
        return "the backend is not live vLLM"
    if not config.backend.get("steps"):
        return "backend.steps=false records no steps"
    if len(config.objective.metrics) > 1:
        return "it has several objectives"
    return "" if modelled else "none of what it sweeps is simulated"


def make_sampler(
    sampler: Any,
    space: Space,
    config: Config | None = None,
    results: Mapping[str, Result] = MappingProxyType({}),
    folder: Path | None = None,
    begun: int = 0,
) -> optuna.samplers.BaseSampler:
    """The sampler of a `sampler` group for `space`. Raises InputError for what it can't be made with.

    A twin simulates the study's `config`, and learns from its `results` and what they left in `folder`. `begun` trials
    exist already: a seed is moved on by them, or the sampler would suggest its first ones again; a grid's is its order.
    """
    for name, value in sampler.items():
        rule = bounds.number(above=0, most=MOST) if name in ABOVE_0 else bounds.number(LEAST.get(name, 0), MOST)
        bounds.check(value, f"hydra.sweeper.sampler.{name}", bounds.ANY_NUMBER if name == "seed" else rule)
    if config and len(config.objective.metrics) > 1 and sampler._target_.endswith("CmaEsSampler"):
        raise InputError("sampler=cmaes: takes one objective; write sampler=nsga2, or one objective")
    if begun and sampler.get("seed") is not None and not sampler._target_.endswith("GridSampler"):
        sampler = OmegaConf.merge(sampler, {"seed": sampler.seed + begun})
    try:
        made = instantiate(sampler, _execution_whitelist_=WHITELIST)
    except (InstantiationException, ImportError) as error:
        if "optuna_integration" in str(error) or "botorch" in str(error):
            raise InputError("sampler=botorch needs the extra `botorch`: uv pip install -e '.[botorch]'") from None
        target = f"hydra.sweeper.sampler._target_={sampler._target_}"
        raise InputError(f"{target}: write one of Optuna's, as the files in conf/sampler do") from None
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"hydra.sweeper.sampler: {one_line(error)}") from None
    if type(made).__name__ in ("GPSampler", "BoTorchSampler"):
        import torch  # takes seconds

        torch.set_num_threads(1)  # small matrices; more threads only wait for cores that trials have
    if isinstance(made, partial) and made.func is GridSampler:
        check_grid(space, config)
        made = Grid(space.grid, space.restarting, **made.keywords)
    elif isinstance(made, partial):
        try:
            made = made(config, space, results, folder)
        except InputError as error:
            raise InputError(f"sampler=twin simulates: {error}; or write another sampler") from None
    found: optuna.samplers.BaseSampler = made
    return found
