"""`autotune verify`: its statistics against known values and by simulation, the command on simulated studies."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from autotune.commands import verify
from autotune.commands.verify import Verify
from autotune.config.schema import Config, InlineConfig, ObjectiveConfig
from autotune.errors import InputError
from autotune.measure import trial
from autotune.measure.backend import Measurement
from autotune.measure.paired import paired_difference
from autotune.measure.result import Result, State
from autotune.results import verdict
from autotune.results.study import Study, load
from autotune.results.verdict import Verdict
from autotune.sim.backend import SimEngine
from autotune.sweep.launchers import Inline, Job
from autotune.sweep.repeats import Repeat, config_of, run_missing
from autotune.sweep.worker import TrialSpec
from autotune.system import interrupt
from tests import in_process
from tests.in_process import Done
from tests.studies import SEQS, autotune, environment, study

# Student's own data: extra hours of sleep with two drugs (Biometrika 6, 1908); t = 4.0621, p = 0.002833 (R's t.test).
SLEEP = (
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
)


def test_students_own_data_gives_students_own_answer():
    found = paired_difference(*SLEEP, confidence=0.95, comparisons=1)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858))
    assert found.p == pytest.approx(0.002833, abs=1e-6)


def test_one_of_several_needs_more_to_be_sure():
    alone, one_of_three = (paired_difference(*SLEEP, confidence=0.95, comparisons=count) for count in (1, 3))
    assert one_of_three.p == pytest.approx(3 * alone.p)
    assert one_of_three.low < alone.low and one_of_three.high > alone.high


def test_interval_leaves_out_nothing_exactly_where_p_is_below_its_level():
    draw = np.random.default_rng(3)
    for _ in range(100):
        found = paired_difference(draw.normal(1, 1, 5), draw.normal(0, 1, 5), 0.95, 3)
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_values_that_never_vary_are_certain():
    assert paired_difference([2.0, 2.0], [1.0, 1.0], 0.95, 1).p == 0
    assert paired_difference([1.0, 1.0], [1.0, 1.0], 0.95, 1).p == 1


def winners(gains: list[float], noise: list[float], draws: int) -> float:
    """The share of verifications that find a winner among configurations with these true gains, n = 5."""
    draw = np.random.default_rng(1)
    found = 0
    for _ in range(draws):
        block = draw.normal(0, 5, 5)  # what a block has in common
        baseline = 100 + block + draw.normal(0, 1, 5)
        rows = [100 + gain + block + draw.normal(0, spread, 5) for gain, spread in zip(gains, noise, strict=True)]
        found += any(paired_difference(row, baseline, 0.95, len(rows)).low > 0 for row in rows)
    return found / draws


@pytest.mark.slow
@pytest.mark.parametrize("noise", [[1, 1, 1], [1, 4, 0.2]], ids=["alike", "one far noisier"])
def test_no_winner_is_seen_where_there_is_none(noise: list[float]):
    """At most 2.5 % (one side of 5 %), however differently they vary; 800 draws tell 2.5 % from 4.5 %."""
    assert winners([0, 0, 0], noise, 800) <= 0.045


def test_winner_is_seen_where_there_is_one():
    assert winners([0, 6, 0], [1, 1, 1], 200) > 0.95


@pytest.mark.slow
def test_intervals_hold_together_as_often_as_they_say():
    draw = np.random.default_rng(2)
    held = 0
    for _ in range(600):
        baseline = draw.normal(0, 1, 5)
        rows = [gain + draw.normal(0, 1, 5) for gain in (0.0, 1.0, 2.0)]
        found = [paired_difference(row, baseline, 0.95, 3) for row in rows]
        held += all(one.low <= gain <= one.high for gain, one in zip((0.0, 1.0, 2.0), found, strict=True))
    assert stats.binomtest(held, 600, 0.95, "less").pvalue > 0.001


# Judging


def judged(rows: dict[str, list[float]], held: dict[str, int] | None = None, direction: str = "maximize") -> Verdict:
    """The verdict on repeats with these values, `held` of which held the limits."""
    objective = ObjectiveConfig("o", ["x"], [direction])
    once = {name: Result("complete", values=values[:1], params={SEQS: 1}) for name, values in rows.items()}
    study = Study(Path("s"), Config(objective=objective), once)
    results = {
        name: [
            Result("complete", values=[value], constraints={"ttft_p99": -1.0 if holds else 1.0})
            for value, holds in zip(values, [True] * (held or {}).get(name, 5) + [False] * 5, strict=False)
        ]
        for name, values in rows.items()
    }
    return verdict.judge(study, results, 0, 0.95)


BASE = [100.0, 101.0, 99.0, 100.0, 102.0]


def better(by: float) -> list[float]:
    return [value + by + wobble for value, wobble in zip(BASE, (0.1, -0.1, 0.2, 0.0, -0.2), strict=True)]


def test_winner_is_the_best_of_those_that_are_better():
    found = judged({"baseline": BASE, "trial-1": better(5), "trial-2": better(9), "trial-3": better(0)})
    assert found.winner == "trial-2" and found.line.startswith("Better than the defaults: trial-2, +9.0% [+")
    assert "95% confidence for all 3 together" in found.line


def test_lower_is_better_where_the_objective_is_minimised():
    found = judged({"baseline": BASE, "trial-1": better(-5), "trial-2": better(9)}, direction="minimize")
    assert found.winner == "trial-1"


def test_no_better_than_the_defaults_is_said_plainly():
    found = judged({"baseline": BASE, "trial-1": better(0), "trial-2": better(-3)})
    assert found.winner is None
    assert found.line == "No configuration beat the defaults in 5 repeats, with 95% confidence for all 2 together."


def test_better_values_do_not_count_where_a_limit_broke_once():
    found = judged({"baseline": BASE, "trial-1": better(5)}, held={"trial-1": 4})
    assert found.winner is None and "trial-1 did not hold the limits in every repeat" in found.line
    assert "4 of 5" in verdict.render(found)


def test_limits_that_the_defaults_never_hold_make_a_winner_of_what_does():
    found = judged({"baseline": BASE, "trial-1": better(-5)}, held={"baseline": 0})
    assert found.winner == "trial-1" and "the defaults in none" in found.line


# The command


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "autotune", "verify", "study=s", *words]


def run(folder: Path, *words: str) -> Done:
    named = [] if any(word.startswith("study=") for word in words) else ["study=s"]
    return in_process.autotune(folder, "verify", *named, *words)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose trials are much worse than the defaults, and the same: 64 sequences hold all requests at once."""
    folder = tmp_path_factory.mktemp("simulated")
    study(folder, "sampler=grid", f"{SEQS}=choice(4,64)", "engine.args.seed=choice(1)", simulated=True)
    return folder


