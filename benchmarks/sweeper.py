"""What the sweep itself costs, and what it survives; the trials sleep instead of measuring.

    python benchmarks/sweeper.py busy    8 workers, 200 trials of log-normal length: how busy they are kept,
                                         beside hydra-optuna-sweeper with submitit's local launcher on the same trials
    python benchmarks/sweeper.py cost    the sweep's own time for a trial as a study grows to 1,000, and its memory
    python benchmarks/sweeper.py kills   100 studies that get a random signal (SIGKILL, SIGTERM, SIGINT; the process,
                                         its group, its fork server) and go on after it: --launcher gpus|inline|slurm

Each prints what it found and exits with 1 if a target is missed.
"""

import argparse
import contextlib
import heapq
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
from optuna.trial import TrialState

from autotune.sweep.cluster import NOTED_S
from autotune.sweep.launchers import Inline, Job
from autotune.sweep.worker import TrialSpec, run
from autotune.system import leases

ROOT = Path(__file__).parent.parent
KEY = "engine.args.max_num_seqs"


class Done:
    """A job that has ended."""

    node, lost = "", False

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        """It is done."""

    def cancel(self) -> None:
        """Nothing runs."""

    def reason(self) -> str:
        return "no result.json"


@dataclass(frozen=True)
class Clock:
    """Of the sweep's process, s."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Clock":
        return cls(time.monotonic(), time.process_time())


class Instant(Inline):
    """A launcher whose trials are done when they are submitted; `cost.csv` has the sweep's own time between them, s."""

    ended: Clock | None = None

    def submit(self, trials: Sequence[TrialSpec]) -> list[Job]:
        for trial in trials:
            if self.ended:
                now = Clock.now()
                with (trial.folder.parent / "cost.csv").open("a") as file:
                    file.write(f"{now.wall - self.ended.wall},{now.cpu - self.ended.cpu}\n")
            run(trial)
            self.ended = Clock.now()
        return [Done() for _ in trials]


def command(*arguments: str) -> list[str]:
    common = ["model=llama8b", "dataset=cnn_small", "space=none", "scenario=offline", "backend=sim", "tracking=none"]
    place = ["backend._target_=benchmarks.sleeper.Sleeper", "study=s", "baseline=false"]
    return [sys.executable, "-m", "autotune", "-m", *common, *place, *arguments]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "AUTOTUNE_LEASES": str(folder / "leases")}


