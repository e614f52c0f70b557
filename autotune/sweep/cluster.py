"""Trials as jobs of a cluster, through submitit: `launcher=slurm`."""

import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import submitit

from autotune.config.schema import ClusterConfig
from autotune.errors import InputError
from autotune.measure import progress
from autotune.measure.prepare import gpu_count
from autotune.measure.slot import Slot
from autotune.sweep import handing, worker
from autotune.sweep.launchers import Job, Launcher
from autotune.sweep.worker import TrialSpec
from autotune.system import interrupt
from autotune.system.files import left_in, write_whole
from autotune.text import one_line

log = logging.getLogger(__name__)

JOB = "job.json"  # in a trial's folder: the cluster's id of its job
NOTED_S = 60.0  # within which a study has written that file, and a shared file system shows it
SPARE = 2.0  # a job takes another trial if as much time is left as this multiple of its longest one
LOGS = ".submitit"  # in a study's folder: what submitit writes
# SLURM's states of a job that never runs again.
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "REVOKED"),
}
USUAL = ("None", "Priority", "Resources", "BeginTime", "Dependency")  # SLURM's reasons why a job waits


class Cluster(Launcher):
    """Trials as jobs of a cluster, through submitit: SLURM, or whatever it has an executor for.

    A job outlives this process; a study that is run again finds it by the id in its folder's job.json. A job whose
    server stays gets the next trial, too.
    """

    Config = ClusterConfig

    def __init__(self, config: ClusterConfig, gpus: Any) -> None:
        if gpus is not None:
            raise InputError(f"gpus={gpus}: on a cluster it is the cluster that gives out GPUs; leave gpus=null")
        if config.cluster == "slurm" and not shutil.which("sbatch"):
            raise InputError("launcher=slurm: no sbatch here; start the study on a node that can submit jobs")
        self._config, self.n_jobs = config, config.n_jobs
        self.shares = self._is_slurm = config.cluster == "slurm"
        self._parameters = {name: value for name, value in config.parameters.items() if value is not None}
        for name, number in (("timeout_min", minutes), ("mem_gb", gigabytes)):
            if isinstance(value := self._parameters.get(name), str):
                self._parameters[name] = number(value)
        self._asks_for_gpus = config.parameters.get("gpus_per_node", 0) is not None  # null leaves them to other options
        self._excluded: list[str] = []
        self._last: dict[str, tuple[int, Path]] = {}  # by job in the queue: its GPUs, and the last trial it was given
        self._queue = Queue(config.poll_s)
        with TemporaryDirectory() as folder:  # so that a mistake is known before anything starts
            self._executor(Path(folder), 1, "")

    def submit(self, trials: Sequence[TrialSpec]) -> list[Job]:
        alike: dict[tuple[int, str], list[TrialSpec]] = {}
        jobs: dict[Path, Job] = {}
        for trial in trials:
            if job := self._handed_on(trial):
                jobs[trial.folder] = job
            else:
                alike.setdefault((gpu_count(trial.config), trial.node), []).append(trial)
        for (gpus, node), group in alike.items():
            for together in [group] if self._config.array else [[trial] for trial in group]:
                for trial, job in zip(together, self._submitted(together, gpus, node), strict=True):
                    write_whole(trial.folder / JOB, json.dumps({"id": job.job_id}))
                    jobs[trial.folder] = self._job(trial.folder, job)
                    if self.shares:
                        self._last[job.job_id] = gpus, trial.folder
        return [jobs[trial.folder] for trial in trials]

    def _submitted(self, trials: Sequence[TrialSpec], gpus: int, node: str) -> list[Any]:
        """Submitit's jobs of `trials`, once SLURM answers, if it ever did. Raises InputError if it refuses twice."""
        main, refusals = run_noted if self._is_slurm else worker.run_job, 0
        while True:
            executor = self._executor(trials[0].folder.parent, gpus, node)
            try:
                with as_new_job(), executor.batch() if len(trials) > 1 else nullcontext():
                    jobs = [executor.submit(main, trial) for trial in trials]
                break
            except submitit.core.utils.FailedJobError as error:
                refusals += not self._queue.is_away()  # a busy one may have timed out
                if refusals > 1 or not self._queue.has_answered:
                    raise InputError(f"launcher: the cluster refuses the job: {one_line(str(error))}") from None
            interrupt.check()
            time.sleep(self._config.poll_s)
        for file in {file for job in jobs for file in (job.paths.submitted_pickle, job.paths.submission_file)}:
            if file.exists():  # an array has one script
                file.chmod(0o600)
        return jobs

    def _handed_on(self, trial: TrialSpec) -> Job | None:
        """The job that runs `trial` on the server of an earlier one; None if no job waits for such a trial."""
        self._last = {job_id: given for job_id, given in self._last.items() if self._queue.has(job_id)}
        for job_id, (gpus, last) in list(self._last.items()):
            waits = handing.waits_after(last.parent / LOGS, job_id, last.name)
            if not waits or gpus != gpu_count(trial.config) or trial.node or self._queue.node(job_id) in self._excluded:
                continue
            write_whole(trial.folder / JOB, json.dumps({"id": job_id}))
            if handing.hand_on(last.parent / LOGS, job_id, pickle.dumps(trial)):
                self._last[job_id] = gpus, trial.folder
                return self._job(trial.folder, submitit.SlurmJob(last.parent / LOGS, job_id))
            del self._last[job_id]  # it has given up
        return None

    def close(self) -> None:
        for job_id, (_, last) in self._last.items():
            if handing.waits_after(last.parent / LOGS, job_id, last.name):
                subprocess.run(["scancel", job_id], capture_output=True)

    def nodes(self) -> list[str]:
        return self._usable() if self._config.canary else []

    def _usable(self) -> list[str]:
        if not self._is_slurm:
            return []
        partition = self._parameters.get("slurm_partition")
        command = ["sinfo", "--Node", "--noheader", "--format=%N", *([f"--partition={partition}"] if partition else [])]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        except (OSError, subprocess.SubprocessError) as error:
            why = one_line(getattr(error, "stderr", "") or error)
            log.warning("no node gets a canary or is set aside, as sinfo failed: %s", why)
            return []
        return [node for node in dict.fromkeys(found) if node not in self._excluded]

    def set_aside(self, node: str) -> None:
        if any(other != node for other in self._usable()):
            log.warning("%s gets no more trials", node)
            self._excluded.append(node)

    def attach(self, folder: Path) -> Job | None:
        if not self._is_slurm or not (job_id := left_in(folder / JOB).get("id")):
            return None
        job = self._job(folder, submitit.SlurmJob(folder.parent / LOGS, job_id))
        return None if job.done() else job

    def _job(self, folder: Path, job: Any) -> "SlurmJob | ClusterJob":
        return SlurmJob(folder, job, self._queue) if self._is_slurm else ClusterJob(folder, job)

    def _executor(self, folder: Path, gpus: int, node: str) -> Any:
        logs = folder / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        logs.chmod(0o700)  # submitit pickles the trials there, secrets included
        try:
            executor = submitit.AutoExecutor(logs, cluster=self._config.cluster)
        except ValueError as error:
            raise InputError(f"launcher.cluster={self._config.cluster}: {one_line(error)}; write slurm") from None
        parameters = {**({"gpus_per_node": gpus} if self._asks_for_gpus else {}), **self._parameters}
        if node:
            parameters["slurm_nodelist"] = node
        elif self._excluded:
            parameters["slurm_exclude"] = ",".join(self._excluded)
        try:
            executor.update_parameters(**parameters)
        except (NameError, ValueError, TypeError, AssertionError) as error:
            why = one_line(error) or f"submitit does not take {self._parameters}"
            raise InputError(
                f"launcher.parameters: {why}; write timeout_min and mem_gb as numbers, other options by SLURM's names"
            ) from None
        return executor


