"""What the cluster launcher asks SLURM for, which sinfo stands for, and how it hands trials on to jobs that wait."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.config.command_line import compose
from autotune.config.schema import ClusterConfig, Config
from autotune.errors import InputError
from autotune.measure.prepare import gpu_count
from autotune.sweep import cluster as clusters
from autotune.sweep import handing, worker
from autotune.sweep.cluster import JOB, LOGS, Cluster, Queue, as_new_job, gigabytes, minutes, run_noted
from autotune.sweep.handing import hand_on, has_ended, next_for, running, say_ended, waits_after
from autotune.sweep.worker import TrialSpec

CONFIG = ClusterConfig(n_jobs=2, canary=True, poll_s=1.0, parameters={"timeout_min": 1})


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name, script in {"sbatch": "", "srun": "", "sinfo": "echo a; echo b"}.items():
        program(tmp_path, name, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Cluster(CONFIG, None)


def excluded(cluster: Cluster, folder: Path) -> str | None:
    return cluster._executor(folder, 1, "")._executor.parameters.get("exclude")


def test_node_set_aside_gets_no_more_jobs_unless_it_is_the_last(cluster: Cluster, tmp_path: Path):
    assert cluster.nodes() == ["a", "b"] and excluded(cluster, tmp_path) is None
    cluster.set_aside("a")
    assert cluster.nodes() == ["b"] and excluded(cluster, tmp_path) == "a"
    cluster.set_aside("b")
    assert excluded(cluster, tmp_path) == "a"


def test_canaries_that_sinfo_leaves_out_are_told(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    program(tmp_path, "sinfo", "echo no controller >&2; exit 1")
    assert cluster.nodes() == [] and "no node gets a canary or is set aside, as sinfo failed: no c" in caplog.text
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert cluster.nodes() == [] and "No such file or directory: 'sinfo'" in caplog.text


def test_job_of_a_canary_is_bound_to_its_node(cluster: Cluster, tmp_path: Path):
    assert cluster._executor(tmp_path, 1, "b")._executor.parameters["nodelist"] == "b"


def test_parameter_that_submitit_does_not_know_is_named(cluster: Cluster, tmp_path: Path):
    cluster._parameters["slurm_partitoin"] = "gpu"
    with pytest.raises(InputError, match=r"launcher.parameters: .*partitoin"):
        cluster._executor(tmp_path, 1, "")


@pytest.mark.parametrize("wrong", [{"mem_gb": "64GB"}, {"timeout_min": "2-00:00:00"}, {"cpus_per_task": "many"}])
def test_parameter_of_the_wrong_kind_is_one_line(cluster: Cluster, tmp_path: Path, wrong: dict[str, str]):
    cluster._parameters.update(wrong)
    with pytest.raises(InputError, match=r"launcher.parameters: .*write timeout_min and mem_gb as numbers"):
        cluster._executor(tmp_path, 1, "")


def test_gpus_can_be_left_to_slurms_own_options(tmp_path: Path, cluster: Cluster):
    other = Cluster(replace(CONFIG, parameters={"gpus_per_node": None, "slurm_gres": "gpu:h100:1"}), None)
    assert "gpus_per_node" not in other._executor(tmp_path, 1, "")._executor.parameters
    assert cluster._executor(tmp_path, 2, "")._executor.parameters["gpus_per_node"] == 2


def test_job_that_is_submitted_from_a_job_is_a_new_one(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"SLURM_ARRAY_TASK_ID": "7", "SBATCH_PARTITION": "low", "SLURM_CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    with as_new_job():
        assert {name for name in os.environ if name.startswith(("SLURM", "SBATCH"))} == {"SLURM_CONF"}
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "7"


def test_gpus_are_the_clusters_to_give():
    with pytest.raises(InputError, match="leave gpus=null"):
        Cluster(CONFIG, [0])


def test_job_is_queued_until_squeue_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    queue = Queue(poll_s=0.0)
    queue.submitted("7")
    program(tmp_path, "squeue", "echo down >&2; exit 1")
    assert queue.has("7")
    program(tmp_path, "squeue", "echo '7|7_N/A|RUNNING|node1|None'; echo '8|8_N/A|COMPLETED||None'")
    assert queue.has("7") and queue.node("7") == "node1" and not queue.has("8")
    program(tmp_path, "squeue", "true")
    assert not queue.has("7")


def test_job_that_waits_says_why_once_if_it_is_not_for_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    jobs = ["7|7_N/A|PENDING||ReqNodeNotAvail, UnavailableNodes:a", "8|8_N/A|PENDING||Priority"]
    waiting = [*jobs, "9|9_N/A|PENDING||JobHeldUser"]  # the last is none of the study's
    program(tmp_path, "squeue", "\n".join(f"echo '{line}'" for line in waiting))
    queue = Queue(poll_s=0.0)
    for job in "78":
        queue.submitted(job)
    assert queue.has("7") and queue.has("7")
    assert caplog.messages == ["SLURM job 7 waits: ReqNodeNotAvail, UnavailableNodes:a"]


def test_job_is_submitted_once_slurm_is_back_and_at_once_refused_where_it_never_was(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def ended(_: float) -> None:
        program(tmp_path, "sbatch", "echo Submitted batch job 8")

    trial = TrialSpec(Config(), [], tmp_path / "s/trial-0")
    trial.folder.mkdir(parents=True)
    monkeypatch.setattr(clusters.time, "sleep", ended)
    for name in ("squeue", "sbatch"):
        program(tmp_path, name, "echo no controller >&2; exit 1")
    with pytest.raises(InputError, match=r"^launcher: the cluster refuses the job: no controller$"):
        cluster.submit([trial])
    program(tmp_path, "squeue", "true")
    assert not cluster._queue.is_away()
    program(tmp_path, "squeue", "exit 1")
    cluster.submit([trial])
    assert json.loads((trial.folder / JOB).read_text()) == {"id": "8"}


def test_job_gets_the_gpus_of_a_flag_that_is_written_with_hyphens(tmp_path: Path):
    config, _, _ = compose(["model=llama8b", "backend=sim", "engine.args.tensor-parallel-size=4"])
    assert gpu_count(config) == 4


def test_job_that_no_study_has_noted_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A study that was killed before it noted the job asks for the trial again, under another number."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(clusters, "NOTED_S", 0.0)
    monkeypatch.setattr(worker, "run_job", lambda *_: "ran")
    spec = TrialSpec(Config(), [], tmp_path)
    (tmp_path / JOB).write_text('{"id": "6"}')
    assert "does not name job 7" in run_noted(spec)
    (tmp_path / JOB).write_text('{"id": "7"}')
    assert run_noted(spec) == "ran"


@pytest.mark.parametrize(
    ("left", "seconds"),
    [("4:00", 240), ("1:00:01", 3601), ("2-03:00:00", 183600), ("UNLIMITED", float("inf")), ("", 0)],
)
def test_time_left_of_a_job_is_what_squeue_says(
    left: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program(tmp_path, "squeue", f"echo {left}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert clusters.time_left_s("7") == seconds


def test_time_limits_are_read_as_slurm_reads_them():
    forms = {"90": 90, "90:30": 91, "1:30:00": 90, "2-12": 3600, "2-12:30": 3630, "2-00:00:00": 2880}
    assert {form: minutes(form) for form in forms} == forms


def test_memory_is_read_with_its_unit():
    forms = {"64": 64, "64G": 64, "64GB": 64, "512M": 0.5, "1.5T": 1536, "64 GiB": 64}
    assert {form: gigabytes(form) for form in forms} == forms


@pytest.mark.parametrize("wrong", ["two days", "", "-5", "1:2:3:4", "5x"])
def test_what_is_neither_is_named(wrong: str):
    with pytest.raises(InputError, match=r"launcher.parameters.timeout_min=.*: write minutes"):
        minutes(wrong)
    with pytest.raises(InputError, match=r"launcher.parameters.mem_gb=.*: write GB"):
        gigabytes(wrong)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "POLL_S", 0.01)
    monkeypatch.setattr(handing, "IDLE_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_job_gets_the_trial_that_is_handed_on_and_begins_it_again_when_it_is_restarted(tmp_path: Path):
    assert not has_ended(tmp_path, "7", "trial-1") and running(tmp_path, "7") == b""
    say_ended(tmp_path, "7", "trial-1", waits=True)
    assert waits_after(tmp_path, "7", "trial-1") and not has_ended(tmp_path, "7", "trial-2")
    assert hand_on(tmp_path, "7", b"trial 2") and next_for(tmp_path, "7") == b"trial 2"
    assert running(tmp_path, "7") == b"trial 2"
    assert hand_on(tmp_path, "7", b"trial 3") and next_for(tmp_path, "7") == b"trial 3"


@pytest.mark.usefixtures("impatient")
def test_job_that_has_given_up_is_handed_nothing(tmp_path: Path):
    assert next_for(tmp_path, "7") == b""
    assert not hand_on(tmp_path, "7", b"trial")


@pytest.mark.usefixtures("impatient")
def test_handing_on_and_giving_up_at_once_end_with_one_of_them(tmp_path: Path):
    with ThreadPoolExecutor(2) as pool:
        for number in range(40):
            waits = pool.submit(next_for, tmp_path, str(number))
            is_handed = hand_on(tmp_path, str(number), b"trial")
            assert waits.result() == (b"trial" if is_handed else b"")


def test_job_that_waits_gets_the_next_trial_unless_it_has_left_the_queue(cluster: Cluster, tmp_path: Path):
    cluster = Cluster(replace(CONFIG, poll_s=1e-6), None)
    trials, logs = (
        [TrialSpec(Config(), [], tmp_path / f"s/trial-{number}") for number in range(3)],
        tmp_path / "s" / LOGS,
    )
    for trial in trials:
        trial.folder.mkdir(parents=True)
    program(tmp_path, "sbatch", "echo Submitted batch job 7")
    program(tmp_path, "squeue", "echo '7|7_N/A|RUNNING|a|None'")
    cluster.submit(trials[:1])
    say_ended(logs, "7", "trial-0", waits=True)
    cluster.submit(trials[1:2])
    assert next_for(logs, "7")
    say_ended(logs, "7", "trial-1", waits=True)
    program(tmp_path, "sbatch", "echo Submitted batch job 8")
    program(tmp_path, "squeue", "true")
    cluster.submit(trials[2:])
    assert [json.loads((trial.folder / JOB).read_text())["id"] for trial in trials] == ["7", "7", "8"]


@pytest.mark.usefixtures("impatient")
def test_job_that_is_restarted_while_it_waits_does_not_run_its_last_trial_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ended = TrialSpec(Config(), [], tmp_path / "s/trial-0")
    ended.folder.mkdir(parents=True)
    (ended.folder / JOB).write_text('{"id": "7"}')
    say_ended(tmp_path / "s" / LOGS, "7", "trial-0", waits=True)
    assert clusters.run_noted(ended) == ""
    assert [file.name for file in ended.folder.iterdir()] == [JOB]


def test_handed_trial_is_readable_by_its_user_alone(tmp_path: Path):
    hand_on(tmp_path, "7", b"with a token")
    assert (tmp_path / "7.next").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["7.next"]
