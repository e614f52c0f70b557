"""The sampler that `sampler=` names."""

from functools import partial
from typing import Any

import optuna
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.samplers import GridSampler, TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.trial import FrozenTrial
from scipy.special import log_ndtr

from autotune.errors import InputError
from autotune.search.space import Space
from autotune.text import one_line


class Grid(GridSampler):
    """Optuna's grid, which otherwise stops a study that it did not start."""

    def after_trial(self, *_: Any) -> None:
        pass

    def point(self, trial: FrozenTrial) -> dict[str, Any]:
        """What `trial` was to run, also if it ended before it was told."""
        return dict(zip(self._param_names, self._all_grids[trial.system_attrs["grid_id"]], strict=True))


def make_sampler(config: Any, space: Space, begun: int = 0) -> optuna.samplers.BaseSampler:
    """The sampler of a `sampler` group; a grid covers `space`. Raises InputError for what it can't be made with.

    `begun` trials exist already: a seed is moved on by them, or the sampler would suggest its first ones again. A
    grid keeps its seed: that is its order.
    """
    if begun and config.get("seed") is not None and not config.get("_partial_"):
        config = OmegaConf.merge(config, {"seed": config.seed + begun})
    try:
        made = instantiate(config, _execution_whitelist_=("optuna.*", "optuna_integration.*", "hydra_plugins.*"))
    except (InstantiationException, ImportError) as error:
        if "optuna_integration" in str(error) or "botorch" in str(error):
            raise InputError("sampler=botorch needs the extra `botorch`: uv pip install -e '.[botorch]'") from None
        raise
    except ValueError as error:
        raise InputError(f"hydra.sweeper.sampler: {one_line(error)}") from None
    if isinstance(made, TPESampler):
        _truncnorm._log_ndtr = log_ndtr  # the same function, compiled: Optuna's is Python
    if type(made).__name__ in ("GPSampler", "BoTorchSampler"):
        import torch  # takes seconds

        torch.set_num_threads(1)  # small matrices; more threads only wait for cores that trials have
    sampler: optuna.samplers.BaseSampler = Grid(space.grid, **made.keywords) if isinstance(made, partial) else made
    return sampler