@pytest.mark.slow
def test_study_without_a_better_configuration_ends_with_its_own_code(simulated: Path):
    done = run(simulated, "k=2", "n=3")
    assert done.returncode == 2, done.stderr
    assert "2 configurations and the baseline, 3 repeats each: 9 runs, 0 of them already complete" in done.stdout
    assert "No configuration beat the defaults in 3 repeats" in done.stdout
    verdict = json.loads((simulated / "multirun/s/verify.json").read_text())
    assert [row["held"] for row in verdict["rows"]] == [3, 3, 3]
    assert len(set(verdict["rows"][0]["values"])) == 3  # each repeat sees a load of its own
    again = run(simulated, "k=2", "n=4")
    assert "12 runs, 9 of them already complete" in again.stdout


def planned(study: Study, settings: Verify, *overrides: str) -> list[Repeat]:
    return verify.plan(study, settings, verify.configurations(study, settings, overrides), overrides)


class Signalled(Inline):
    """A signal comes when a job has started and nobody has noted it yet."""

    def submit(self, trials: Sequence[TrialSpec]) -> list[Job]:
        self.jobs = super().submit(trials)
        signal.raise_signal(signal.SIGTERM)
        return self.jobs


def test_job_does_not_outlive_a_signal_that_comes_while_it_is_started(simulated: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interrupt, "_received", [])
    monkeypatch.chdir(simulated)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt.install()
    launcher = Signalled(InlineConfig(), None)
    try:
        with pytest.raises(SystemExit):
            found = planned(load("s"), Verify("s", k=1, n=2, seed=9), "backend.pace=10")
            run_missing(found, launcher, lambda *_: None)
        assert [job.done() for job in launcher.jobs] == [True]
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
        for job in launcher.jobs:
            job.cancel()


