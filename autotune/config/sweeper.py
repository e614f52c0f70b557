"""Configuration of the sweeper, which `autotune.sweep` implements."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf, SamplerConfig


@dataclass
class StudySweeperConf(OptunaSweeperConf):  # type: ignore[misc]
    _target_: str = "autotune.sweep.StudySweeper"


@dataclass
class BoTorchSamplerConf(SamplerConfig):  # type: ignore[misc]
    """https://optuna-integration.readthedocs.io/en/stable/reference/generated/optuna_integration.BoTorchSampler.html"""

    _target_: str = "optuna_integration.BoTorchSampler"
    seed: int | None = None
    n_startup_trials: int = 10
    consider_running_trials: bool = True


@dataclass
class TwinSamplerConf(SamplerConfig):  # type: ignore[misc]
    """autotune/search/twin.py"""

    _target_: str = "autotune.search.twin.TwinSampler"
    _partial_: bool = True
    seed: int | None = None
    # Of the sweeping process' time for each proposal, at most; a tenth of a usual trial's time where that is less.
    proposal_s: float = 4.0
    draws: int = 4  # twins from the posterior, on which the best configurations are simulated, too


def register() -> None:
    """Make the sweeper's configuration and the samplers that hydra-optuna-sweeper lacks known to Hydra."""
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="autotune", node=StudySweeperConf)
    store.store(group="hydra/sweeper/sampler", name="botorch", node=BoTorchSamplerConf)
    store.store(group="hydra/sweeper/sampler", name="twin", node=TwinSamplerConf)
