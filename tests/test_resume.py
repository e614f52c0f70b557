"""A study goes on only with what its measurements depend on, and only where its results and its storage agree."""

import resource
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from autotune.data.models import build_shape
from autotune.errors import InputError
from autotune.measure.backend import Measurement
from autotune.results.study import results_in
from autotune.sweep import launchers, storage
from autotune.sweep.study import Sweep
from tests.standin import StandIn, StandInEngine
from tests.studies import JOURNAL, SEQS, asked, study

SWEEP = [f"{SEQS}=choice(16,32,64,128)", "sampler=random"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    study(folder, *SWEEP, "n_trials=1")
    return folder


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ("dataset=synthetic", "dataset.name="),
        ("scenario.qps=9", "scenario.qps=1.0 (now 9.0)"),
        ("scenario.ttft_ms=100", "scenario.ttft_ms=unset (now 100.0)"),
        ("scenario.seed=3", "scenario.seed=1 (now 3)"),
        ("model.revision=other", "model.revision=unset (now other)"),
        ("engine.args.dtype=half", "engine.args.dtype=unset (now half)"),
    ],
)
def test_study_does_not_go_on_with_what_can_not_be_compared(begun: Path, changed: str, key: str):
    with pytest.raises(InputError, match="was measured with") as refused:
        study(begun, *SWEEP, "n_trials=3", changed)
    assert key in str(refused.value)
    assert len(asked(begun)) == 1


def test_study_goes_on_with_what_it_began_with_however_that_is_written(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"input": "a b", "output": "c"}\n')
    (tmp_path / "link.jsonl").symlink_to("x.jsonl")
    words = [*SWEEP, "dataset=file", "baseline=false"]
    study(tmp_path, *words, "dataset.path=x.jsonl", "engine.args.max-model-len=4096", "n_trials=1")
    for number, path in enumerate(["./x.jsonl", f"{tmp_path}/x.jsonl", "link.jsonl"], 2):
        study(tmp_path, *words, f"dataset.path={path}", "engine.args.max_model_len=4K", f"n_trials={number}")
    (tmp_path / "y.jsonl").write_text((tmp_path / "x.jsonl").read_text())
    with pytest.raises(InputError, match=r"was measured with dataset.path=x.jsonl \(now y.jsonl\)"):
        study(tmp_path, *words, "dataset.path=y.jsonl", "engine.args.max_model_len=4096", "n_trials=5")


SIZES = "engine.args.block_size=choice(16,32)"


@pytest.mark.parametrize("baseline", ["baseline=defaults", "baseline=false"])
def test_flag_that_trials_chose_is_not_fixed_later_and_a_fixed_one_not_swept(tmp_path: Path, baseline: str):
    """Of two trials with equal parameters one would be taken for the other."""
    study(tmp_path, *SWEEP, SIZES, "n_trials=1", baseline)
    with pytest.raises(InputError, match=rf"was measured with {SEQS}=\w+ \(now 4\)"):
        study(tmp_path, f"{SEQS}=4", SIZES, "sampler=random", "n_trials=3", baseline)
    study(tmp_path, SIZES, "sampler=random", "n_trials=2", baseline)
    other = tmp_path / "other"
    other.mkdir()
    study(other, f"{SEQS}=4", SIZES, "sampler=random", "n_trials=1", baseline)
    with pytest.raises(InputError, match=rf"was measured with {SEQS}=4 \(now unset\)"):
        study(other, *SWEEP, SIZES, "n_trials=2", baseline)


def test_load_that_trials_chose_is_not_fixed_later(tmp_path: Path):
    words = [*SWEEP, "baseline=false", "scenario=server", "scenario.ttft_ms=5000", "scenario.tpot_ms=500"]
    study(tmp_path, *words, "n_trials=1", "scenario.qps=choice(2,3)")
    study(tmp_path, *words, "n_trials=2", "scenario.qps=choice(2,3)")
    with pytest.raises(InputError, match=r"was measured with scenario.qps=[23]\.0 \(now 9\.0\)"):
        study(tmp_path, *words, "n_trials=3", "scenario.qps=9")


def test_study_does_not_go_on_with_other_weights_under_the_name_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(StandIn, "needs_weights", True)
    (tmp_path / "model").mkdir()
    build_shape(tmp_path / "model", vocab_size=300, hidden_size=8)
    words = [*SWEEP, f"model.path={tmp_path}/model", "dataset.count=8"]
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(b"\2" + bytes(7) + b"{}" + bytes(200_000))
    study(tmp_path, *words, "n_trials=1")
    study(tmp_path, *words, "n_trials=2")
    weights.write_bytes(b"\2" + bytes(7) + b"{}" + b"\1" * 200_000)
    with pytest.raises(InputError, match="was measured with model_checksum="):
        study(tmp_path, *words, "n_trials=3")


def test_simulated_study_does_not_go_on_with_measurements(tmp_path: Path):
    study(tmp_path, *SWEEP, "n_trials=1", simulated=True)
    with pytest.raises(InputError, match=r"backend\._target_=autotune\.sim\.backend\.SimBackend"):
        study(tmp_path, *SWEEP, "n_trials=3")


