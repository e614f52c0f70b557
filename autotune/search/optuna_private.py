"""Private names of Optuna, all that are used; tests/test_private_names.py says what broke."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import GridSampler
from optuna.samplers._tpe import _truncnorm
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial, TrialState
from scipy.special import log_ndtr

# TPE's: the same function, compiled where Optuna's is Python.
_truncnorm._log_ndtr = log_ndtr  # noqa: SLF001


class Grid(GridSampler):
    """Optuna's grid in an order of its own; Optuna's would stop a study that it did not start."""

    def __init__(self, values: Mapping[str, Sequence[Any]], slow: Collection[str] = (), **settings: Any) -> None:
        """`values` by parameter; those of the `slow` ones change as seldom as can be, as each change takes long."""
        super().__init__(values, **settings)
        slow_at = [at for at, name in enumerate(self._param_names) if name in slow]
        groups: dict[tuple[Any, ...], list[int]] = {}  # numbers of points, in Optuna's random order
        for number, point in enumerate(self._all_grids):
            groups.setdefault(tuple(point[at] for at in slow_at), []).append(number)
        self._order = [number for group in groups.values() for number in group]

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Note which point `trial` asks for: the first one that no other has asked for."""
        if not {"grid_id", "fixed_params"} & trial.system_attrs.keys():
            left = set(self._get_unvisited_grid_ids(study))
            number = next(number for number in self._order if number in left or not left)
            study._storage.set_trial_system_attr(trial._trial_id, "search_space", self._search_space)  # noqa: SLF001
            study._storage.set_trial_system_attr(trial._trial_id, "grid_id", number)  # noqa: SLF001

    def after_trial(self, *_: Any) -> None:
        """Leave the study running."""

    def point(self, trial: FrozenTrial) -> dict[str, Any]:
        """The parameters of `trial`, also if it was interrupted before they were noted."""
        return dict(zip(self._param_names, self._all_grids[trial.system_attrs["grid_id"]], strict=True))

    def place(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The system attributes of a trial that has asked for the point `params`."""
        number = self._all_grids.index(tuple(params[name] for name in self._param_names))
        return {"search_space": self._search_space, "grid_id": number}


class SingleWriterStorage(_CachedStorage):
    """A database in which nobody else changes the study (see storage.lock): each trial is read once, then known.

    Optuna's own cache asks the database for what still runs, several times for each question to a sampler.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._read: set[int] = set()  # studies

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        if study_id not in self._read:
            super()._read_trials_from_remote_storage(study_id)
            self._read.add(study_id)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        return self._studies[study_id].trials[number]

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._note(trial_id, "params", param_name, distribution.to_external_repr(param_value_internal))
        self._note(trial_id, "distributions", param_name, distribution)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._note(trial_id, "intermediate_values", step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_user_attr(trial_id, key, value)
        self._note(trial_id, "user_attrs", key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_system_attr(trial_id, key, value)
        self._note(trial_id, "system_attrs", key, value)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        changed = super().set_trial_state_values(trial_id, state, values)
        self._replace(trial_id, self._backend.get_trial(trial_id))
        return changed

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all that the block writes at once: one wait for the disk instead of a dozen."""
        session = self._backend.scoped_session
        with self._backend.engine.connect() as connection:
            transaction = connection.begin()
            session.remove()
            session.configure(bind=connection, join_transaction_mode="rollback_only")
            try:
                yield
            finally:
                session.remove()
                session.configure(bind=self._backend.engine, join_transaction_mode="conditional_savepoint")
                if transaction.is_active:  # after an error, too: what was noted before it is kept
                    transaction.commit()

    def _note(self, trial_id: int, field: str, key: Any, value: Any) -> None:
        """Change a copy: whoever was handed the trial keeps it as it was."""
        trial = copy.copy(self.get_trial(trial_id))
        setattr(trial, field, {**getattr(trial, field), key: value})
        self._replace(trial_id, trial)

    def _replace(self, trial_id: int, trial: FrozenTrial) -> None:
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        self._studies[study_id].trials[number] = trial