@pytest.mark.slow
def test_one_that_is_stopped_says_how_many_blocks_can_be_judged(simulated: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["k=1", "scenario.seed=100"]
    whole, begun = SimEngine.run, 0

    def signalled(*arguments: Any) -> Measurement:
        nonlocal begun
        begun += 1
        if begun == 5:  # the first of block 3
            signal.raise_signal(signal.SIGTERM)
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SimEngine, "run", signalled)
        stopped = run(simulated, "n=9", *words)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "2 blocks are complete: n=2 judges them without another run" in stopped.stdout
    done = run(simulated, "n=2", *words)
    assert "4 runs, 4 of them already complete" in done.stdout and done.returncode == 2


def test_better_configuration_ends_with_0(tmp_path: Path):
    study(tmp_path, "n_trials=1", "engine.args.tensor_parallel_size=choice(2)", simulated=True)
    done = run(tmp_path, "n=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Better than the defaults: trial-" in done.stdout


def test_repeat_that_nobody_recorded_keeps_the_gates_verdict(simulated: Path, monkeypatch: pytest.MonkeyPatch):
    """It ended when `verify` had been killed, and its answers were refused in the study."""
    monkeypatch.chdir(simulated)
    monkeypatch.setattr(verify, "record", lambda *_: None)
    study = load("s")
    study.results["trial-0"].constraints["accuracy"] = 1.0
    verdict = verify.verify(study, Verify("s", trials=["trial-0"], n=2), ["scenario.seed=300"])
    assert [row.held for row in verdict.rows] == [2, 0]


@pytest.mark.parametrize("config", [b"\xff", b"", None])
def test_repeat_whose_configuration_is_damaged_runs_again(simulated: Path, tmp_path: Path, config: bytes | None):
    one = planned(load(str(simulated / "multirun/s")), Verify("s", k=1, n=2))[0]
    repeat = replace(one, trial=replace(one.trial, folder=tmp_path))
    Result(state=State.complete, values=[1.0]).save(tmp_path)
    (tmp_path / "config.yaml").write_text(trial.as_yaml(repeat.trial.config))
    assert repeat.is_complete()
    (tmp_path / "config.yaml").unlink()
    if config is not None:
        (tmp_path / "config.yaml").write_bytes(config)
    assert not repeat.is_complete()


def test_same_loads_within_a_block_and_another_order_in_each(simulated: Path):
    found = planned(load(str(simulated / "multirun/s")), Verify("s", k=2, n=6))
    blocks = [[one for one in found if one.block == block] for block in range(1, 7)]
    assert [len({one.trial.config.scenario.seed for one in block}) for block in blocks] == [1] * 6
    assert [block[0].trial.config.scenario.seed for block in blocks] == [2, 3, 4, 5, 6, 7]  # the study's own is 1
    assert len({tuple(one.name for one in block) for block in blocks}) > 1


def test_block_stays_on_its_gpus_and_others_run_beside_it(simulated: Path):
    """Or a configuration that always met the slower GPU would be called the slower one."""
    study = load(str(simulated / "multirun/s"))
    found = planned(study, Verify("s", k=2, n=5), "gpus=[0,1]")
    by_block = {
        one.block: {tuple(other.trial.config.gpus) for other in found if other.block == one.block} for one in found
    }
    assert by_block == {1: {(1,)}, 2: {(0,)}, 3: {(1,)}, 4: {(0,)}, 5: {(1,)}}
    assert [one.block for one in found[:4]] == [1, 2, 1, 2]


def test_each_repeat_has_a_server_of_its_own(simulated: Path):
    study = load(str(simulated / "multirun/s"))
    configs = verify.configurations(study, Verify("s", k=1), [])
    for config in configs.values():
        config.backend["hot"] = "same"
    assert all(one.trial.config.backend["hot"] == "never" for one in verify.plan(study, Verify("s"), configs, []))


def test_launcher_is_given_all_gpus_of_the_command(simulated: Path, monkeypatch: pytest.MonkeyPatch):
    def nothing_starts(config: Config) -> Inline:
        raise InputError(f"gpus={config.gpus}")

    monkeypatch.setattr(verify, "make_launcher", nothing_starts)
    with pytest.raises(InputError, match=r"gpus=\[0, 1\]"):
        verify.verify(load(str(simulated / "multirun/s")), Verify("s", n=2, seed=5), ["gpus=[0,1]"])


def test_study_without_vllms_defaults_is_told_so(simulated: Path):
    made = load(str(simulated / "multirun/s"))
    made.results.pop("baseline")
    made.config.baseline = "recipe"
    with pytest.raises(InputError, match=r"vLLM's defaults are not there to compare with \(baseline=recipe\)"):
        verify.compared(made, Verify("s"))


@pytest.mark.slow
def test_blocks_run_on_all_gpus_that_the_command_gives_although_the_study_had_one(tmp_path: Path):
    autotune(tmp_path, "launcher=gpus", "gpus=[0]", "n_trials=1", f"{SEQS}=choice(4)")
    words = command("n=2", "gpus=[0,1]")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment(tmp_path), timeout=120)
    first, second = [line for line in done.stdout.splitlines() if line.startswith("block ")][:2]
    assert {first[:7], second[:7]} == {"block 1", "block 2"}, done.stdout + done.stderr
    assert not {"tokens_per_s", "failed"} & {*first.split(), *second.split()}  # both have begun, none has ended


