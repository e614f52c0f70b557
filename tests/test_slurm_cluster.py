"""The cluster that other tests submit to behaves as a real one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm_cluster import GPUS, Slurm, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.services]

# A cluster with one running job; says so and waits to be killed.
DOOMED = """
import sys, time
from pathlib import Path
from tests.slurm_cluster import slurm_cluster, wait_for
with slurm_cluster(Path(sys.argv[1])) as slurm:
    job = slurm.submit("trap '' TERM; echo up; sleep 60")
    wait_for(lambda: slurm.output(job) == "up", "the job")
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def empty(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.cancel_all()


def test_a_job_sees_the_gpus_that_it_asked_for(slurm: Slurm):
    job = slurm.submit("srun printenv CUDA_VISIBLE_DEVICES SLURM_JOB_GPUS", "--gpus-per-node=2")
    wait_for(lambda: slurm.state(job) == "COMPLETED", "the job")
    assert slurm.output(job).split() == ["0,1", "0,1"]


def test_each_job_has_a_gpu_of_its_own_and_one_too_many_waits(slurm: Slurm):
    jobs = [slurm.submit("echo $CUDA_VISIBLE_DEVICES; sleep 60", "--gres=gpu:1") for _ in range(GPUS + 1)]
    wait_for(lambda: all(slurm.output(job) for job in jobs[:-1]), "four jobs")
    assert sorted(slurm.output(job) for job in jobs[:-1]) == ["0", "1", "2", "3"]
    assert slurm.state(jobs[-1]) == "PENDING"

    slurm.run("scancel", jobs[2])
    wait_for(lambda: slurm.output(jobs[-1]) == "2", "the fifth job")
    assert slurm.state(jobs[2]) == "CANCELLED"


def test_scancel_ends_a_job_that_does_not_want_to(slurm: Slurm):
    job = slurm.submit("trap '' TERM; echo $$; while true; do sleep 1; done")
    wait_for(lambda: slurm.output(job) != "", "the job")
    pid = int(slurm.output(job))
    slurm.run("scancel", job)
    wait_for(lambda: slurm.state(job) == "CANCELLED", "its end")
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("partition", ["requeue", "cancel"])
def test_a_job_of_higher_priority_preempts(slurm: Slurm, partition: str):
    job = slurm.submit("echo run $SLURM_RESTART_COUNT; sleep 60", f"--gres=gpu:{GPUS}", f"--partition={partition}")
    wait_for(lambda: slurm.output(job) == "run", "the first run")
    urgent = slurm.submit("true", "--gres=gpu:1", "--partition=high")
    wait_for(lambda: slurm.state(urgent) == "COMPLETED", "the urgent job")
    if partition == "requeue":
        wait_for(lambda: "run 1" in slurm.output(job), "the second run")
    else:
        assert slurm.state(job) == "PREEMPTED"


def test_nothing_is_left_when_its_owner_is_killed(tmp_path: Path):
    owner = subprocess.Popen([sys.executable, "-c", DOOMED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path.cwd())
    assert owner.stdout and owner.stdout.readline() == b"up\n"
    assert len(processes_of(tmp_path)) > 6  # three guards, three daemons, the job
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    wait_for(lambda: not processes_of(tmp_path), "all processes to end", timeout_s=10)


def processes_of(cluster: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("SLURM_CONF") == str(cluster / "slurm.conf"):
            found.append(process)
    return found
