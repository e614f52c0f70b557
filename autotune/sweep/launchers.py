"""Where trials run: what `launcher=` names. Each hands back a job at once."""

import json
import logging
import math
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import submitit
from hydra.utils import get_class

from autotune import progress, vllm_args
from autotune.errors import InputError
from autotune.leases import devices
from autotune.process import ForkServer
from autotune.result import Result
from autotune.schema import Config
from autotune.sweep import worker
from autotune.sweep.worker import Trial
from autotune.text import one_line
from autotune.trial import vllm_flags

log = logging.getLogger(__name__)

JOB = "job.json"  # in a trial's folder: the cluster's id of its job
LOGS = ".submitit"  # in a study's folder: what submitit writes
# SLURM's states of a job that never runs again.
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "REVOKED"),
}


class Job(Protocol):
    @property
    def node(self) -> str:
        """Where it runs, where that is known; empty on this machine."""

    def done(self) -> bool: ...

    def wait(self, timeout_s: float) -> None:
        """Return when it is done, or after `timeout_s`."""

    def cancel(self) -> None:
        """End it and all that it started; returns when that is so, or is under way on another machine."""

    def reason(self) -> str:
        """Why it left no result, in one line."""


class Launcher:
    """Runs trials, whose folders exist; as it stands, on this machine and no longer than this process."""

    n_jobs: int  # trials at a time

    def submit(self, trials: Sequence[Trial]) -> list[Job]:
        raise NotImplementedError

    def nodes(self) -> list[str]:
        """Nodes that are to show what they can before they get trials."""
        return []

    def set_aside(self, node: str) -> None:
        """Start nothing on `node` any more, unless there is no other."""

    def attach(self, folder: Path) -> Job | None:
        """The job that still runs the trial in `folder` for an earlier sweeping process, if there is one."""
        return None


def make_launcher(config: Config) -> Launcher:
    """What `launcher=` names. Raises InputError."""
    settings = {name: value for name, value in config.launcher.items() if name not in ("_target_", "name")}
    launcher: Launcher = get_class(config.launcher["_target_"])(config.gpus, **settings)
    return launcher


class Inline(Launcher):
    """One trial at a time, in this process."""

    n_jobs = 1

    def __init__(self, gpus: Any) -> None:
        pass

    def submit(self, trials: Sequence[Trial]) -> list[Job]:
        return [Thread(trial) for trial in trials]


class Thread:
    """A trial beside the sweep, which watches it."""

    node = ""

    def __init__(self, trial: Trial) -> None:
        self._folder = trial.folder
        self._why = ""
        self._thread = threading.Thread(target=self._run, args=(trial,))
        self._thread.start()

    def _run(self, trial: Trial) -> None:
        self._why = worker.run(trial)

    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def cancel(self) -> None:
        progress.stop(self._folder)
        self._thread.join()

    def reason(self) -> str:
        return self._why or "no result.json"


class LocalProcesses(Launcher):
    """Trials side by side, each in a process of its own that ends with this one; the trial leases its GPUs."""

    def __init__(self, gpus: Any, n_jobs: int | None = None) -> None:
        self.n_jobs = n_jobs or len(devices(gpus))
        self._server: ForkServer | None = None  # a process that has done the imports

    def submit(self, trials: Sequence[Trial]) -> list[Job]:
        return [LocalJob(trial, self._running_server(trial)) for trial in trials]

    def _running_server(self, trial: Trial) -> ForkServer:
        if self._server is None or not self._server.runs():
            backend = trial.config.backend["_target_"].rpartition(".")[0]
            command = [sys.executable, "-m", "autotune.sweep.worker", backend]
            self._server = ForkServer(command, trial.folder.parent / ".workers.log", stop_timeout_s=30)
        return self._server


class LocalJob:
    node = ""

    def __init__(self, trial: Trial, server: ForkServer) -> None:
        self._process = server.fork(pickle.dumps(trial))
        self._logs = (trial.folder / worker.LOG, server.log)

    def done(self) -> bool:
        return self._process.exit_code() is not None

    def wait(self, timeout_s: float) -> None:
        self._process.wait(timeout_s)

    def cancel(self) -> None:
        self._process.stop()

    def reason(self) -> str:
        texts = (log.read_text(errors="replace").strip() for log in self._logs if log.exists())
        last = next((text.splitlines()[-1] for text in texts if text), "no output")
        return f"the trial's process ended with {self._process.exit_code()}: {last}"