def sweep(folder: Path, *arguments: str) -> float:
    """Seconds that the study took."""
    began = time.monotonic()
    subprocess.run(command(*arguments), cwd=folder, env=environment(folder), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


@dataclass(frozen=True)
class Slept:
    """When a trial's work began and ended, and on which worker."""

    began: float
    ended: float
    worker: str


def slept(folder: Path) -> list[Slept]:
    found = []
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        figures, facts = result["metrics"], result["facts"]
        found.append(Slept(figures["slept_from"], figures["slept_to"], facts.get("leased_gpus", "")))
    return sorted(found, key=lambda one: one.began)


def share(trials: Sequence[Slept], workers: int, until: float) -> float:
    """Share of the workers' time, from the first trial's start to `until`, in which they worked."""
    worked = sum(max(0.0, min(one.ended, until) - one.began) for one in trials)
    return worked / workers / (until - trials[0].began)


def possible(trials: Sequence[Slept], workers: int) -> float:
    """The share up to the last end if a worker that is free had its next trial at once: in the end some have none."""
    free = [0.0] * workers
    for one in trials:
        heapq.heapreplace(free, free[0] + one.ended - one.began)
    return sum(one.ended - one.began for one in trials) / workers / max(free)


def gaps(trials: Sequence[Slept]) -> list[float]:
    """Seconds between two trials of one worker, where it is known."""
    by_worker: dict[str, list[Slept]] = {}
    for one in trials:
        by_worker.setdefault(one.worker, []).append(one)
    of_one = (pairs for worker, pairs in by_worker.items() if worker)
    return [after.began - before.ended for pairs in of_one for before, after in itertools.pairwise(pairs)]


def busy(workers: int, trials: int, median_s: float, upstream: bool) -> bool:
    """How busy workers are while there is a trial for each, and up to the last one's end."""
    common = [f"n_trials={trials}", "sampler=tpe", f"{KEY}=range(1,1000)", f"backend.pace={median_s}"]
    arms = {
        "autotune": ["launcher=gpus", f"gpus={list(range(workers))}".replace(" ", ""), "duplicates=measure"],
        "hydra-optuna-sweeper": [
            "hydra/sweeper=optuna",
            "hydra/launcher=submitit_local",
            f"hydra.sweeper.n_jobs={workers}",
        ],
    }
    if not upstream:
        del arms["hydra-optuna-sweeper"]
    shares = {}
    for name, arguments in arms.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            took_s = sweep(folder, *common, *arguments)
            ran = slept(folder)
        end = max(one.ended for one in ran)
        shares[name] = share(ran, workers, ran[-1].began)
        print(f"{name:22} {len(ran)} trials in {took_s:.0f} s; workers busy {shares[name]:.1%} until the last start,")
        print(f"{'':22} {share(ran, workers, end):.1%} until the last end ({possible(ran, workers):.1%} is possible)")
        if between := gaps(ran):
            print(f"{'':22} {statistics.median(between):.2f} s between two trials of a worker (median)", flush=True)
    return shares["autotune"] >= 0.95


def cost(trials: int) -> bool:
    """Milliseconds of the sweep for a trial, on the clock and of CPU time, and its memory, by hundreds of trials."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arguments = [f"n_trials={trials}", f"{KEY}=range(1,100000)", "engine.args.block_size=choice(16,32)"]
        instant = ["launcher._target_=benchmarks.sweeper.Instant", "backend.pace=0", "duplicates=measure"]
        study = subprocess.Popen(
            command(*arguments, *instant), cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL
        )
        process, memory = psutil.Process(study.pid), {}
        while study.poll() is None:
            done = len(list((folder / "multirun/s").glob("trial-*/result.json")))
            try:
                memory[done // 100 * 100] = process.memory_info().rss / 1e6
            except psutil.NoSuchProcess:
                break
            time.sleep(0.2)
        lines = (folder / "multirun/s/cost.csv").read_text().splitlines()
    own = [tuple(1e3 * float(seconds) for seconds in line.split(",")) for line in lines]
    for first in range(0, len(own), 100):
        wall_ms, cpu_ms = (statistics.mean(column) for column in zip(*own[first : first + 100], strict=True))
        print(f"trials {first:4}…: {wall_ms:5.1f} ms a trial, {cpu_ms:5.1f} of CPU time, {memory.get(first, 0):.0f} MB")
    settled = trials // 5
    later = [megabytes for done, megabytes in sorted(memory.items()) if settled <= done < trials]
    print(f"memory grew by {later[-1] - later[0]:.0f} MB from trial {settled} to the last; then the report is written")
    return wall_ms <= 50


# What gets the signal: the study, its process group, or one of the processes that fork its trials and their guards.
TARGETS = {"study": 4, "group": 2, "fork server": 3}  # and how often of nine times
PLACES = {
    "inline": ["launcher=inline"],
    "gpus": ["launcher=gpus", "gpus=[0,1,2]"],
    "slurm": ["launcher=slurm", "launcher.n_jobs=3", "launcher.poll_s=1", "launcher.parameters.cpus_per_task=1"],
}


def forked(folder: Path, arguments: Sequence[str]) -> int:
    """The pid of a study that runs in a copy of this process, which has done the imports, in a session of its own.

    Its report is an empty file.
    """
    import autotune.commands.tune
    from autotune.__main__ import main as autotune
    from autotune.sweep.study import Sweep

    pid = os.fork()
    if pid == 0:
        Sweep._write_report = lambda sweep, study: (study.folder / "report.html").touch()
        os.setsid()
        os.environ.update(environment(folder))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        os.chdir(folder)
        leases.FOLDER = folder / "leases"
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["autotune", *command(*arguments)[3:]]
        try:
            autotune()
        except SystemExit as end:
            print(end)
        except BaseException:
            traceback.print_exc()
        finally:  # and not through the callers' `finally`
            sys.stdout.flush()
            os._exit(0)
    return pid


def ended(pid: int) -> bool:
    """Whether the study `pid` has ended; it is still to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def fork_server(study: int) -> list[int]:
    """The processes that fork a study's trials: the two guards and what they guard."""
    found: list[int] = []
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        process = psutil.Process(study)
        for _ in range(3):
            process = process.children()[0]
            found.append(process.pid)
    return found


def complete(folder: Path) -> dict[str, float]:
    """When each trial of study s began that has a complete result, by the trial's name."""
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("multirun/s/trial-*/result.json")}
    return {name: body["started_at"] for name, body in results.items() if body["state"] == "complete"}


