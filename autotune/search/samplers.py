"""The sampler that `sampler=` names."""

from functools import partial
from typing import Any

import optuna
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.samplers import TPESampler

from autotune.config import bounds
from autotune.errors import InputError
from autotune.search.optuna_private import Grid, use_compiled_log_ndtr
from autotune.search.space import Space
from autotune.text import one_line

MOST = 1e5  # trials, candidates, individuals: a sampler's memory
LEAST = {"inc_popsize": -1}  # as Optuna writes that CMA-ES does not restart
ABOVE_0 = ("n_ei_candidates", "sigma0")


def make_sampler(config: Any, space: Space, begun: int = 0) -> optuna.samplers.BaseSampler:
    """The sampler of a `sampler` group; a grid covers `space`. Raises InputError for what it can't be made with.

    `begun` trials exist already: a seed is moved on by them, or the sampler would suggest its first ones again. A
    grid keeps its seed: that is its order.
    """
    for name, value in config.items():
        rule = bounds.number(above=0, most=MOST) if name in ABOVE_0 else bounds.number(LEAST.get(name, 0), MOST)
        bounds.check(value, f"hydra.sweeper.sampler.{name}", bounds.ANY_NUMBER if name == "seed" else rule)
    if begun and config.get("seed") is not None and not config.get("_partial_"):
        config = OmegaConf.merge(config, {"seed": config.seed + begun})
    try:
        made = instantiate(config, _execution_whitelist_=("optuna.*", "optuna_integration.*", "hydra_plugins.*"))
    except (InstantiationException, ImportError) as error:
        if "optuna_integration" in str(error) or "botorch" in str(error):
            raise InputError("sampler=botorch needs the extra `botorch`: uv pip install -e '.[botorch]'") from None
        raise
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"hydra.sweeper.sampler: {one_line(error)}") from None
    if isinstance(made, TPESampler):
        use_compiled_log_ndtr()
    if type(made).__name__ in ("GPSampler", "BoTorchSampler"):
        import torch  # takes seconds

        torch.set_num_threads(1)  # small matrices; more threads only wait for cores that trials have
    sampler: optuna.samplers.BaseSampler = Grid(space.grid, **made.keywords) if isinstance(made, partial) else made
    return sampler
