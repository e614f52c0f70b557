"""What a study survives: kills, stops, a second process, trials that are slow, bad or too many."""

import errno
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from autotune.errors import InputError
from autotune.measure import progress
from autotune.measure.backend import Measurement
from autotune.measure.result import Result, State
from autotune.results import summary
from autotune.results.study import Study
from autotune.sweep import launchers, storage, worker
from autotune.sweep.study import Sweep, counted_s, seconds
from autotune.system import interrupt
from tests.conftest import processes_in
from tests.standin import StandInEngine
from tests.studies import JOURNAL, SEQS, asked, autotune, command, environment, study, trials

SHORT_GRID = ["sampler=grid", f"{SEQS}=range(4,8)", "baseline=false"]
ON_GPUS = ["sampler=grid", f"{SEQS}=range(4,24)", "launcher=gpus", "gpus=[0,1]", "backend.pace=0.003"]


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment(folder),
    )  # fmt: skip


def complete(trials: list[FrozenTrial]) -> list[int]:
    """The sequences of the trials that completed, in order."""
    return sorted(trial.params[SEQS] for trial in trials if trial.state is TrialState.COMPLETE)


def running(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state is TrialState.RUNNING]


def wait_for(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(complete(trials(folder))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gone(folder: Path) -> bool:
    deadline = time.monotonic() + 10
    while processes_in(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
def test_killed_study_goes_on_and_runs_each_point_once(tmp_path: Path):
    draw = random.Random(1)
    for _ in range(4):
        study = start(tmp_path, *ON_GPUS)
        while not (tmp_path / "multirun/s").exists():  # on a busy machine the imports take long
            assert study.poll() is None
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 2.5))
        study.kill()
        study.wait()
        assert gone(tmp_path)
    assert autotune(tmp_path, *ON_GPUS, "resume=true").returncode == 0
    assert complete(trials(tmp_path)) == list(range(4, 24))
    assert all(trial.state.is_finished() for trial in trials(tmp_path))


def killed(folder: Path, seqs: int) -> None:
    """Leave the study as a process does that is killed while it runs a trial of so many sequences."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    begun = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    begun.enqueue_trial({SEQS: seqs})
    begun.ask().suggest_int(SEQS, 4, 500)


def test_trial_that_was_lost_is_asked_again_and_counts_once(tmp_path: Path):
    words = ["sampler=random", "baseline=false", f"{SEQS}=range(4,500)"]
    study(tmp_path, *words, "n_trials=1")
    killed(tmp_path, 77)
    said = study(tmp_path, *words, "n_trials=3", "resume=true")
    assert "trial-1 was interrupted; queued again" in said
    lost, again = asked(tmp_path)[1:3]
    assert lost.state is TrialState.FAIL and again.params == lost.params == {SEQS: 77}
    assert len(complete(asked(tmp_path))) == 3
    assert not running(asked(tmp_path))


def signal_in_trial(patch: pytest.MonkeyPatch, trial: int, number: int) -> None:
    """Send this process a signal while it measures its trial of this number, counted from 1."""
    whole, begun = StandInEngine.run, 0

    def run(engine: StandInEngine, *arguments: Any) -> Measurement:
        nonlocal begun
        begun += 1
        if begun == trial:
            signal.raise_signal(number)
            while True:  # until the study says so
                progress.check(engine.folder)
                time.sleep(0.01)
        return whole(engine, *arguments)

    patch.setattr(StandInEngine, "run", run)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_stopped_study_keeps_what_it_has_and_goes_on_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, ends: type[BaseException]
):
    signal_in_trial(monkeypatch, 3, number)
    with pytest.raises(ends):
        study(tmp_path, *SHORT_GRID)
    assert len(complete(asked(tmp_path))) == 2 and not running(asked(tmp_path))
    assert "stopped; " in (tmp_path / "multirun/s/autotune.log").read_text()
    assert (tmp_path / "multirun/s/summary.txt").exists()
    monkeypatch.undo()
    study(tmp_path, *SHORT_GRID, "resume=true")
    assert complete(asked(tmp_path)) == [4, 5, 6, 7]


def test_signal_in_the_end_of_a_study_waits_until_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    render, signals = summary.render, [signal.SIGTERM]

    def interrupted(found: Study) -> str:
        if signals:
            signal.raise_signal(signals.pop())
        return render(found)

    monkeypatch.setattr(summary, "render", interrupted)
    with pytest.raises(SystemExit):
        study(tmp_path, *SHORT_GRID)
    assert complete(asked(tmp_path)) == [4, 5, 6, 7] and (tmp_path / "multirun/s/summary.txt").exists()


def test_trial_that_ends_with_what_had_started_it_is_asked_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launchers.Thread, "lost", True)
    monkeypatch.setattr(worker, "run", lambda *_: "the guard has ended")
    with pytest.raises(SystemExit, match="no trial of s completed"):
        study(tmp_path, f"{SEQS}=range(4,500)", "sampler=random", "baseline=false", "n_trials=1")
    first, again = asked(tmp_path)
    assert first.user_attrs["lost"] and again.params == first.params
    assert again.user_attrs["reason"] == "the guard has ended"


@pytest.mark.parametrize("ending", [b"\n", b" \xc3\xa9\xff\n"])
@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b"7", b'{"step": -1, "values": {}}', b'{"step": 1, "values": {"a": "b"}}', b'{"phase": 1}']
)
def test_line_of_progress_that_is_none_is_left_out(tmp_path: Path, line: bytes, ending: bytes):
    reader = progress.Reader(tmp_path)
    progress.phase(tmp_path, "start")
    with (tmp_path / progress.FILE).open("ab") as file:
        file.write(line + ending)
    progress.publish(tmp_path, 3, {"tokens_per_s": 1.5})
    first, second = reader.new()
    assert first == {"time": first["time"], "phase": "start"}
    assert second == {"time": second["time"], "step": 3, "values": {"tokens_per_s": 1.5}}
    progress.phase(tmp_path, "run")
    assert [entry["phase"] for entry in reader.new()] == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_study_leaves_no_process(tmp_path: Path, number: int):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    study = start(tmp_path, *ON_GPUS)
    signal.signal(signal.SIGHUP, before)
    wait_for(tmp_path, 1)
    study.send_signal(number)
    study.wait(60)
    assert study.returncode != 0 and gone(tmp_path)
    assert "Traceback" not in (study.stderr.read() if study.stderr else "")
    assert complete(trials(tmp_path)) and (tmp_path / "multirun/s/summary.txt").exists()
    assert not running(trials(tmp_path))


def test_signal_that_python_ignores_prints_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interrupt, "_received", [signal.SIGTERM])
    monkeypatch.setattr(sys, "unraisablehook", interrupt._unraisable)

    class Ended:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error

    for error in (SystemExit(143), ValueError()):
        Ended(error)  # which ends at once
    assert "ValueError" in (said := capsys.readouterr().err) and "SystemExit" not in said


def test_second_process_on_one_study_is_refused(tmp_path: Path):
    folder = tmp_path / "multirun/s"
    folder.mkdir(parents=True)
    with (
        storage.lock(folder / ".lock", "the study"),
        pytest.raises(InputError, match=r"another process works on this study \(process"),
    ):
        study(tmp_path, *SHORT_GRID)


def test_resume_of_nothing_is_said(tmp_path: Path):
    with pytest.raises(InputError, match="resume=true: there is no study in"):
        study(tmp_path, "resume=true", f"{SEQS}=choice(4,8)")


def test_study_that_goes_on_does_not_suggest_its_first_points_again(tmp_path: Path):
    for total in ("n_trials=3", "n_trials=6"):
        study(tmp_path, total, "sampler=random", "baseline=false", f"{SEQS}=range(10,500)")
    assert len(set(complete(asked(tmp_path)))) == len(asked(tmp_path)) == 6


def test_failures_in_a_row_end_the_study_with_their_reasons(tmp_path: Path):
    broken = ["engine.args.gpu_memory_utilization=0.1", f"{SEQS}=range(4,100)", "max_failures=3", "n_trials=50"]
    message = "max_failures=3 trials failed in a row: StartError: no memory is left for the KV cache"
    with pytest.raises(InputError, match=message):
        study(tmp_path, *broken)
    assert len(asked(tmp_path)) <= 3


def test_budget_counts_trials_without_the_first_start_which_compiles_for_the_others():
    cold, warm = ({"start": start_s, "run": 20.0} for start_s in (300.0, 60.0))
    results = [Result(State.complete, phases=phases, started_at=at) for at, phases in [(2.0, warm), (1.0, cold)]]
    assert counted_s(results) == 20 + 80 and counted_s(results[:1]) == 20 and counted_s([]) == 0


def test_budget_ends_the_asking_and_the_study_reports(tmp_path: Path):
    said = study(tmp_path, "budget=5m", "n_trials=50", f"{SEQS}=range(4,100)")
    assert "Study s: " in said
    assert len(asked(tmp_path)) == 3  # and the baseline: a start takes 100 s, and the first one does not count


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5d", 129_600)])
def test_durations_are_read(text: str, expected: float):
    assert seconds(text) == expected


PRUNER = ["pruner=median", "pruner.n_startup_trials=1", "sampler=grid", "baseline=false"]


def check_pruned(trials: list[FrozenTrial], good: int, bad: int) -> None:
    by_value = {trial.params[SEQS]: trial for trial in trials}
    if by_value[bad].number == 0:  # the grid's order is drawn: nothing to compare the first one with
        assert by_value[bad].state is TrialState.COMPLETE
    else:
        assert by_value[bad].state is TrialState.PRUNED
        assert by_value[bad].value == by_value[bad].intermediate_values[max(by_value[bad].intermediate_values)]
    assert by_value[good].state is TrialState.COMPLETE


@pytest.mark.parametrize("seed", [0, 1])
def test_bad_trial_is_pruned_while_it_runs(tmp_path: Path, seed: int):
    published = ["backend.steps=8", "backend.pace_s=0.03", "pruner.n_warmup_steps=1"]
    study(tmp_path, *published, *PRUNER, f"seed={seed}", f"{SEQS}=choice(200,4)")
    check_pruned(asked(tmp_path), 200, 4)


@pytest.mark.slow
def test_bad_trial_is_pruned_in_a_process_of_its_own(tmp_path: Path):
    long = ["scenario.min_queries=600", "backend.pace=0.02", "launcher=gpus", "gpus=[0]", "pruner.n_warmup_steps=3"]
    autotune(tmp_path, *long, *PRUNER, f"{SEQS}=choice(256,1)")
    check_pruned(trials(tmp_path), 256, 1)


def test_search_that_can_hardly_be_the_best_any_more_is_pruned(tmp_path: Path):
    search = ["scenario=interactive", "objective=max_qps", "pruner=behind", "backend.steps=4", "sampler=grid"]
    said = study(tmp_path, *search, f"{SEQS}=choice(4,1024)")  # 1,024 is the baseline
    by_value = {trial.params[SEQS]: trial for trial in asked(tmp_path)}
    assert by_value[4].state is TrialState.PRUNED
    assert min(by_value[4].intermediate_values.values()) < 0.9 * by_value[1024].value
    assert "the pruner ends it at failing_load" in said and "1 ended early" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pruner=median", "objective=latency"], "pruner: needs one objective among tokens_per_s"),
        (["pruner=median", "objective=max_qps", "scenario=interactive"], "write pruner=behind"),
        (["pruner=behind"], "pruner=behind: needs objective=max_qps"),
        (["pruner=median", "pruner.n_startup_trials=-1"], r"pruner\.n_startup_trials=-1: write a number from 0"),
        (
            ["pruner=median", "pruner._target_=os.getcwd"],
            r"pruner=\{'_target_': 'os.getcwd', .*write Optuna's _target_",
        ),
        (["hydra.sweeper.sampler._target_=optuna.Nope"], r"sampler\._target_=optuna\.Nope: write one of Optuna's"),
        (["sampler=nsga2", "hydra.sweeper.sampler.population_size=1"], "hydra.sweeper.sampler: `population"),
        (["sampler=cmaes", "objective=pareto"], "sampler=cmaes: takes one objective; write sampler=nsga2"),
        (["gpus=[0]", "engine.args.tensor_parallel_size=2"], r"gpus=\[0\]: a trial takes 2; write more of them"),
        (
            ["gpus=[0]", "engine.args.data_parallel_size=range(1,3)"],
            r"gpus=\[0\]: with data_parallel_size=2 a trial takes 2; write more",
        ),
    ],
)
def test_pruner_sampler_or_gpus_that_can_not_do_are_refused(tmp_path: Path, words: list[str], said: str):
    with pytest.raises(InputError, match=said):
        study(tmp_path, *words, f"{SEQS}=choice(4,8)")


def test_canary_is_no_trial_that_others_are_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweeps, end = list[Sweep](), Sweep._end
    monkeypatch.setattr(launchers.Inline, "nodes", lambda _: ["a"])
    monkeypatch.setattr(Sweep, "_end", lambda sweep: sweeps.append(sweep) or end(sweep))
    study(tmp_path, "n_trials=1", f"{SEQS}=choice(4,8)")
    assert sweeps[0].canaries.keys() == {"a"} and sweeps[0].results.keys() == {"baseline", "trial-0"}


def test_several_objectives_are_measured_while_a_trial_says_how_far_it_is(tmp_path: Path):
    study(tmp_path, "objective=pareto", "n_trials=1", "backend.steps=5", f"{SEQS}=choice(64)")
    assert [trial.state for trial in asked(tmp_path)] == [TrialState.COMPLETE]


def test_trial_that_can_not_be_told_to_stop_does_not_keep_the_study_from_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sweep, "_watch", interrupted)
    monkeypatch.setattr(progress, "stop", full)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, "backend.pace_s=0.3", f"{SEQS}=choice(4,8)")
    log = (tmp_path / "multirun/s/autotune.log").read_text()
    assert "baseline may still run: OSError: [Errno 28] No space left on device" in log
    assert (tmp_path / "multirun/s/summary.txt").exists()


@pytest.mark.parametrize("storage", ["journal://multirun/s/study.log", "sqlite:///other.db"])
def test_study_is_kept_where_the_storage_says(tmp_path: Path, storage: str):
    study(tmp_path, "n_trials=1", f"hydra.sweeper.storage={storage}", f"{SEQS}=choice(4,8)")
    assert (tmp_path / storage.rpartition("://")[2].lstrip("/")).exists()


@pytest.mark.parametrize("storage", ["journal:///proc/x", "journal://", "sqlite:////proc/none/x.db"])
def test_storage_that_can_not_be_made_is_named_and_leaves_no_study(tmp_path: Path, storage: str):
    with pytest.raises(InputError, match=f"hydra.sweeper.storage={storage}: no file can be made there"):
        study(tmp_path, f"hydra.sweeper.storage={storage}", f"{SEQS}=choice(4,8)")
    assert not (tmp_path / "multirun/s").exists()


def test_study_in_a_database_goes_on(tmp_path: Path):
    """By default trials are kept in SQLite, of which a study reads each once: see SingleWriterStorage."""
    words = ["hydra.sweeper.storage=null", "sampler=random", f"{SEQS}=range(4,100)"]
    study(tmp_path, *words, "n_trials=1")
    study(tmp_path, *words, "n_trials=3")
    assert len(complete(trials(tmp_path))) == 3


@pytest.mark.slow
def test_upstream_sweeper_still_drives_trials(tmp_path: Path):
    done = autotune(tmp_path, "hydra/sweeper=optuna", "n_trials=2", f"{SEQS}=choice(4,8)")
    assert done.returncode == 0, done.stderr
    assert "best_value" in (tmp_path / "multirun/s/optimization_results.yaml").read_text()


@pytest.mark.slow
def test_trials_see_those_that_run(tmp_path: Path):
    """With a constant liar, trials that are asked while others run are spread over the space."""
    space = ["launcher=gpus", "gpus=[0,1,2,3]", "backend.pace=0.002", f"{SEQS}=range(1,512)", "n_trials=8"]
    autotune(tmp_path, *space, "hydra.sweeper.sampler.n_startup_trials=4", "baseline=false")
    values = [trial.params[SEQS] for trial in trials(tmp_path)]
    assert len(set(values)) == 8
    assert json.loads((tmp_path / "multirun/s/trial-0/result.json").read_text())["facts"]["leased_gpus"]