@pytest.mark.parametrize(
    ("gpus", "size", "groups"),
    [(None, 2, [None]), ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]), ([4, 5, 6], 2, [[4, 5]]), ([7], 2, [[7]])],
)
def test_gpus_are_grouped_by_what_the_largest_configuration_takes(
    gpus: list[int] | None, size: int, groups: list[object]
):
    assert verify.gpu_groups(gpus, size) == groups


@pytest.mark.parametrize("word", ["backend.env.HF_TOKEN='***'", "backend.prefix=[env,HF_TOKEN=***,A_KEY=***]"])
def test_hidden_values_have_to_be_given(simulated: Path, word: str):
    study, key = load(str(simulated / "multirun/s")), word.partition("=")[0]
    with pytest.raises(InputError, match=f"hides {key}; add {key}=… to this command"):
        config_of(study, "baseline", [word])


@pytest.mark.parametrize(
    ("settings", "overrides", "said"),
    [
        (Verify("s", trials=[]), [], r"trials=\[\]: name one besides the baseline"),
        (Verify("s", trials=["baseline"]), [], r"trials=\[baseline\]: name one besides the baseline"),
        (Verify("s", metric="x"), [], "metric=x: the study's objective has tokens_per_s"),
        (Verify("s", trials=["trial-9"]), [], "trial=trial-9: s has no such trial"),
        (Verify("s"), ["scenario.sed=1"], "scenario.sed: there is no such field; did you mean seed"),
        (Verify("s"), ["tracking=none"], r"fields can be changed, not groups; write tracking\.enabled=…"),
    ],
)
def test_what_can_not_be_verified_is_said(simulated: Path, settings: Verify, overrides: list[str], said: str):
    with pytest.raises(InputError, match=said):
        planned(load(str(simulated / "multirun/s")), settings, *overrides)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study=t"], "study=t: no such folder below multirun/; there is s"),
        (["n=x"], "n=x: write a whole number from 2 to 1000; see --help"),
        (["n=1"], "n=1: write a number from 2 to 1000"),
        (["k=0"], "k=0: write a number from 1 to 1000"),
        (["confidence=95"], "confidence=95.0: write a number from 0.5 to 0.9999"),
        (["seed=-1"], "seed=-1: write a number from 0"),
        (["model.path=/none"], "model.path=/none: no model there"),
        (["dataset.path=/none"], "dataset.path=/none: No such file"),
        (["engine.args.max_num_seqs=-3"], "engine.args.max_num_seqs=-3: vLLM takes at least 1"),
    ],
)
def test_error_is_one_line_and_no_verdict(simulated: Path, words: list[str], said: str):
    done = run(simulated, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr and done.stderr.count("\n") == 1
