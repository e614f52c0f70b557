"""autotune as a process: a trial, a study and an error from end to end; all else is tested in this process."""

from pathlib import Path

from autotune.measure.result import Result
from tests.conftest import Autotune
from tests.studies import SEQS, SIMULATED

QUIET = [*SIMULATED, "study=s", "tracking=none"]


def test_trial_leaves_its_result(autotune: Autotune, tmp_path: Path):
    done = autotune(*QUIET, f"{SEQS}=8")
    assert done.returncode == 0, done.stderr
    result = Result.load(tmp_path / "multirun/trials/s")
    assert result.complete and result.args["max_num_seqs"] == 8
    assert "Everything measured: " in done.stdout


def test_study_leaves_its_trials_summary_and_report(autotune: Autotune, tmp_path: Path):
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # the report has other letters
    done = autotune("-m", *QUIET, "sampler=grid", f"{SEQS}=choice(4,8)", **ascii_only)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "multirun/s"
    assert all(Result.load(folder / name).complete for name in ("baseline", "trial-0", "trial-1"))
    assert (folder / "summary.txt").read_text() in done.stdout and (folder / "report.html").exists()


def test_error_is_one_line_and_a_code(autotune: Autotune):
    done = autotune("model=tinyy")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("autotune: model=tinyy: there is no such option; did you mean tiny?")
