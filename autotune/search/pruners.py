"""The pruner that `pruner=` names, and the value that it watches."""

import optuna
from hydra.errors import HydraException
from hydra.utils import instantiate

from autotune.config import bounds
from autotune.config.schema import Config, ObjectiveConfig
from autotune.errors import InputError
from autotune.measure import progress
from autotune.measure.objective import searches
from autotune.text import one_line


class BehindBest(optuna.pruners.BasePruner):
    """Ends a search for the highest load that can hardly be the best any more.

    A trial reports the loads that broke a limit. A load that breaks one bounds the trial from above, as far as a short
    run can tell: the trial ends once such a load is less than `1 - margin` of what the best trial is certified for.
    """

    def __init__(self, margin: float) -> None:
        if not 0 <= margin < 1:
            raise InputError(f"pruner.margin={margin:g}: write a share of the best load, such as 0.1")
        self._margin = margin

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        ended = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        best = max((one.values[0] for one in ended), default=0.0)
        return min(trial.intermediate_values.values()) < (1 - self._margin) * best


def make_pruner(config: Config) -> optuna.pruners.BasePruner:
    """The pruner of the `pruner` group. Raises InputError if it can't be made, or can't watch the objective."""
    if not isinstance(config.pruner, dict):
        raise InputError(f"pruner={config.pruner}: write an option of the group (--help)")
    for name, value in config.pruner.items():
        bounds.check(value, f"pruner.{name}")
    wrapped = config.pruner.get("wrapped_pruner")
    if wrapped is not None and not (isinstance(wrapped, dict) and "_target_" in wrapped):
        raise InputError(f"pruner.wrapped_pruner={wrapped}: write a _target_, as conf/pruner/patient.yaml does")
    allowed = ("optuna.*", "autotune.search.pruners.*")
    try:
        pruner: optuna.pruners.BasePruner = instantiate(config.pruner, _execution_whitelist_=allowed)
        if isinstance(pruner, optuna.pruners.HyperbandPruner):  # it looks at these only when it is first asked
            own = {name: config.pruner[name] for name in ("min_resource", "reduction_factor") if name in config.pruner}
            optuna.pruners.SuccessiveHalvingPruner(**own)
        if not isinstance(pruner, optuna.pruners.BasePruner):
            raise ValueError("no pruner; write a _target_, as the files in conf/pruner do")
    except HydraException:
        raise InputError(f"pruner={config.pruner}: write Optuna's _target_, as the files in conf/pruner do") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"pruner: {one_line(error)}") from None
    wanted = config.objective.metrics
    alone = len(wanted) == 1 and searches(config.objective)
    if isinstance(pruner, BehindBest):
        if not alone:
            raise InputError(
                f"pruner=behind: needs objective=max_qps or another highest load, and objective.metrics is {wanted}"
            )
    elif not isinstance(pruner, optuna.pruners.NopPruner) and (len(wanted) > 1 or wanted[0] not in progress.METRICS):
        raise InputError(
            f"pruner: needs one objective among {', '.join(progress.METRICS)}, "
            f"and objective.metrics is {wanted}; write pruner={'behind' if alone else 'none'}"
        )
    return pruner


def watched(pruner: optuna.pruners.BasePruner, config: ObjectiveConfig) -> str | None:
    """The published value of a running trial that `pruner` judges by; None for no pruner."""
    if isinstance(pruner, optuna.pruners.NopPruner):
        return None
    return progress.FAILING if isinstance(pruner, BehindBest) else config.metrics[0]
