"""Studies: Hydra's --multirun, driven by Optuna. This module is all that Hydra sees of it."""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(Sweeper):
    """hydra-optuna-sweeper's configuration, with a baseline, constraints and failures kept as trials."""

    def __init__(self, **config: Any) -> None:
        self._config = config

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._hydra_context, self._job = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        from autotune.sweep.study import run  # optuna takes a second to import

        run(self._config, self._job, self._hydra_context.config_loader, arguments)


def register() -> None:
    """Let Hydra find the sweeper that conf/config.yaml names."""
    Plugins.instance().register(StudySweeper)