def run_noted(one: TrialSpec) -> str:
    """Run a trial, and then those that its study hands on to this job while its server stays.

    The first only if its study has noted this job: one that was killed before it could asks for the trial again.
    """
    own, ends = submitit.JobEnvironment().job_id, time.monotonic() + NOTED_S
    while left_in(one.folder / JOB).get("id") != own:
        if time.monotonic() > ends:
            return f"{one.folder / JOB} does not name job {own}: the study that submitted it was killed"
        time.sleep(0.2)
    logs, longest_s = one.folder.parent / LOGS, 0.0
    if handed := handing.running(logs, own):
        one = pickle.loads(handed)
    if handing.has_ended(logs, own, one.folder.name):  # the cluster restarted this job while it waited for another
        if not (handing.waits_after(logs, own, one.folder.name) and (handed := handing.next_for(logs, own))):
            return ""
        one = pickle.loads(handed)
    with closing(Slot(shares=True)) as slot:
        while True:
            began = time.monotonic()
            reason = worker.run_job(one, slot)
            longest_s = max(longest_s, time.monotonic() - began)
            waits = slot.server is not None and time_left_s(own) > SPARE * longest_s
            handing.say_ended(logs, own, one.folder.name, waits)
            if not waits or not (handed := handing.next_for(logs, own)):
                return reason
            one = pickle.loads(handed)


