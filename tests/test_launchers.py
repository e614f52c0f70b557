"""What the cluster launcher asks SLURM for; sinfo stands for a cluster of several nodes."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.config.command_line import compose
from autotune.config.schema import ClusterConfig, Config
from autotune.errors import InputError
from autotune.measure.prepare import gpu_count
from autotune.sweep import cluster as clusters
from autotune.sweep import worker
from autotune.sweep.cluster import JOB, Cluster, Queue, as_new_job, run_noted
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
    program(tmp_path, "squeue", "echo 7 7_N/A RUNNING node1; echo 8 8_N/A COMPLETED")
    assert queue.has("7") and queue.node("7") == "node1" and not queue.has("8")
    program(tmp_path, "squeue", "true")
    assert not queue.has("7")


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
