"""Private names of dependencies stand in one file for each library; a test here says what broke when one is gone."""

import ast
import warnings
from pathlib import Path

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from autotune.search.hydra_private import distribution_of
from autotune.search.optuna_private import Grid, SingleWriterStorage

PACKAGE = Path(__file__).parent.parent / "autotune"
HOMES = {"optuna": "search/optuna_private.py", "hydra_plugins": "search/hydra_private.py", "vllm": "live/probe.py"}


def test_private_names_are_imported_only_at_their_home():
    homes = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("autotune"):
                library, *names = [*node.module.split("."), *(alias.name for alias in node.names)]
                if any(name.startswith("_") and not name.startswith("__") for name in names):
                    homes.setdefault(library, set()).add(str(file.relative_to(PACKAGE)))
    assert homes == {library: {home} for library, home in HOMES.items() if library != "vllm"}


def test_sweeps_on_the_command_line_have_hydras_distributions():
    read = OverridesParser.create().parse_override
    assert distribution_of(read("x=choice(a,2)")) == CategoricalDistribution(["a", 2])
    assert distribution_of(read("x=range(1,9,step=2)")) == IntDistribution(1, 7, step=2)
    assert distribution_of(read("x=tag(log,int(interval(1,8)))")) == IntDistribution(1, 8, log=True)
    assert distribution_of(read("x=interval(0.5,1)")) == FloatDistribution(0.5, 1.0)


def test_grid_names_the_point_of_a_trial_that_was_cut_off():
    study = optuna.create_study(sampler=Grid({"a": [1, 2], "b": [3]}, seed=0))
    trial = study.ask()
    point = Grid({"a": [1, 2], "b": [3]}, seed=0).point(study.get_trials()[0])
    assert point == {"a": trial.suggest_int("a", 1, 2), "b": trial.suggest_int("b", 3, 3)}


@pytest.fixture
def storage(tmp_path: Path) -> SingleWriterStorage:
    return SingleWriterStorage(optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db"))


def test_storage_knows_what_it_has_written(storage: SingleWriterStorage, tmp_path: Path):
    study = optuna.create_study(storage=storage, study_name="s", directions=["maximize"])
    with storage.transaction():
        trial = study.ask()
        trial.suggest_int("a", 1, 9)
        trial.set_user_attr("name", "value")
        trial.report(1.5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.set_constraint("limit", -1.0)
    study.tell(trial, 2.0)
    (seen,) = study.get_trials()
    (written,) = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db").trials
    for field in ("params", "distributions", "values", "user_attrs", "intermediate_values", "constraints", "state"):
        assert getattr(seen, field) == getattr(written, field), field
    assert seen.state is TrialState.COMPLETE


def test_transaction_writes_at_its_end_and_after_an_error(storage: SingleWriterStorage, tmp_path: Path):
    study = optuna.create_study(storage=storage, study_name="s")

    def trials_on_disk() -> int:
        return len(optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db").trials)

    with pytest.raises(RuntimeError), storage.transaction():
        study.ask()
        assert trials_on_disk() == 0
        raise RuntimeError
    assert trials_on_disk() == 1