def test_trial_that_is_interrupted_while_its_parameters_are_chosen_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RandomSampler, "sample_independent", interrupted)
        study(tmp_path, *SWEEP, "n_trials=1")
    assert not (tmp_path / "multirun/s/trial-0").exists()
    assert "queued again" not in study(tmp_path, *SWEEP, "n_trials=1")
    assert [trial.state for trial in asked(tmp_path)] == [TrialState.FAIL, TrialState.COMPLETE]


def test_study_goes_on_with_more_trials_another_sampler_and_a_budget(tmp_path: Path):
    study(tmp_path, *SWEEP, "n_trials=1")
    study(tmp_path, f"{SEQS}=choice(16,32,64,128)", "sampler=tpe", "seed=4", "n_trials=2", "budget=1h")


class Left:
    """A job that goes on without the process that submitted it, and has ended by now."""

    node, lost = "a", False

    def done(self) -> bool:
        return True


def test_canary_and_second_measurement_that_still_run_are_watched_and_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun = list[str]()

    def attach(_: launchers.Launcher, folder: Path) -> Left | None:
        begun.append(folder.name)
        shutil.copytree(tmp_path / "multirun/s/baseline", folder)
        return Left()

    words = [f"{SEQS}=choice(64)", "sampler=grid", "backend.shares=true"]
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_certify", lambda _: None)
        study(tmp_path, *words)
    monkeypatch.setattr(launchers.Inline, "nodes", lambda _: ["a"])
    monkeypatch.setattr(launchers.Inline, "attach", attach)
    monkeypatch.setattr(launchers.Inline, "submit", lambda _, trials: begun.extend(str(one.folder) for one in trials))
    said = study(tmp_path, *words)
    assert begun == ["canary-a", "fresh-trial-0"] and "fresh-trial-0 still runs; watching it again" in said
    assert "on a server of its own" in said


def test_trial_that_ended_without_its_study_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a cluster's job does whose login node is lost."""

    def lost(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Sweep, "_finish", lost)
        study(tmp_path, *SWEEP, "n_trials=1", "baseline=false")
    study(tmp_path, *SWEEP, "n_trials=2", "baseline=false")
    assert list(measured(tmp_path)) == ["trial-0", "trial-1"]


def measured(folder: Path) -> dict[str, float]:
    """When each trial of study s began that was measured to its end."""
    results = results_in(folder / "multirun/s")
    return {name: result.started_at for name, result in results.items() if result.complete and not result.duplicate_of}


@pytest.mark.parametrize(("lost", "sampler"), [("gone", "grid"), ("empty", "random")])
def test_study_whose_storage_is_gone_goes_on_from_its_results(tmp_path: Path, lost: str, sampler: str):
    words = [f"{SEQS}=choice(16,32,64,128)", f"sampler={sampler}"]
    study(tmp_path, *words, "n_trials=2")
    before = measured(tmp_path)
    storage = tmp_path / JOURNAL
    storage.unlink()
    if lost == "empty":
        storage.touch()
    study(tmp_path, *words, "n_trials=3")
    assert before.items() <= measured(tmp_path).items()
    assert len(measured(tmp_path)) == (5 if sampler == "grid" else 4)  # with the baseline
    states = {f"trial-{trial.number}": trial.state for trial in asked(tmp_path)}
    assert all(states[name] is TrialState.COMPLETE for name in measured(tmp_path) if name != "baseline")


