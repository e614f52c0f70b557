"""Studies: Hydra's --multirun, driven by Optuna. This module is all that Hydra sees of it."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf, SamplerConfig
from omegaconf import DictConfig


@dataclass
class StudySweeperConf(OptunaSweeperConf):  # type: ignore[misc]
    _target_: str = "autotune.sweep.StudySweeper"


class StudySweeper(Sweeper):
    """hydra-optuna-sweeper's configuration, with a baseline, constraints and failures kept as trials."""

    def __init__(self, **config: Any) -> None:
        self._config = config

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._hydra_context, self._job = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        from autotune.sweep.study import run  # optuna takes a second to import

        run(self._config, self._job, self._hydra_context.config_loader, arguments)


@dataclass
class BoTorchSamplerConf(SamplerConfig):  # type: ignore[misc]
    """https://optuna-integration.readthedocs.io/en/stable/reference/generated/optuna_integration.BoTorchSampler.html"""

    _target_: str = "optuna_integration.BoTorchSampler"
    seed: int | None = None
    n_startup_trials: int = 10
    consider_running_trials: bool = True


def register() -> None:
    Plugins.instance().register(StudySweeper)
    ConfigStore.instance().store(group="hydra/sweeper", name="autotune", node=StudySweeperConf)
    ConfigStore.instance().store(group="hydra/sweeper/sampler", name="botorch", node=BoTorchSamplerConf)