class Cluster(Launcher):
    """Trials as jobs of a cluster, through submitit: SLURM, or whatever it has an executor for.

    A job outlives this process; a study that is run again finds it by the id in its folder's job.json.
    """

    def __init__(
        self,
        gpus: Any,
        cluster: str,
        n_jobs: int,
        array: bool,
        canary: bool,
        poll_s: float,
        parameters: Mapping[str, Any],
    ) -> None:
        if gpus is not None:
            raise InputError(f"gpus={gpus}: on a cluster it is the cluster that gives out GPUs; leave gpus=null")
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise InputError("launcher=slurm: no sbatch here; start the study on a node that can submit jobs")
        self.n_jobs = n_jobs
        self._cluster = cluster
        self._array = array
        self._canary = canary
        self._parameters = {name: value for name, value in parameters.items() if value is not None}
        self._excluded: list[str] = []
        self._queue = Queue(poll_s)

    def submit(self, trials: Sequence[Trial]) -> list[Job]:
        alike: dict[tuple[int, str], list[Trial]] = {}
        for trial in trials:
            alike.setdefault((gpus_of(trial), trial.node), []).append(trial)
        jobs: dict[Path, Job] = {}
        for (gpus, node), group in alike.items():
            executor = self._executor(group[0].folder.parent, gpus, node)
            try:
                with executor.batch() if self._array and len(group) > 1 else nullcontext():
                    submitted = [executor.submit(worker.run_job, trial) for trial in group]
                ids = [job.job_id for job in submitted]
            except submitit.core.utils.FailedJobError as error:
                raise InputError(f"launcher: the cluster refuses the job: {one_line(error)}") from None
            for trial, job, job_id in zip(group, submitted, ids, strict=True):
                (trial.folder / JOB).write_text(json.dumps({"id": job_id}))
                jobs[trial.folder] = self._job(trial.folder, job)
        return [jobs[trial.folder] for trial in trials]

    def nodes(self) -> list[str]:
        return self._usable() if self._canary else []

    def _usable(self) -> list[str]:
        if self._cluster != "slurm":
            return []
        partition = self._parameters.get("slurm_partition")
        command = ["sinfo", "--Node", "--noheader", "--format=%N", *([f"--partition={partition}"] if partition else [])]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
        return [node for node in dict.fromkeys(found) if node not in self._excluded]

    def set_aside(self, node: str) -> None:
        if any(other != node for other in self._usable()):
            log.warning("%s gets no more trials", node)
            self._excluded.append(node)

    def attach(self, folder: Path) -> Job | None:
        if self._cluster != "slurm" or not (folder / JOB).exists():
            return None
        job_id = json.loads((folder / JOB).read_text())["id"]
        job = self._job(folder, submitit.SlurmJob(folder.parent / LOGS, job_id))
        return None if job.done() else job

    def _job(self, folder: Path, job: Any) -> "SlurmJob | ClusterJob":
        return SlurmJob(folder, job, self._queue) if self._cluster == "slurm" else ClusterJob(folder, job)

    def _executor(self, folder: Path, gpus: int, node: str) -> Any:
        logs = folder / LOGS
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)  # submitit pickles the trials there, secrets included
        executor = submitit.AutoExecutor(logs, cluster=self._cluster)
        parameters = {"gpus_per_node": gpus, **self._parameters}
        if node:
            parameters["slurm_nodelist"] = node
        elif self._excluded:
            parameters["slurm_exclude"] = ",".join(self._excluded)
        try:
            executor.update_parameters(**parameters)
        except (NameError, ValueError) as error:
            raise InputError(f"launcher.parameters: {one_line(error)}") from None
        return executor


def gpus_of(trial: Trial) -> int:
    return vllm_args.gpus(vllm_flags(trial.config))


class ClusterJob:
    """A job that submitit itself knows the state of."""

    def __init__(self, folder: Path, job: Any) -> None:
        self.folder = folder
        self.job = job

    @property
    def node(self) -> str:
        return ""

    def done(self) -> bool:
        return bool(self.job.done())

    def wait(self, timeout_s: float) -> None:
        time.sleep(timeout_s)

    def cancel(self) -> None:
        progress.stop(self.folder)
        self.job.cancel(check=False)

    def reason(self) -> str:
        return f"job {self.job.job_id} ended without a result; its log: {self.job.paths.stderr}"


class SlurmJob(ClusterJob):
    """A job whose end is told by its result, or else by SLURM's queue: that works without accounting, too."""

    def __init__(self, folder: Path, job: Any, queue: "Queue") -> None:
        super().__init__(folder, job)
        self._queue = queue
        queue.submitted(job.job_id)

    def done(self) -> bool:
        # A failed result may be that of a preempted run, and the job is about to start again.
        return completed(self.folder) or not self._queue.has(self.job.job_id)

    @property
    def node(self) -> str:
        return self._queue.node(self.job.job_id)

    def cancel(self) -> None:
        subprocess.run(["scancel", self.job.job_id], capture_output=True)

    def reason(self) -> str:
        show = ["scontrol", "show", "job", "-o", self.job.job_id]
        words = subprocess.run(show, capture_output=True, text=True).stdout.split()
        facts = dict(word.split("=", 1) for word in words if "=" in word)
        state = facts.get("JobState", "gone from SLURM's records")
        return f"SLURM job {self.job.job_id}: {state}; its log: {self.job.paths.stderr}"


class Queue:
    """What SLURM says of the jobs that are watched, asked at most every `poll_s` seconds for all of them."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._asked = -math.inf
        self._new: set[str] = set()  # submitted since squeue last answered
        self._queued: set[str] = set()
        self._nodes: dict[str, str] = {}

    def submitted(self, job_id: str) -> None:
        """It is queued until squeue answers, which it is asked to at the next question."""
        self._new.add(job_id)
        self._asked = -math.inf

    def has(self, job_id: str) -> bool:
        self._ask()
        return job_id in self._queued or job_id in self._new

    def node(self, job_id: str) -> str:
        return self._nodes.get(job_id, "")

    def _ask(self) -> None:
        if time.monotonic() - self._asked < self._poll_s:
            return
        self._asked = time.monotonic()
        # %F_%K names one job of an array; -r writes each on its own line.
        command = ["squeue", "--noheader", "--me", "-r", "-t", "all", "-o", "%A %F_%K %T %N"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log.warning("squeue failed, asked again in %g s: %s", self._poll_s, done.stderr.strip())
            return
        self._queued, self._new = set(), set()
        for line in done.stdout.splitlines():
            job_id, in_array, state, *node = line.split()
            names = {job_id, in_array}
            if node:
                self._nodes.update(dict.fromkeys(names, node[0]))
            if state not in ENDED:
                self._queued |= names


def completed(folder: Path) -> bool:
    result = Result.find(folder)
    return result is not None and result.complete
