"""Whatever happens to a trial, nothing that it started is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from autotune.system.guard import SCRATCH
from autotune.system.process import Forked, ForkServer, GuardedProcess

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
# Starts a grandchild (in a session of its own, unless a third argument is given), writes both pids, then sleeps.
FAMILY = """
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=len(sys.argv) < 4)
open(sys.argv[1] + ".draft", "w").write(json.dumps([os.getpid(), child.pid]))
os.rename(sys.argv[1] + ".draft", sys.argv[1])
time.sleep(float(sys.argv[2]))
"""
PARENT = """
import sys, time
from pathlib import Path
from autotune.system.guard import SCRATCH
from autotune.system.process import ForkServer, GuardedProcess
with GuardedProcess(sys.argv[2:], Path(sys.argv[1]), {}, 1.0):
    time.sleep(60)
"""


def guarded(tmp_path: Path, *command: str, stop_timeout_s: float = 1.0) -> GuardedProcess:
    return GuardedProcess([sys.executable, "-c", *command], tmp_path / "log", {"MARK": "yes"}, stop_timeout_s)


def pids(file: Path) -> list[int]:
    for _ in range(200):
        if file.exists():
            return list(json.loads(file.read_text()))
        time.sleep(0.05)
    raise TimeoutError(file)


def gone(pids: list[int], timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(lives, pids))


def lives(pid: int) -> bool:
    """Whether `pid` runs; an orphan that has ended may be init's for some seconds before that notices."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_environment_reaches_the_command_and_both_streams_the_log(tmp_path: Path):
    said = "import os, sys; print(os.environ['MARK'], flush=True); print('err', file=sys.stderr)"
    with guarded(tmp_path, said) as process:
        assert process.wait(10) == 0
    assert (tmp_path / "log").read_text() == "yes\nerr\n"


def test_program_that_is_not_there_is_named(tmp_path: Path):
    with GuardedProcess(["/none/srun", "vllm"], tmp_path / "log", {}, stop_timeout_s=1) as process:
        assert process.wait(10) == 1
    assert (tmp_path / "log").read_text() == "/none/srun: No such file or directory\n"


@pytest.mark.parametrize(("command", "code"), [("exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_exit_code_or_signal_comes_through(tmp_path: Path, command: str, code: int):
    with guarded(tmp_path, command) as process:
        assert process.wait(10) == code


def test_command_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path):
    started = time.monotonic()
    with guarded(tmp_path, STUBBORN, stop_timeout_s=0.5):
        time.sleep(0.3)
    assert time.monotonic() - started < 5


def test_command_that_heeds_sigterm_has_time_to_tidy_up(tmp_path: Path):
    tidy = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(0.3), print('tidy'), sys.exit()))"
    with guarded(tmp_path, f"{tidy}; print('ready', flush=True); time.sleep(60)", stop_timeout_s=10) as process:
        while (tmp_path / "log").read_text() != "ready\n":
            assert process.wait(0.05) is None
    assert (tmp_path / "log").read_text() == "ready\ntidy\n"


def test_stopping_what_has_ended_changes_nothing(tmp_path: Path):
    process = guarded(tmp_path, "exit(7)")
    process.wait(10)
    for _ in range(2):
        process.stop()
    assert process.exit_code() == 7


@pytest.mark.parametrize("lives_s", ["60", "0"], ids=["stopped", "ended by itself"])
def test_grandchildren_in_sessions_of_their_own_end_too(tmp_path: Path, lives_s: str):
    with guarded(tmp_path, FAMILY, str(tmp_path / "pids"), lives_s) as process:
        family = pids(tmp_path / "pids")
        if lives_s == "0":
            process.wait(10)
            assert gone(family)
    assert gone(family)


@pytest.mark.parametrize(
    ("killed", "grandchild"),
    [
        *[(which, "leaves its session") for which in ([0], [1], [2], [0, 1], [0, 2])],
        *[(which, "stays") for which in ([1, 2], [0, 1, 2])],
    ],
)
def test_sigkill_of_the_parent_and_its_guards_leaves_nothing(tmp_path: Path, killed: list[int], grandchild: str):
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "pids"), "60", *["stays"] * (grandchild == "stays")]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log"), *command])
    started = pids(tmp_path / "pids")
    guard = psutil.Process(parent.pid).children()[0]
    above = [parent.pid, guard.pid, guard.children()[0].pid]
    for which in killed:
        os.kill(above[which], signal.SIGKILL)
    assert gone(started)
    parent.kill()
    parent.wait()
    assert gone(above)


