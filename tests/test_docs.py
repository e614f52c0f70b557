"""Every command that README.md, docs/ and datasets/ show is tried, or it is said here why no test machine can.

A page is a story: its commands run in order in one folder, with the files that it shows beside them.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autotune import commands as names
from autotune.commands import compare, export, plan, report, submission, verify
from autotune.config import command_line
from autotune.search import space
from tests.conftest import Main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "datasets/README.md", *sorted((ROOT / "docs").glob("*.md"))]

TUNE = "tune"
COMPOSED = (TUNE, "plan", "space")  # they take a whole configuration

# What no test starts here, by words of the command.
NOT_HERE = {
    "source": "sets up the reader's own shell",
    "mlflow": "MLflow's own; tests/test_mlflow_ui.py opens its pages",
    "optuna-dashboard": "a server for the browser",
    "hf": "needs the Hugging Face Hub",
    "lm_eval": "an extra, which asks a server",
    "autotune calibrate": "tests/test_sim.py fits and checks devices",
    "autotune log": "tests/test_tracking.py logs studies later",
    "backend/device=my-l40s": "a device that the command before it would have fitted",
}
# What composes here, and can't be run: a word of it, and why.
NOT_RUN = {
    "launcher=slurm": "needs a cluster; tests/test_slurm.py has one",
    "gpus=all": "needs a GPU",
    "backend.env": "an environment is real vLLM's",
    "tracking.uri=http": "needs a server",
    "autotune submission": "takes a real model; tests/test_submission.py",
    "rules=closed": "takes MLPerf's data set, and can't be shortened; tests/test_rules.py",
    "sampler=botorch": "an extra",
    "experiment=demo": "`make demo`: minutes of real vLLM",
    "backend.twin": "the steps lie in the repository; tests/test_twin.py reads them",
    "model=smollm2": "the page runs real vLLM on a CPU; tests/test_live.py does",
    "azure.csv": "a public trace, which the reader fetches",
    "pruner=": "needs trials that take a while",
    "sampler=twin": "asks for half a minute; tests/test_twin_sampler.py runs its studies",
}
SHORT = {
    "tracking": "none",
    "scenario.min_duration_s": "5",
    "scenario.min_queries": "64",
    "n_trials": "2",
    "prior.trials": "10",
}


@dataclass(frozen=True)
class Command:
    page: Path
    line: int
    words: list[str]

    @property
    def is_ours(self) -> bool:
        return self.words[0] == "autotune"

    @property
    def name(self) -> str:
        """`verify` of `autotune verify …`; `tune` where none is named."""
        return self.words[1] if self.words[1] in names.NAMES else TUNE

    @property
    def arguments(self) -> list[str]:
        return self.words[1:] if self.name == TUNE else self.words[2:]

    @property
    def sweeps(self) -> bool:
        return "-m" in self.arguments

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def commands(page: Path) -> list[Command]:
    """What follows `$` in the page's ```console blocks, continued lines joined, comments left out."""
    text = page.read_text()
    found = []
    for block in re.finditer(r"```console\n(.*?)```", text, re.DOTALL):
        first = text[: block.start(1)].count("\n") + 1
        joined = block[1].replace("\\\n", "  ")
        for number, line in enumerate(joined.splitlines()):
            if line.startswith("$ "):
                found.append(Command(page, first + number, shlex.split(line[2:], comments=True)))
    return found


def files(page: Path) -> dict[str, str]:
    """The files that a page shows: a block after a path in backticks."""
    shown = re.finditer(r"`([\w./-]+\.(?:yaml|jsonl?))`[^`]*```(?:yaml|json)\n(.*?)```", page.read_text(), re.DOTALL)
    return {block[1]: block[2] for block in shown}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


ALL = [command for page in PAGES for command in commands(page)]


def why_not(command: Command) -> str:
    """Why it can't be tried here; empty if it can."""
    line = " ".join(command.words)
    return next((why for words, why in NOT_HERE.items() if f" {words} " in f" {line} "), "")


OPTIONS: dict[str, Any] = {"export": export.Export, "report": report.Report, "submission": submission.Submission}


def runs(command: Command) -> bool:
    """Whether it is run here, simulated."""
    return command.is_ours and not why_not(command) and not any(word in " ".join(command.words) for word in NOT_RUN)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(page: Path, folder: Path) -> None:
    for name, text in files(page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("command", [command for command in ALL if not why_not(command) and not runs(command)], ids=str)
def test_command_is_one_that_exists(command: Command, folder: Path):
    """Each word of it is known: groups, fields, the space, options of a module, targets of make.

    The others run in `test_pages_commands_run_in_order`.
    """
    if command.words[0] == "make":
        assert re.search(rf"^{command.words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if not command.is_ours:
        pytest.fail(f"{command}: how is it tried? Say so here, or in NOT_HERE")
    write_files(command.page, folder)
    words = [word for word in command.arguments if word not in ("-m", "--help", "…")]
    if command.name in COMPOSED:
        config, params, sweeps = command_line.compose(words)
        if command.name != TUNE or command.sweeps:
            space.parse(params, sweeps, config.conditions, config.only_if)
    elif command.name == "verify":
        own = [word for word in words if word.partition("=")[0] in verify.Verify.__dataclass_fields__]
        command_line.options(verify.Verify, own)
        command_line.compose([word for word in words if word not in own])
    elif command.name == "compare":
        assert len([word for word in words if "=" not in word]) >= 2
        command_line.options(compare.Compare, [word for word in words if "=" in word])
    else:
        command_line.options(OPTIONS[command.name], words)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=page_id)
def test_pages_commands_run_in_order(page: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a simulated vLLM, and shortened: what a page calls by a name, an earlier command of it has made."""
    monkeypatch.setattr(plan, "MOST", 20)
    write_files(page, tmp_path)
    for command in commands(page):
        line = " ".join(command.words)
        if not runs(command):
            continue
        done = main(*named(command), *simulated(command))
        fine = (0, verify.NO_BETTER) if command.name == "verify" else (0,)
        assert done.returncode in fine, f"{command}: {line}\n{done.stderr}"


def named(command: Command) -> list[str]:
    return [] if command.name == TUNE else [command.name]


def simulated(command: Command) -> list[str]:
    """Its arguments, on the simulator and shortened; the data set that needs the Hub is one of the same lengths."""
    words = ["dataset=cnn_shaped" if word == "dataset=cnn_dailymail" else word for word in command.arguments]
    keys = {word.partition("=")[0] for word in command.arguments}
    if command.name == "verify":
        return [word if not word.startswith("n=") else "n=2" for word in words]
    if command.name not in COMPOSED:
        return words
    if "backend" not in keys:
        words.append("backend=sim")
    if command.name != TUNE:
        return words
    if "study" not in keys:
        words.append(f"study=line-{command.line}")  # its own name is the second in which it starts
    kept = [word for word in words if word.partition("=")[0] not in SHORT]
    short = {key: value for key, value in SHORT.items() if "scenario=trace" not in words or "scenario." not in key}
    return [*kept, *(f"{key}={value}" for key, value in short.items())]
