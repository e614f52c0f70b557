"""Words of Hydra's, options given twice, folders of one's own: each works, or is a line before anything starts."""

from pathlib import Path

import pytest

from autotune.config import words
from autotune.config.command_line import compose, register
from autotune.errors import InputError
from tests.conftest import Main


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hydra/launcher=submitit_slurm", "hydra/launcher: autotune does not heed it; write launcher="),
        ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs: autotune does not heed it; write launcher="),
        ("~hydra.launcher", "hydra.launcher: autotune does not heed it; write launcher="),
        ("hydra/sweeper/sampler=random", "hydra/sweeper/sampler: autotune does not heed it; write sampler="),
        ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_trials: autotune does not heed it; write n_trials="),
        ("++hydra.sweeper.n_jobs=3", "hydra.sweeper.n_jobs: autotune does not heed it; write launcher="),
        ("hydra.sweeper.direction=maximize", "write objective=… or objective.directions=[…]"),
        ("hydra.sweep.subdir=x", "hydra.sweep.subdir: autotune does not heed it; a trial's folder is trial-"),
        ("hydra.job.chdir=true", "hydra.job.chdir: autotune does not heed it; trials run where"),
        ("hydra.job.env_set.TOKEN=hf_x", "hydra.job.env_set.TOKEN: autotune does not heed it; write backend.env."),
        ("+hydra.callbacks.x=1", "hydra.callbacks.x: autotune does not heed it; leave it out"),
        ("--experimental-rerun x.pickle", "the same command with study=<name> goes on"),
        ("--config-name other", "--config-name: autotune does not take --config-name; write --config-dir"),
        ("-cn=other", "autotune does not take --config-name; write --config-dir"),
        ("--config-pat x", "autotune does not take --config-path; write --config-dir"),
        ("n_trials=3 n_trials=4", "n_trials is set twice; write it once"),
        ("model=tiny model=smollm2", "model is set twice; write it once"),
        ("engine.args.x=1 +engine.args.x=choice(1,2)", "engine.args.x is set twice; write it once"),
        ("hydra.run.dir=", "hydra.run.dir=: write a folder, or leave it out"),
        ("resume=2", "resume=2: write true or false"),
        ("backend.steps=-1", "backend.steps=-1: write true or false"),
        ("engine.args.x=range(1,1%s)" % ("0" * 400), "engine.args.x=range(1,10000000…: a number of 300 digits or more"),
        ("n_trials=[", "n_trials=[: no viable alternative"),
        ("backend.env.HF_TOKEN=hf_planted[", "backend.env.HF_TOKEN=***: "),
        ("=3", "=3: write key=value"),
        ("workload=[chat,rag]", "workload=[chat,rag]: write the name of a file in conf/workload"),
        ("load=50", "load=50: write the name of a file in conf/load"),
        ("space=[3]", "space=[3]: write the name of a file in conf/space"),
        ("engine.args.a_b=1 engine.args.a-b=2", "engine.args.a-b is set twice; write it once"),
        ("x=choice()", "x=choice(): empty choice is not legal; write choice(a,b)"),
        ("x=a<b", "quote other signs than letters and digits: '\"a < b\"'"),
        ("workload=", "workload=: write the name of a file in conf/workload"),
        ("--load 50", "--load: autotune does not take --load; write target_load="),
        ("scenario=null", "scenario=null: write the name of a file in conf/scenario"),
        ("--package x model=tiny", "--package: it picks what --cfg shows"),
        (
            "hydra.searchpath=[file:///none]",
            "hydra.searchpath: file:///none: no such folder; write --config-dir FOLDER",
        ),
        ("hydra/sweeper=basic", "hydra/sweeper=basic: write sampler=grid for each combination once"),
        ("--config-dir", "--config-dir: write --config-dir FOLDER"),
        ("--config-dir none", "--config-dir none: no such folder"),
        ("--config-dir /etc/hostname", "--config-dir /etc/hostname: not a folder"),
        ("-cd /tmp --config-dir=/etc", "--config-dir /etc: /tmp is given already; write one folder"),
    ],
)
def test_word_that_would_not_be_heeded_is_refused_with_the_one_that_is(line: str, said: str):
    with pytest.raises(InputError) as error:
        words.check(line.split())
    assert said in str(error.value) and "\n" not in str(error.value) and "planted" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "hydra.sweeper.sampler.n_startup_trials=3 hydra.sweeper.storage=journal://x hydra.sweep.dir=multirun/x",
        "hydra/sweeper=optuna hydra/launcher=joblib hydra.sweeper.n_jobs=2",
        "hydra.run.dir=x hydra/job_logging=none hydra.verbose=true",
        "--cfg job --resolve model=tiny",
        "-m +engine.args.x=choice(1,2) ~engine.args.y ++engine.args.z=1",
        "~engine.args.x +engine.args.x=1",
        "--info defaults --config-dir=/tmp",
    ],
)
def test_word_that_is_heeded_is_taken(line: str):
    words.check(line.split())


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 6)
)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("a: !!python/object/apply:os.system ['id']\n", "could not determine a constructor"),
        ("qps: [1,\n", "expected node content"),
        ("qps: 1\nqps: 2\n", "found duplicate key qps"),
        ("a: &x\n  b: *x\n", "recursive aliases"),
        (BOMB, "expansion exceeds"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("qps:\n\t- 1\n", "cannot start any token"),
        ("qps: \x07\n", "control characters"),
        (b"\x00\xff\xfe\x80", "can't decode"),
        ("qps: 1".encode("utf-16"), "can't decode"),
        ("7\n", "Invalid loaded object type"),
        ("qps: ${\n", "no viable alternative"),
        ("# @package\nqps: 1\n", "lacks its value"),
        ("defaults: 7\n", "defaults must be a list"),
        ("defaults: [mine]\n", "the defaults of a file there lead back to it"),
        ("defaults: [none]\n", "scenario/mine.yaml: scenario=none: there is no such option"),
        ("- 1\n", "list is not a subclass of ScenarioConfig"),
        ("qpss: 1\n", "Key 'qpss' not in 'ScenarioConfig'"),
        ("# @package _global_\nhydra: null\n", "--config-dir .: "),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:12],
)
def test_broken_file_of_one_s_own_is_named(body: str | bytes, said: str, tmp_path: Path, main: Main):
    (tmp_path / "scenario").mkdir()
    (tmp_path / "scenario/mine.yaml").write_bytes(body if isinstance(body, bytes) else body.encode())
    done = main("-m", "--config-dir", ".", "model=tiny", "scenario=mine")
    assert done.returncode == 1 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and ("mine" in done.stderr or "--config-dir" in done.stderr)


@pytest.mark.parametrize("body", ["", "- 1\n", "# @pakage _global_\nhydra: {sweeper: {params: {}}}\n"])
def test_space_without_its_header_is_told_to_have_one(body: str, tmp_path: Path, main: Main):
    (tmp_path / "space").mkdir()
    (tmp_path / "space/mine.yaml").write_text(body)
    done = main("-m", "--config-dir", ".", "model=tiny", "space=mine")
    assert done.returncode == 1
    assert done.stderr == "autotune: space/mine.yaml: its first line must be `# @package _global_`\n"


def test_composing_command_names_it_too(tmp_path: Path):
    register()
    (tmp_path / "scenario").mkdir()
    (tmp_path / "scenario/mine.yaml").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"scenario/mine.yaml: .* can't decode"):
        compose(["--config-dir", str(tmp_path), "scenario=mine"])
