"""A study on a shared server whose processes get SIGKILL again and again: is anything left, or lost?

    python benchmarks/hot_kills.py FOLDER [--kills 10] [--trials 50] [--seed 0] [--gpu 0] [WORDS …]

The study's process, the trial's or one of vLLM's is killed at a random moment; after the study's own death nothing of
it may run, hold a lease or, on a GPU, memory. Then the same command goes on, until all trials have ended.
"""

import argparse
import fcntl
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pynvml

from autotune.live.gpu import Gpus
from autotune.results.study import results_in

ENDS_S = 15.0  # for all that a killed study started to end
WORDS = ("model=tiny", "dataset=cnn_small", "engine.args.enforce_eager=true", "scenario=offline", "space=scheduler")
SHORT = ("scenario.min_queries=64", "scenario.min_duration_s=1", "sampler=random", "baseline=false", "tracking=none")
NAMED = {"trial": "autotune.sweep.worker", "server": "api_server"}  # what the processes have in their command
MARK = "AUTOTUNE_HOT_KILLS"  # variable of all that the study starts


def begun(folder: Path, mark: str, words: list[str]) -> "subprocess.Popen[bytes]":
    by_key = {word.partition("=")[0]: word for word in [*WORDS, *SHORT, "launcher=gpus", "study=s", *words]}
    command = [sys.executable, "-m", "autotune", "-m", *by_key.values()]
    env = {**os.environ, MARK: mark, "AUTOTUNE_LEASES": str(folder / "leases")}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True)


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def is_leased(folder: Path) -> bool:
    for file in (folder / "leases").glob("*.lock"):
        with file.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def used_mib(gpu: int) -> int:
    """Memory in use on the GPU; 0 without one."""
    gpus = Gpus(1, str(gpu))._handles
    return int(pynvml.nvmlDeviceGetMemoryInfo(gpus[0]).used) >> 20 if gpus else 0


def left(folder: Path, mark: str, gpu: int, before_mib: int) -> str:
    """What there still is ENDS_S after the death of the study."""
    deadline = time.monotonic() + ENDS_S
    while (processes := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    more = max(0, used_mib(gpu) - before_mib - 8)
    return f"{len(processes)} processes, {int(is_leased(folder))} leases, {more} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", type=int, default=0)
    given, words = parser.parse_known_args()
    words += [f"n_trials={given.trials}", f"gpus=[{given.gpu}]"]
    given.folder.mkdir(parents=True, exist_ok=True)
    draw, mark, before_mib = random.Random(given.seed), str(os.getpid()), used_mib(given.gpu)
    for number in range(given.kills):
        study = begun(given.folder, mark, words)
        ended = len(results_in(given.folder / "multirun/s"))
        # A few trials beyond those that have ended, so that a server is there that has been changed.
        wanted = min(given.trials, ended + draw.randint(1, max(1, given.trials // given.kills)))
        while study.poll() is None and len(results_in(given.folder / "multirun/s")) < wanted:
            time.sleep(0.5)
        time.sleep(draw.uniform(0, 3))
        which = draw.choice(["study", *NAMED])
        for process in marked(mark):
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if process.pid == study.pid if which == "study" else NAMED[which] in command:
                    process.kill()
        time.sleep(draw.uniform(0, 3))
        study.kill()
        study.wait()
        told = left(given.folder, mark, given.gpu, before_mib)
        print(f"kill {number} ({which}, {len(results_in(given.folder / 'multirun/s'))} trials): {told}", flush=True)
    code = begun(given.folder, mark, words).wait()
    results = results_in(given.folder / "multirun/s")
    complete = sum(result.complete for result in results.values())
    shared = sum(result.shared_server for result in results.values())
    print(f"the study ended with {code}: {complete} trials complete, {shared} of them on shared servers")
    tracebacks = (given.folder / "log").read_text().count("Traceback")
    print(f"left: {left(given.folder, mark, given.gpu, before_mib)}; tracebacks: {tracebacks}")


if __name__ == "__main__":
    main()