def interrupted(folder: Path, arguments: Sequence[str], draw: random.Random, trials: int) -> str:
    """Start a study, send it a signal at a random moment, wait for its end; returns what it got and when."""
    study, count, pause_s = forked(folder, arguments), draw.randrange(trials), draw.uniform(0, 0.4)
    while len(complete(folder)) < count and not ended(study):
        time.sleep(0.02)
    time.sleep(pause_s)
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    (target,) = draw.choices(list(TARGETS), list(TARGETS.values()))
    with contextlib.suppress(ProcessLookupError):
        if target == "group":
            os.killpg(study, number)
        else:
            pids = (target == "fork server" and fork_server(study)) or [study]
            os.kill(draw.choice(pids), number)
    os.waitpid(study, 0)
    return f"{number.name} to the {target} {pause_s:.1f} s after trial {count}"


def left_in(folder: Path, seconds: float) -> bool:
    """Whether a process that was started below `folder` still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while any(str(p.info["cwd"] or "").startswith(str(folder)) for p in psutil.process_iter(["cwd"])):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False


def kills(trials: int, rounds: int, launcher: str, seed: int) -> bool:
    """Whether studies that get a signal each, and go on afterwards, end with each point run once, and nothing lost."""
    draw, bad = random.Random(seed), 0
    arguments = ["sampler=grid", f"{KEY}=range(1,{trials + 1})", "backend.pace=0.1", *PLACES[launcher]]
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            what = interrupted(folder, arguments, draw, trials)
            before = complete(folder)
            os.waitpid(forked(folder, arguments), 0)
            if not (folder / "multirun/s/study.db").exists():
                sys.exit((folder / "log").read_text())
            kept = optuna.load_study(study_name="s", storage=f"sqlite:///{folder}/multirun/s/study.db").trials
            # A job that was submitted, but not noted, by a study that was killed ends by itself, without measuring.
            left = left_in(folder, NOTED_S + 10 if launcher == "slurm" else 10)
            points = [trial.params[KEY] for trial in kept if trial.state is TrialState.COMPLETE]
            log = (folder / "log").read_text()
            wrong = {
                "points that did not complete exactly once": sorted(points) != list(range(1, trials + 1)),
                "completed trials that were lost or run again": not before.items() <= complete(folder).items(),
                "processes left": left,
                "a traceback": "Traceback" in log,
                "no report": not (folder / "multirun/s/report.html").exists(),
            }
            found = [what for what, is_so in wrong.items() if is_so]
            if found:
                bad += 1
                shutil.copytree(
                    folder, tempfile.mkdtemp(prefix=f"kills-{launcher}-{seed}-{number}-"), dirs_exist_ok=True
                )
        print(f"round {number}: {what}, {len(before)} complete: {found or 'clean'}", flush=True)
    print(f"launcher={launcher}: {rounds - bad} of {rounds} rounds are clean")
    return not bad


def slurm_answers() -> bool:
    return bool(shutil.which("sinfo")) and not subprocess.run(["sinfo"], capture_output=True).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["busy", "cost", "kills"])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int)
    parser.add_argument(
        "--median-s", type=float, default=6.0, help="of a trial's length (busy): real ones take minutes"
    )
    parser.add_argument("--alone", action="store_true", help="without hydra-optuna-sweeper (busy)")
    parser.add_argument("--rounds", type=int, default=100, help="of kills")
    parser.add_argument("--launcher", choices=list(PLACES), default="gpus", help="of kills")
    parser.add_argument("--seed", type=int, default=0, help="of kills")
    options = parser.parse_args()
    if options.what == "busy":
        met = busy(options.workers, options.trials or 200, options.median_s, not options.alone)
    elif options.what == "cost":
        met = cost(options.trials or 1000)
    else:
        if options.launcher == "slurm" and not slurm_answers():
            sys.exit("kills --launcher slurm: no SLURM answers `sinfo` here; start one, or write another launcher")
        met = kills(options.trials or 12, options.rounds, options.launcher, options.seed)
    sys.exit(not met)


if __name__ == "__main__":
    main()
