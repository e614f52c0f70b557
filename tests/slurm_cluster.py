"""A real SLURM of one node with four GPUs that are none, for tests: everything lies in one folder.

Its daemons run in the foreground, each under a guard: they, and all jobs, end with the `with` block or with pytest.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import make_url

from autotune.system.process import GuardedProcess

GPUS = 4
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "slurmdbd"]

# cred_expire is also how long a requeued job waits before it starts again; less than 5 s counts as the default, 120.
# For MinJobAge seconds squeue can tell how a job ended.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=2
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=16 RealMemory=65536 Gres=gpu:{gpus}
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF Default=YES
PartitionName=requeue Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL
"""
# With these, SLURM keeps the end of each job in its accounting, where submitit asks for it.
ACCOUNTING_CONF = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database.port}
StorageUser={database.username}
StoragePass={database.password}
StorageLoc={database.database}
"""
GRES_CONF = """
AutoDetect=off
Name=gpu File={folder}/gpu[0-{last}]
"""


def program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")  # a user's PATH lacks the daemons' place


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if not program(name)]


@dataclass(frozen=True)
class Slurm:
    folder: Path  # logs, and the output of jobs: job-<id>.log

    @property
    def environment(self) -> dict[str, str]:
        """How SLURM's programs find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        env = {**os.environ, **self.environment}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> str:
        """A job of lines for the shell; returns its id."""
        return self.run("sbatch", "--parsable", "--output=job-%j.log", "--open-mode=append", *options, "--wrap", script)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, PREEMPTED, TIMEOUT…"""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def output(self, job: str) -> str:
        log = self.folder / f"job-{job}.log"
        return log.read_text().strip() if log.exists() else ""

    def cancel_all(self) -> None:
        """Leaves the cluster empty."""
        self.run("scancel", "--me")
        wait_for(lambda: not self.run("squeue", "--noheader", "--me"), "all jobs to end")


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)


@contextmanager
def slurm_cluster(folder: Path, database: str = "") -> Iterator[Slurm]:
    """With the URL of a MySQL server, it has accounting, in a database there."""
    configure(folder)
    if database:
        configure_accounting(folder, database)
    slurm = Slurm(folder)
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as stack:
        accounting = [["slurmdbd", "-D"]] if database else []
        for name, *arguments in munged, *accounting, ["slurmctld", "-D"], ["slurmd", "-D"]:
            command = [str(program(name)), *arguments]
            log = folder / f"{name}.log"
            stack.enter_context(GuardedProcess(command, log, slurm.environment, stop_timeout_s=2))
            wait_for((folder / "munge.socket").exists, f"munged, see {log}")
            if name == "slurmdbd":
                wait_for(lambda: has_accounting(slurm), f"slurmdbd, see {log}")
                slurm.run("sacctmgr", "--immediate", "add", "cluster", "test")
        wait_for(lambda: is_up(slurm), f"SLURM, see {folder}/*.log", timeout_s=90)
        yield slurm


def configure(folder: Path) -> None:
    for name in "state", "spool":
        (folder / name).mkdir()
    for gpu in range(GPUS):
        (folder / f"gpu{gpu}").symlink_to("/dev/null")  # slurmd wants a character device
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    user = pwd.getpwuid(os.getuid()).pw_name
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, user=user, gpus=GPUS, ports=free_ports(2)))
    (folder / "gres.conf").write_text(GRES_CONF.format(folder=folder, last=GPUS - 1))


def configure_accounting(folder: Path, database: str) -> None:
    (port,) = free_ports(1)
    user = pwd.getpwuid(os.getuid()).pw_name
    settings = SLURMDBD_CONF.format(folder=folder, user=user, port=port, database=make_url(database))
    (folder / "slurmdbd.conf").touch(mode=0o600)
    (folder / "slurmdbd.conf").write_text(settings)
    with (folder / "slurm.conf").open("a") as file:
        file.write(ACCOUNTING_CONF.format(folder=folder, port=port))


def has_accounting(slurm: Slurm) -> bool:
    try:
        return bool(slurm.run("sacctmgr", "--noheader", "list", "stats"))
    except AssertionError:  # slurmdbd does not answer yet
        return False


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def is_up(slurm: Slurm) -> bool:
    try:
        return slurm.run("sinfo", "--noheader", "--nodes=localhost", "--format=%T").split("\n")[0] == "idle"
    except AssertionError:  # slurmctld does not answer yet
        return False
