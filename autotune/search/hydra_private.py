"""Private names of Hydra's Optuna sweeper, all that are used; tests/test_private_names.py says what broke."""

from typing import Any

from hydra.core.override_parser.types import Override, QuotedString, Transformer
from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from autotune.config.vllm_flags import packed
from autotune.search.distributions import Distribution


def distribution_of(override: Override) -> Distribution:
    """The distribution that a sweep on the command line (`x=range(1,9)`) means to hydra-optuna-sweeper.

    Raises ValueError, AssertionError or NotImplementedError for one that it does not take.
    """
    if override.is_choice_sweep():
        choices = override.sweep_iterator(Transformer.identity)
        return CategoricalDistribution([packed(_plain(choice)) for choice in choices])
    made: Any = create_optuna_distribution_from_override(override)
    assert isinstance(made, (IntDistribution, FloatDistribution))
    return made


def _plain(value: Any) -> Any:
    """A choice without Hydra's types."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {str(_plain(name)): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