def time_left_s(job: str) -> float:
    """Seconds until SLURM ends `job`; 0 if it does not say."""
    left = subprocess.run(["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True).stdout.strip()
    return math.inf if left == "UNLIMITED" else seconds(left) or 0.0


def minutes(limit: str) -> int:
    """SLURM's time `limit` in minutes. Raises InputError."""
    if (found := seconds(limit.strip())) is None:
        raise InputError(f"launcher.parameters.timeout_min={limit}: write minutes, or days-hours:minutes:seconds")
    return math.ceil(found / 60)


def seconds(text: str) -> int | None:
    """SLURM's forms of a time (`90`, `90:00`, `1:30:00`, `2-12`, `2-12:00:00`) in seconds; None for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        return None
    days, *parts = (int(part) if part else None for part in found.groups())
    given = [part for part in parts if part is not None]
    # Without days, the last of two parts and of three is seconds, and a single one is minutes.
    hours, mins, secs = (*given, 0, 0)[:3] if days is not None or len(given) == 3 else (0, *given, 0)[:3]
    return ((24 * (days or 0) + hours) * 60 + mins) * 60 + secs


def gigabytes(memory: str) -> float:
    """`64`, `64G`, `64GB`, `512M`, `1T` in GB. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", memory.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"launcher.parameters.mem_gb={memory}: write GB, such as 64")
    return float(found[1]) * 1024.0 ** ("KMGT".index(found[2].upper() or "G") - 2)


@contextmanager
def as_new_job() -> Iterator[None]:
    """Hide the job that this process runs in, if any, from those that it submits; SLURM_CONF is the cluster's."""
    conf = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield


class ClusterJob:
    """A job that submitit itself knows the state of."""

    lost = False

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
        # Not by its result: the job says a moment later that it has ended, and whether it waits for another trial; and
        # a failed result may be that of a preempted run, whose job is about to start again.
        logs, job_id = self.folder.parent / LOGS, self.job.job_id
        return handing.has_ended(logs, job_id, self.folder.name) or not self._queue.has(job_id)

    @property
    def node(self) -> str:
        return self._queue.node(self.job.job_id)

    def cancel(self) -> None:
        done = subprocess.run(["scancel", self.job.job_id], capture_output=True, text=True)
        if done.returncode:
            log.warning("SLURM job %s may go on, scancel failed: %s", self.job.job_id, one_line(done.stderr))

    def reason(self) -> str:
        show = ["scontrol", "show", "job", "-o", self.job.job_id]
        words = subprocess.run(show, capture_output=True, text=True).stdout.split()
        facts = dict(word.split("=", 1) for word in words if "=" in word)
        state = facts.get("JobState", "gone from SLURM's records")
        return f"SLURM job {self.job.job_id}: {state}; its log: {self.job.paths.stderr}"


class Queue:
    """SLURM's queue, asked about all watched jobs at once, at most every `poll_s` seconds."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._asked = -math.inf
        self._new: set[str] = set()  # submitted since squeue last answered
        self._queued: set[str] = set()
        self._nodes: dict[str, str] = {}
        self.has_answered = self._is_away = False  # ever; when it was asked last
        self._ours: set[str] = set()  # all that were submitted
        self._told = {*USUAL}

    def submitted(self, job_id: str) -> None:
        """It is queued until squeue answers, which it is asked to at the next question."""
        self._new.add(job_id)
        self._ours.add(job_id)
        self._asked = -math.inf

    def has(self, job_id: str) -> bool:
        self._ask()
        return job_id in self._queued or job_id in self._new

    def is_away(self) -> bool:
        """True if squeue does not answer."""
        self._asked = -math.inf
        self._ask()
        return self._is_away

    def node(self, job_id: str) -> str:
        return self._nodes.get(job_id, "")

    def _ask(self) -> None:
        if time.monotonic() - self._asked < self._poll_s:
            return
        self._asked = time.monotonic()
        # %F_%K names one job of an array; -r writes each on its own line.
        command = ["squeue", "--noheader", "--me", "-r", "-t", "all", "-o", "%A|%F_%K|%T|%N|%r"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if not self._is_away:
                log.warning("squeue failed, asked again every %g s: %s", self._poll_s, done.stderr.strip())
            self._is_away = True
            return
        self.has_answered, self._is_away = True, False
        self._queued, self._new = set(), set()
        for line in done.stdout.splitlines():
            job_id, in_array, state, node, why = line.split("|", 4)
            names = {job_id, in_array}
            if node:
                self._nodes.update(dict.fromkeys(names, node))
            if state not in ENDED:
                self._queued |= names
            if state == "PENDING" and names & self._ours and why not in self._told:
                self._told.add(why)
                log.warning("SLURM job %s waits: %s", job_id, why)
