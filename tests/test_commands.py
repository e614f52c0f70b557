"""`autotune <command>`: what is asked for runs, and what is mistyped is told in one line."""

import os
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from autotune import __version__, commands
from autotune.__main__ import UNREAD
from autotune.commands import NAMES, mistake, tune, usage
from autotune.config import CONF
from autotune.config.command_line import compose, errors_in_one_line
from autotune.errors import InputError
from autotune.measure import progress
from autotune.system.threads import beside

ALL = f"the commands are {', '.join(NAMES)}"
QUICK = [*sorted(set(NAMES) - set(commands.PARSED))]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-X", "importtime", "-m", "autotune", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def imported(done: "subprocess.CompletedProcess[str]") -> set[str]:
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def own_words(done: "subprocess.CompletedProcess[str]") -> str:
    return "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("import time:"))


@pytest.mark.parametrize("name", NAMES)
def test_command_has_a_main_and_a_line_in_the_help(name: str):
    assert callable(import_module(f"autotune.commands.{name}").main)
    help_text = (CONF / "config.yaml").read_text()
    assert f"\n      {name}: " in help_text


def test_every_module_of_the_room_is_a_command_or_has_a_reason_not_to_be():
    found = {path.stem for path in Path(commands.__file__).parent.glob("*.py")}
    assert found - {"__init__", "tune", "tracking"} == set(NAMES)


@pytest.mark.parametrize("name", QUICK)
def test_help_is_the_docstring_that_the_command_itself_shows(name: str):
    shown = usage(name, ["--help"])
    assert shown and shown.strip() == (import_module(f"autotune.commands.{name}").__doc__ or "").strip()
    assert f"autotune {name}" in shown
    assert usage(name, ["study=x"]) is None


def test_help_of_a_command_imports_nothing_of_it():
    done = run("export", "--help")
    assert done.returncode == 0 and "autotune export study=demo" in done.stdout
    assert not {"hydra", "omegaconf", "optuna", "mlflow"} & imported(done)


def test_help_ends_quietly_when_nobody_reads_it():
    command = [sys.executable, "-m", "autotune", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == UNREAD


@pytest.mark.parametrize(
    ("into", "code", "said"),
    [("> /dev/full", 1, "autotune: No space left on device\n"), (">&-", 0, ""), ("<&-", 0, "")],
)
def test_closed_or_full_output_is_no_riddle(into: str, code: int, said: str):
    done = subprocess.run(
        f"{sys.executable} -m autotune plan --help {into}", shell=True, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_machine_that_takes_no_more_threads_is_no_riddle():
    before = threading.stack_size(1 << 46)  # more than there is
    try:
        said = pytest.raises(SystemExit, match=r"^autotune: can't start new thread: raise the limit on processes")
        with said, errors_in_one_line(), beside(lambda _: None):
            pass
    finally:
        threading.stack_size(before)


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"autotune {__version__}\n")


def test_mistyped_command_is_one_line_and_at_once():
    done = run("pln", "model=tiny")
    assert done.returncode == 1
    assert own_words(done) == f"autotune: 'pln' is no command and no key=value; did you mean plan; {ALL}\n"
    assert not {"hydra", "omegaconf"} & imported(done)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["xyzzy"], f"'xyzzy' is no command and no key=value; {ALL}"),
        (["model=tiny", "verify"], f"'verify' is no command and no key=value; a command comes first; {ALL}"),
        (["-m", "exprot"], f"'exprot' is no command and no key=value; did you mean export; {ALL}"),
        (["space=[scheduler,", "memory]"], f"'memory]' is no command and no key=value; {ALL}"),
        (["-m", "model=tiny", "~prior", "+x=1"], None),
        (["--config-dir", "mine", "-cn", "config", "--cfg", "job", "--info", "searchpath"], None),
        ([], None),
    ],
)
def test_word_that_is_nothing(words: list[str], said: str | None):
    assert mistake(words) == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=tiny", "tiny"], "'tiny': write key=value, or --help"),
        (["-m", "model=tiny"], "'-m': write key=value, or --help"),
        (["model=tiny", "--config-dir"], "--config-dir: write --config-dir FOLDER"),
    ],
)
def test_composing_command_refuses_what_is_no_override(words: list[str], said: str):
    with pytest.raises(InputError, match="^" + said.replace("-", r"\-") + "$"):
        compose(words)


@pytest.mark.parametrize("written", [["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]])
def test_own_groups_are_found(written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine/scenario").mkdir(parents=True)
    (tmp_path / "mine/scenario/busy.yaml").write_text("defaults: [server]\nqps: 77\n")
    monkeypatch.chdir(tmp_path)
    config, _, _ = compose([*written, "model=llama8b", "scenario=busy"])
    assert config.scenario.qps == 77


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare", "export", "verify", "report", "plan", "space"])
def test_command_is_a_module_too(name: str):
    done = subprocess.run([sys.executable, "-m", f"autotune.{name}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"autotune {name}" in done.stdout


@pytest.mark.slow
def test_command_that_is_a_module_hides_secrets_too():
    words = [sys.executable, "-m", "autotune.export", "format=command", "study=abc123secret9"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "MY_TOKEN": "abc123secret9"})
    assert done.returncode == 1 and "study=***: no such folder" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["autotune.tracking", "autotune.sim.calibrate"])
def test_earlier_names_still_work(module: str):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout


def test_single_trial_tells_its_runs_and_what_they_have_served(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    with tune.progress_told(tmp_path):
        progress.phase(tmp_path, "start")
        progress.phase(tmp_path, "probe 28.3 queries/s")
        rates = {"tokens_per_s": 900.0, "samples_per_s": 12.0, "goodput_per_s": 11.0}
        for step in range(3):  # one in ten seconds
            progress.publish(tmp_path, step, rates | {"completed": 24 + step, "over_limit": 2})
        progress.publish(tmp_path, 3, {progress.FAILING: 28.3})
        time.sleep(0.7)
    assert [line.strip() for line in caplog.messages] == [
        "probe 28.3 queries/s",
        "24 requests served, 2 of them over a limit; 12 requests/s, 900 tokens/s",
        "it breaks a limit",
    ]