def test_sigkill_of_the_parent_leaves_no_scratch_folder(tmp_path: Path):
    (scratch := tmp_path / "scratch").mkdir()
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "pids"), "60"]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log"), *command], env={**os.environ, SCRATCH: str(scratch)}
    )
    started = pids(tmp_path / "pids")
    assert scratch.exists()
    guard = psutil.Process(parent.pid).children()[0].pid
    parent.kill()
    parent.wait()
    assert gone([*started, guard]) and not scratch.exists()


def test_killed_guard_is_an_end_once_nothing_is_left(tmp_path: Path):
    with guarded(tmp_path, FAMILY, str(tmp_path / "pids"), "60") as process:
        family = pids(tmp_path / "pids")
        os.kill(process.session, signal.SIGKILL)
        assert process.wait(10) == 137
        assert not any(psutil.pid_exists(pid) for pid in family)


# Each fork runs the Python that it was sent.
FORKS = """
import sys
from autotune.system.guard import SCRATCH
from autotune.system.process import serve
requests = serve(int(sys.argv[1]), float(sys.argv[2]))
exec(requests.recv(10000))
"""
PARENT_OF_FORKS = """
import sys, time
from pathlib import Path
from autotune.system.guard import SCRATCH
from autotune.system.process import ForkServer
server = ForkServer([sys.executable, "-c", sys.argv[2]], Path(sys.argv[1]), 1.0)
fork = server.fork()
fork.send(sys.argv[3].encode())
time.sleep(60)
"""


def forks(folder: Path) -> ForkServer:
    return ForkServer([sys.executable, "-c", FORKS], folder / "forks.log", stop_timeout_s=1.0)


def forked(server: ForkServer, program: str) -> Forked:
    fork = server.fork()
    fork.send(program.encode())
    return fork


def family(file: Path) -> str:
    return f"import sys; sys.argv = ['', {str(file)!r}, '60']\n{FAMILY}"


def test_fork_ends_with_its_own_exit_code(tmp_path: Path):
    server = forks(tmp_path)
    codes = {"exit(7)": 7, "pass": 0, "import os; os.kill(os.getpid(), 9)": 137, "1 / 0": 1}
    running = {code: forked(server, program) for program, code in codes.items()}
    assert {code: fork.wait(20) for code, fork in running.items()} == {code: code for code in running}
    assert not any(fork.lost for fork in running.values())
    assert server.runs()


def test_forks_share_nothing_and_have_sessions_of_their_own(tmp_path: Path):
    server = forks(tmp_path)
    program = (
        f"import os; open({str(tmp_path)!r} + f'/{{os.getsid(0)}}', 'w').write(str('mark' in globals())); mark = 1"
    )
    for _ in range(2):
        assert forked(server, program).wait(20) == 0
    assert [path.read_text() for path in tmp_path.glob("[0-9]*")] == ["False", "False"]


def test_stopped_fork_takes_all_that_it_started_with_it_and_leaves_the_others(tmp_path: Path):
    server = forks(tmp_path)
    one, other = (forked(server, family(tmp_path / name)) for name in ("one", "other"))
    stopped, left = pids(tmp_path / "one"), pids(tmp_path / "other")
    one.stop()
    assert gone(stopped) and one.exit_code() is not None
    assert other.exit_code() is None and all(psutil.pid_exists(pid) for pid in left)
    other.stop()
    assert gone(left)


def test_fork_answers_while_it_runs_and_never_after_it_was_stopped(tmp_path: Path):
    server = forks(tmp_path)
    fork = forked(server, "import time; requests.send(b'done'); time.sleep(60)")
    assert fork.answer(20) == b"done" and fork.exit_code() is None
    fork.stop()
    assert fork.answer(0) == b"" and fork.exit_code() is not None


def test_sigkill_of_the_parent_leaves_no_fork(tmp_path: Path):
    words = [str(tmp_path / "log"), FORKS, family(tmp_path / "pids")]
    parent = subprocess.Popen([sys.executable, "-c", PARENT_OF_FORKS, *words])
    started = pids(tmp_path / "pids")
    parent.kill()
    parent.wait()
    assert gone(started)


def test_fork_of_a_server_that_is_gone_has_ended(tmp_path: Path):
    server = ForkServer([sys.executable, "-c", "import nothing"], tmp_path / "forks.log", stop_timeout_s=1.0)
    for _ in range(2):
        fork = forked(server, "pass")
        assert fork.wait(20) == 137 and fork.lost
        while server.runs():
            time.sleep(0.05)
    assert "No module named" in (tmp_path / "forks.log").read_text()