def test_results_that_the_storage_does_not_know_are_not_measured_over(tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for folder, points in (tmp_path, "16,32"), (other, "64,128"):
        study(folder, f"{SEQS}=choice({points})", "sampler=random", "n_trials=2")
    before = measured(tmp_path)
    (other / JOURNAL).rename(tmp_path / JOURNAL)
    with pytest.raises(InputError, match=r"holds results that the study's storage does not know"):
        study(tmp_path, f"{SEQS}=choice(64,128)", "sampler=random", "n_trials=3")
    assert measured(tmp_path) == before


def in_second_trial(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something while the second trial of a study runs."""
    whole, begun = StandInEngine.run, 0

    def run(engine: StandInEngine, *arguments: Any) -> Measurement:
        nonlocal begun
        begun += 1
        if begun == 2:
            act()
        return whole(engine, *arguments)

    patch.setattr(StandInEngine, "run", run)


DATABASE = "multirun/s/study.db"


def lock(folder: Path, held: ExitStack) -> None:
    other = held.enter_context(closing(sqlite3.connect(folder / DATABASE, check_same_thread=False)))
    other.execute("BEGIN IMMEDIATE")


def delete(folder: Path, held: ExitStack) -> None:
    (folder / DATABASE).unlink()


def fill(folder: Path, held: ExitStack) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    held.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))  # more than a result takes, less than a database


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        pytest.param(lock, "database is locked", id="locked", marks=pytest.mark.slow),
        pytest.param(delete, "readonly database", id="deleted"),
        pytest.param(fill, "disk", id="disk full", marks=pytest.mark.slow),
    ],
)
def test_storage_that_fails_amid_a_study_ends_it_in_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path, ExitStack], None], said: str
):
    words = [*SWEEP, "hydra.sweeper.storage=null", "baseline=false"]
    monkeypatch.setattr(storage, "LOCKED_S", 0.1)
    with ExitStack() as held:
        in_second_trial(monkeypatch, lambda: happens(tmp_path, held))
        with pytest.raises(InputError, match=rf"{said}.*; what was measured is kept, and the same command continues"):
            study(tmp_path, *words, "n_trials=4")
    before = measured(tmp_path)
    assert len(before) == 2
    study(tmp_path, *words, "n_trials=4")
    assert before.items() <= measured(tmp_path).items() and len(measured(tmp_path)) == 4


def test_study_whose_folder_is_moved_says_so_and_goes_on_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, elsewhere = tmp_path / "multirun/s", tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        in_second_trial(patch, lambda: folder.rename(elsewhere))
        with pytest.raises(InputError, match=r"multirun/s was moved or deleted while its study ran; .*move it back"):
            study(tmp_path, *SWEEP, "baseline=false", "n_trials=3")
    shutil.rmtree(folder, ignore_errors=True)
    elsewhere.rename(folder)
    study(tmp_path, *SWEEP, "baseline=false", "n_trials=3")
    assert len(measured(tmp_path)) == 3


def test_trial_of_a_data_set_that_changed_amid_the_study_is_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "a b", "output": "c"}\n')
    words = [*SWEEP, "dataset=file", f"dataset.path={data}", "baseline=false", "sampler=grid"]
    in_second_trial(monkeypatch, lambda: data.write_text('{"input": "d e f", "output": "g h"}\n'))
    said = study(tmp_path, *words)
    assert len(measured(tmp_path)) == 2 and "trial-2: failed: not this study's: dataset_checksum=" in said


def test_trials_may_choose_their_data_and_the_study_goes_on(tmp_path: Path):
    words = ["dataset.count=choice(10,20)", "sampler=grid", "baseline=false"]
    study(tmp_path, *words, "n_trials=1")
    study(tmp_path, *words)
    assert len(measured(tmp_path)) == 2


@pytest.mark.parametrize("line", ["x", "null", "{}", '{"op_code": 99, "worker_id": "a"}'])
def test_journal_that_was_edited_is_named_and_can_be_deleted(tmp_path: Path, line: str):
    study(tmp_path, *SWEEP, "n_trials=1")
    lines = (tmp_path / JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_text("".join([*lines[:3], f"{line}\n", *lines[3:]]))
    with pytest.raises(InputError, match=r"study.log: not a journal of Optuna's .*; a broken file can be deleted"):
        study(tmp_path, *SWEEP, "n_trials=2")
    (tmp_path / JOURNAL).unlink()
    study(tmp_path, *SWEEP, "n_trials=2")


def test_journal_that_a_full_disk_cut_off_goes_on(tmp_path: Path):
    study(tmp_path, *SWEEP, "baseline=false", "n_trials=1")
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('{"op_code":4,"worker_id":"one')
    study(tmp_path, *SWEEP, "baseline=false", "n_trials=2")
    assert len(measured(tmp_path)) == 2 and {trial.state for trial in asked(tmp_path)} == {TrialState.COMPLETE}


def test_broken_storage_can_be_deleted(tmp_path: Path):
    words = [*SWEEP, "hydra.sweeper.storage=null", "baseline=false"]
    study(tmp_path, *words, "n_trials=1")
    before = measured(tmp_path)
    (tmp_path / DATABASE).write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"file is not a database; a broken file can be deleted: the study goes on"):
        study(tmp_path, *words, "n_trials=2")
    (tmp_path / DATABASE).unlink()
    study(tmp_path, *words, "n_trials=2")
    assert before.items() <= measured(tmp_path).items() and len(measured(tmp_path)) == 2


@pytest.mark.parametrize(
    "edit", ["trial_params set distribution_json='{'", "trial_params set param_value=99", "trials set state='ODD'"]
)
def test_storage_that_was_edited_can_be_deleted(tmp_path: Path, edit: str):
    words = [*SWEEP, "hydra.sweeper.storage=null", "baseline=false"]
    study(tmp_path, *words, "n_trials=1")
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        database.execute(f"update {edit}")
        database.commit()
    with pytest.raises(InputError, match=r"study=s can't be read .*; a broken file can be deleted: the study goes on"):
        study(tmp_path, *words, "n_trials=2")
    (tmp_path / DATABASE).unlink()
    study(tmp_path, *words, "n_trials=2")
    assert len(measured(tmp_path)) == 2


def test_broken_result_does_not_end_the_study(tmp_path: Path):
    study(tmp_path, *SWEEP, "n_trials=2")
    (tmp_path / "multirun/s/trial-1/result.json").write_text("")
    said = study(tmp_path, *SWEEP, "n_trials=3")
    assert "trial-1/result.json: not the result of a trial" in said and "Study s: 2 trials, 0 failed" in said
