"""Private names of Hydra's Optuna sweeper, all that are used; tests/test_private_names.py says what broke."""

from typing import Any

from hydra.core.override_parser.types import Override
from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
from optuna.distributions import BaseDistribution


def distribution_of(override: Override) -> BaseDistribution:
    """The distribution that a sweep on the command line (`x=range(1,9)`) means to hydra-optuna-sweeper.

    Raises ValueError, AssertionError or NotImplementedError for one that it does not take.
    """
    made: Any = create_optuna_distribution_from_override(override)
    assert isinstance(made, BaseDistribution)
    return made
