"""Studies on a real SLURM, with what happens on one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from autotune.measure.result import Result
from tests.slurm_cluster import Slurm
from tests.studies import SEQS, command, trials

pytestmark = [pytest.mark.slow, pytest.mark.services]

# A simulated trial of some seconds; the one with a single sequence takes 98 s, more than SLURM's shortest time limit, a
# minute, and the half one between two looks at it.
LOAD = ["scenario.min_queries=9000", "backend.pace=0.02", "baseline=false"]
LAUNCHER = ["launcher=slurm", "launcher.poll_s=1", "launcher.n_jobs=4", "launcher.parameters.cpus_per_task=1"]
# SLURM may warn half a minute early: no other trial lasts as long.
JOB_LIMIT = ["launcher.parameters.timeout_min=1", "+launcher.parameters.slurm_signal_delay_s=5"]


@pytest.fixture(autouse=True)
def empty(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.cancel_all()


def start(slurm: Slurm, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    load = LOAD if "~backend.pace" not in arguments else ["baseline=false", "scenario.min_queries=64"]
    return run(slurm, folder, command(*load, *LAUNCHER, *arguments))


def verify(slurm: Slurm, folder: Path) -> "subprocess.Popen[str]":
    return run(slurm, folder, [sys.executable, "-m", "autotune.verify", "study=s", "k=1", "n=2"])


def run(slurm: Slurm, folder: Path, words: list[str]) -> "subprocess.Popen[str]":
    env = {**os.environ, **slurm.environment}
    return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def job_of(folder: Path, number: int) -> str:
    """The id of the job that runs trial `number`, as soon as it does."""
    return job_in(folder / f"multirun/s/trial-{number}")


def job_in(trial: Path) -> str:
    wait_until(lambda: (trial / "job.json").exists() and (trial / "progress.jsonl").exists())
    return str(json.loads((trial / "job.json").read_text())["id"])


def process_of(job: str) -> psutil.Process:
    """The Python of a job, and not the srun that started it."""
    for process in psutil.process_iter(["cmdline"]):
        is_submitit = "submitit.core._submit" in (process.info["cmdline"] or []) and process.name() != "srun"
        if is_submitit and process.environ().get("SLURM_JOB_ID") == job:
            return process
    raise AssertionError(f"no process of job {job}")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def done(study: "subprocess.Popen[str]", timeout_s: float = 240) -> str:
    output, _ = study.communicate(timeout=timeout_s)
    assert study.returncode == 0, output
    return output


def seqs(folder: Path, number: int) -> int:
    """What trial `number` was asked to run, as soon as it is."""
    wait_until(lambda: len(trials(folder)) > number and bool(trials(folder)[number].params))
    return int(trials(folder)[number].params[SEQS])


def test_study_survives_a_crash_a_cancel_a_time_out_and_a_preemption(slurm: Slurm, tmp_path: Path):
    points = [1, *range(100, 111)]
    grid = ["sampler=grid", f"{SEQS}=choice({','.join(map(str, points))})"]
    study = start(slurm, tmp_path, *grid, *JOB_LIMIT, "launcher.parameters.slurm_partition=requeue")
    others = (number for number in (2, 4, 6, 8) if seqs(tmp_path, number) != 1)
    crashed = next(others)
    process_of(job_of(tmp_path, crashed)).kill()
    cancelled = next(others)
    slurm.run("scancel", job_of(tmp_path, cancelled))
    preempted = next(others)
    job = job_of(tmp_path, preempted)
    slurm.submit("sleep 3", "--partition=high", "--exclusive", "--gpus-per-node=4")
    output = done(study)
    ended = {trial.number: trial for trial in trials(tmp_path)}
    assert sorted(trial.params[SEQS] for trial in ended.values()) == points
    late = next(number for number, trial in ended.items() if trial.params[SEQS] == 1)
    failed = {number: trial.user_attrs["reason"] for number, trial in ended.items() if trial.state is TrialState.FAIL}
    assert failed.keys() == {crashed, cancelled, late}, output
    # SLURM warns first, and ends the job if the warning was lost.
    assert "timed-out" in failed[late] or "SystemExit" in failed[late] or "TIMEOUT" in failed[late]
    assert "SLURM job" in failed[crashed] and "CANCELLED" in failed[cancelled]
    assert "Study s: 12 trials, 3 failed" in output
    assert ended[preempted].state is TrialState.COMPLETE
    assert "Restarts=0" not in slurm.run("scontrol", "show", "job", job)


def test_jobs_that_run_are_found_again_after_the_login_node_is_lost(slurm: Slurm, tmp_path: Path):
    grid = ["sampler=grid", f"{SEQS}=choice(100,101,102,103)", "backend.pace=0.04"]
    study = start(slurm, tmp_path, *grid)
    jobs = [job_of(tmp_path, number) for number in range(3)]
    study.kill()
    study.wait()
    output = done(start(slurm, tmp_path, *grid))
    assert "still runs; watching it again" in output
    assert [trial.state for trial in trials(tmp_path)] == [TrialState.COMPLETE] * 4
    assert [job_of(tmp_path, number) for number in range(3)] == jobs


def test_job_asks_for_the_gpus_of_its_trial_and_a_stopped_study_leaves_none(slurm: Slurm, tmp_path: Path):
    study = start(slurm, tmp_path, f"{SEQS}=choice(100,101)", "n_trials=2", "engine.args.tensor_parallel_size=2")
    assert "gpu:2" in slurm.run("scontrol", "show", "job", job_of(tmp_path, 0))
    study.terminate()
    study.wait(30)
    wait_until(lambda: not slurm.run("squeue", "--noheader", "--me"))


STAND_IN = ["backend._target_=tests.standin.StandIn", "+backend.shares=true"]
STAND_IN += ["~backend.device", "~backend.twin", "~backend.pace", "~backend.steps"]  # the simulator's


def test_job_whose_server_stays_gets_the_next_trial_and_ends_with_the_study(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grid = ["sampler=grid", f"{SEQS}=choice(1030,1031,1032,1033,1034,1035)", "launcher.n_jobs=2", *STAND_IN]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # where the jobs find the stand-in
    output = done(start(slurm, tmp_path, *grid))
    assert "Study s: 6 trials, 0 failed" in output
    jobs = {json.loads(path.read_text())["id"] for path in (tmp_path / "multirun/s").glob("trial-*/job.json")}
    told = {Result.load(tmp_path / f"multirun/s/trial-{number}").facts["server"] for number in range(6)}
    assert len(jobs) == 2 and len(told) == 2, output
    wait_until(lambda: not slurm.run("squeue", "--noheader", "--me"))


def test_trials_that_start_together_can_be_one_array(slurm: Slurm, tmp_path: Path):
    grid = ["sampler=grid", f"{SEQS}=choice(100,101,102)", "launcher.array=true", "scenario.min_queries=64"]
    done(start(slurm, tmp_path, *grid))
    ids = [json.loads(path.read_text())["id"] for path in (tmp_path / "multirun/s").glob("trial-*/job.json")]
    assert sorted(job.partition("_")[2] for job in ids) == ["0", "1", "2"]
    assert all(Result.load(path.parent).complete for path in (tmp_path / "multirun/s").glob("trial-*/result.json"))


def test_what_slurm_refuses_is_one_line(slurm: Slurm, tmp_path: Path):
    study = start(slurm, tmp_path, f"{SEQS}=choice(100)", "launcher.parameters.slurm_partition=nowhere")
    output, _ = study.communicate(timeout=60)
    assert study.returncode == 1 and "the cluster refuses the job" in output and "Traceback" not in output


def test_each_node_shows_first_what_it_can(slurm: Slurm, tmp_path: Path):
    study = start(slurm, tmp_path, f"{SEQS}=choice(100)", "n_trials=1", "launcher.canary=true", "backend.pace=0.01")
    output = done(study)
    assert "Nodes, by a short baseline on each:" in output and "localhost: " in output
    canary = Result.load(tmp_path / "multirun/s/canary-localhost")
    assert canary.complete and canary.metrics["requests"] == 32
    assert len(trials(tmp_path)) == 1


def test_best_is_verified_in_jobs_that_a_lost_login_node_does_not_end(slurm: Slurm, tmp_path: Path):
    done(start(slurm, tmp_path, "sampler=grid", f"{SEQS}=choice(32)", "baseline=true"))
    repeats = [tmp_path / f"multirun/s/verify/{name}-{block}" for name in ("baseline", "trial-0") for block in (1, 2)]
    lost = verify(slurm, tmp_path)
    jobs = [job_in(repeat) for repeat in repeats]
    lost.kill()
    lost.wait()
    output, _ = verify(slurm, tmp_path).communicate(timeout=90)
    assert "No configuration beat the defaults in 2 repeats" in output
    assert [job_in(repeat) for repeat in repeats] == jobs
    assert all(Result.load(repeat).complete for repeat in repeats)
    wait_until(lambda: not slurm.run("squeue", "--noheader", "--me"))  # a job ends a moment after its result is there
    assert [slurm.state(job) for job in jobs] == ["COMPLETED"] * 4
