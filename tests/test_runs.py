"""The runs of one trial on one server, on a simulated one."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from autotune.config.schema import Kind, ScenarioConfig
from autotune.errors import BehindError, InputError
from autotune.measure import checks, runs, trial
from autotune.measure.backend import DryRunOutcome, Measurement
from autotune.measure.prepare import check_time, prepare, prepare_samples
from autotune.measure.result import Result, State
from autotune.measure.slot import Slot
from autotune.sim.backend import SimBackend, SimEngine
from tests.studies import configured

SIMULATED = ["model=llama8b", "backend=sim", "tracking=none"]


def run(folder: Path, *arguments: str) -> Result:
    config = configured(*SIMULATED, *arguments)
    return trial.run(config, [], folder)


SEARCH = ["scenario=interactive", "objective=max_qps", "scenario.min_duration_s=30"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A trial that has looked for the highest load: its folder and its result."""
    folder = tmp_path_factory.mktemp("searched")
    return folder, run(folder, *SEARCH)


def test_highest_load_is_certified_and_bracketed(searched: tuple[Path, Result]):
    folder, result = searched
    assert result.values == [result.metrics["max_qps"]] and result.verdict == "VALID" and result.feasible
    assert result.metrics["max_qps"] < result.metrics["failing_qps"] < 1.05 * result.metrics["max_qps"]
    certifying = {round(one.qps, 6): one for one in result.runs if one.role == "certify"}
    passed = certifying[round(result.metrics["max_qps"], 6)]
    failed = certifying[round(result.metrics["failing_qps"], 6)]
    assert passed.verdict == "VALID" and not passed.stopped_early and passed.metrics["requests"] >= 1000
    assert failed.verdict == "INVALID"
    broken = failed.reasons[0].split()[0].lower()  # "TPOT over its limit in …"
    assert result.bound == broken and broken in ("ttft", "tpot")
    assert result.metrics["ttft_p99_ms"] == passed.metrics["ttft_p99_ms"]
    for one in result.runs:
        assert (folder / one.folder / "server.csv").exists()
    assert Result.load(folder) == result
    # What a run that was stopped costs is what it took.
    spent = sum(one.metrics["duration_s"] for one in result.runs)
    assert result.phases["run"] == pytest.approx(spent, rel=0.02)


USERS = ["workload=code", "dataset=cnn_shaped", "load=concurrency", "scenario.min_duration_s=10", "scenario.ramp_s=2"]


def test_most_users_are_certified_and_bracketed(tmp_path: Path):
    result = run(tmp_path, *USERS, "scenario.search.certify_queries=459", "scenario.search.burst=50")
    users, failing = result.metrics["max_concurrency"], result.metrics["failing_concurrency"]
    assert result.values == [users] and result.feasible and result.bound == "latency"
    assert users < failing <= max(users + 1, 1.05 * users) and users == int(users)
    assert result.metrics["latency_p99_ms"] <= 2000
    assert users / 3 < result.runs[1].qps < users * 3  # the burst has told about how many


def test_users_that_a_search_begins_with_are_those_that_the_limits_let_wait():
    queueing = {"ttft_mean_ms": 9e3, "tpot_mean_ms": 40.0, "latency_p99_ms": 20e3, "output_tokens": 500, "requests": 10}
    limited = ScenarioConfig(name="s", kind=Kind.ClosedLoop, ttft_ms=1000, tpot_ms=100)
    assert runs.longest_s(limited, queueing) == pytest.approx(6.0)
    assert runs.longest_s(replace(limited, ttft_ms=None, tpot_ms=None, latency_ms=3000), queueing) == 3.0
    assert runs.longest_s(replace(limited, ttft_ms=None), queueing) == pytest.approx(14.0)


def test_each_user_of_a_closed_loop_waits_for_the_answer(tmp_path: Path):
    """On two replicas, too, of which each has half of the users."""
    closed = [*USERS, "objective=throughput", "scenario.users=9", "scenario.ramp_s=0", "engine.args.max_model_len=4096"]
    for name, more in (("one", []), ("two", ["engine.args.data_parallel_size=2"])):
        config = configured(*SIMULATED, *closed, *more)
        prepared = prepare(config)
        samples = prepare_samples(config, prepared)
        with prepared.backend.start(prepared.model, prepared.args, samples, tmp_path, Slot()) as engine:
            requests = engine.run(config.scenario, tmp_path).requests
        begins, ends = sorted(one.issued for one in requests), sorted(one.last_token for one in requests)
        assert len(requests) >= 100 and begins[-1] <= 10.0, name
        assert begins[9:] == pytest.approx(ends[:-9]), name


def highest(folder: Path, seed: int, minutes: int) -> float:
    folder /= f"{seed}-{minutes}"
    length = [f"scenario.seed={seed}", f"scenario.min_duration_s={60 * minutes}"]
    return run(folder, "scenario=interactive", "objective=max_qps", *length).values[0]


@pytest.mark.slow
def test_search_finds_what_its_own_schedule_allows(tmp_path: Path):
    """Of LoadGen's seeds, 5 is a quiet minute and 9 a busy one: whole runs hold 28.4 and 22.9 queries/s."""
    config = configured(*SIMULATED, "scenario=interactive")
    for seed, allows in ((5, 28.4), (9, 22.9)):
        assert highest(tmp_path, seed, 1) == pytest.approx(allows, rel=config.scenario.search.precision)


@pytest.mark.slow
def test_searches_with_longer_runs_agree(tmp_path: Path):
    """A minute is not enough to tell loads apart that differ by a tenth; five are."""
    assert highest(tmp_path, 5, 1) > 1.15 * highest(tmp_path, 9, 1)
    assert highest(tmp_path, 5, 5) == pytest.approx(highest(tmp_path, 9, 5), rel=0.1)


def test_run_that_the_client_decided_is_not_feasible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a real run's audit says it; a simulation has no client."""
    whole = SimEngine.run

    def audited(engine: SimEngine, *arguments: Any) -> Measurement:
        return replace(whole(engine, *arguments), verdict="INVALID", reasons=["client: client_cpu=0.95 is over 0.9"])

    monkeypatch.setattr(SimEngine, "run", audited)
    result = run(tmp_path, "scenario=offline", "scenario.min_queries=64")
    assert result.complete and result.bound == "client" and not result.feasible


def test_limits_that_no_load_holds_leave_an_infeasible_trial(tmp_path: Path):
    hopeless = ["scenario.tpot_ms=2", "scenario.min_duration_s=5", "scenario.search.first_s=2"]
    result = run(tmp_path, "scenario=interactive", "objective=max_qps", *hopeless)
    assert result.complete and result.values == [0.0] and not result.feasible
    assert result.constraints["tpot_p99"] > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scenario=offline"], "has no arrival rate"),
        (["scenario=server", "scenario.ttft_ms=null", "scenario.tpot_ms=null"], "has no limits"),
        (["scenario=server", "load=concurrency"], "max_qps is no load of ClosedLoop; write objective=max_concurrency"),
        (["scenario=server", "scenario.search.certify_queries=458"], "write 459 or more"),
    ],
)
def test_search_that_can_find_nothing_is_refused_before_a_server_starts(arguments: list[str], words: str):
    config = configured(*SIMULATED, *arguments, "objective=max_qps")
    with pytest.raises(InputError, match=words):
        prepare(config)


def test_search_that_begins_where_the_load_is_known_takes_fewer_runs(tmp_path: Path, searched: tuple[Path, Result]):
    _, unknown = searched
    known = run(tmp_path, *SEARCH, f"scenario.search.start_qps={unknown.values[0]}")
    assert known.values == unknown.values
    assert [one.role for one in known.runs] == ["certify", "certify"] and len(unknown.runs) > 4


def test_repeats_are_means_with_an_interval(tmp_path: Path):
    result = run(
        tmp_path, "scenario=interactive", "scenario.qps=20", "scenario.repeats=4", "scenario.min_duration_s=20"
    )
    each = [one.metrics["tokens_per_s"] for one in result.runs]
    assert len(set(each)) == 4
    low, high = result.intervals["tokens_per_s"]
    assert low < result.values[0] < high and result.values[0] == pytest.approx(sum(each) / 4)


def test_load_above_the_limits_is_stopped_and_infeasible(tmp_path: Path):
    overload = ["scenario=interactive", "scenario.qps=60", "scenario.min_duration_s=60"]
    stopped, whole = run(tmp_path / "a", *overload), run(tmp_path / "b", *overload, "scenario.stop=never")
    assert stopped.metrics["duration_s"] < whole.metrics["duration_s"] / 2
    assert stopped.verdict == whole.verdict == "INVALID"
    assert not stopped.feasible and not whole.feasible
    assert 0 < stopped.constraints["tpot_p99"] <= whole.constraints["tpot_p99"]


@pytest.mark.parametrize(
    ("arguments", "bound"),
    [
        (["scenario=interactive", "scenario.qps=5"], "arrival"),
        (["scenario=offline", "scenario.min_queries=2000", "engine.args.max_num_seqs=16"], "sequences"),
        (["scenario=offline", "scenario.min_queries=300", "engine.args.max_num_batched_tokens=1024"], "tokens"),
        (["scenario=offline", "scenario.min_queries=2000", "engine.args.gpu_memory_utilization=0.24"], "kv"),
    ],
)
def test_what_bound_a_server_is_said(arguments: list[str], bound: str, tmp_path: Path):
    assert run(tmp_path, *arguments).bound == bound


def test_vllm_is_asked_about_its_flags_while_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun = threading.Event()
    answer, start = SimBackend.dry_run, SimBackend.start

    def asked(backend: SimBackend, *arguments: Any) -> DryRunOutcome:
        assert begun.wait(5), "the start waits for the answer"
        return answer(backend, *arguments)

    def starting(backend: SimBackend, *arguments: Any) -> Any:
        begun.set()
        return start(backend, *arguments)

    monkeypatch.setattr(SimBackend, "dry_run", asked)
    monkeypatch.setattr(SimBackend, "start", starting)
    assert run(tmp_path, "scenario=offline", "scenario.min_queries=64").complete


def test_failed_start_costs_what_it_took():
    config = configured(*SIMULATED, "engine.args.gpu_memory_utilization=0.1")
    from autotune.search.simulate import estimate, simulation

    found = estimate(simulation(config, config.backend), {})
    assert found.state is State.failed and found.engine_s > 30


def test_trial_that_does_not_hold_the_best_load_is_left_after_one_short_run(
    tmp_path: Path, searched: tuple[Path, Result]
):
    best = 1.5 * searched[1].values[0]
    with pytest.raises(BehindError, match=f"does not hold {best:.4g} queries/s"):
        run(tmp_path, *SEARCH, f"scenario.search.best={best}")
    left = Result.load(tmp_path)
    assert left.state == "pruned" and len(left.runs) == 1 and left.phases["run"] < 20
    assert left.metrics["failing_load"] == best and 0 < left.metrics["load_at_most"] < best
    assert left.facts["simulated"] == "H100"  # what it ran on is told of any trial


def test_trial_is_left_when_a_run_of_full_length_shows_that_it_does_not_hold_the_best_load(
    tmp_path: Path, searched: tuple[Path, Result]
):
    """For two seconds it holds 5 % more than its highest load."""
    best = 1.05 * searched[1].values[0]
    with pytest.raises(BehindError, match=f"does not hold {best:.4g} queries/s"):
        run(tmp_path, *SEARCH, "scenario.search.first_s=2", f"scenario.search.best={best}")
    left = Result.load(tmp_path)
    assert left.runs[0].verdict == "VALID" and left.runs[-1].role == "certify"
    assert left.runs[-1].qps == pytest.approx(best) and left.metrics["load_at_most"] < best


def test_trial_that_holds_the_best_load_is_searched_from_there_upwards(tmp_path: Path, searched: tuple[Path, Result]):
    found = run(tmp_path, *SEARCH, f"scenario.search.best={0.8 * searched[1].values[0]}")
    assert found.values[0] == pytest.approx(searched[1].values[0], rel=0.05)
    assert min(one.qps for one in found.runs) == pytest.approx(0.8 * searched[1].values[0])
    assert not any(one.role == "burst" for one in found.runs)


def test_users_without_a_closed_loop_are_refused():
    with pytest.raises(InputError, match="only a closed loop has users; write load=concurrency"):
        checks.check(configured(*SIMULATED, "scenario=interactive", "scenario.users=8"))


def test_setting_of_loadgens_for_traffic_that_it_does_not_send_is_refused():
    with pytest.raises(InputError, match=r"scenario\.equal_issue: a setting of LoadGen's, .*; leave it out"):
        checks.check(configured(*SIMULATED, "scenario=trace", "scenario.equal_issue=true"))


def test_longest_part_of_a_trace_is_no_least_one():
    checks.check(configured(*SIMULATED[:2], "scenario=trace", "scenario.max_queries=5", "scenario.max_duration_s=5"))


def test_run_that_its_time_out_would_cut_off_is_refused():
    config = configured("model=tiny", "scenario=custom", "scenario.min_duration_s=7200")
    with pytest.raises(InputError, match=r"backend\.run_timeout_s=7200: a run lasts 7200 s or more; write more"):
        check_time(config, cast(Any, None))
    trace = configured("model=tiny", "scenario=trace", "dataset=trace", "scenario.scale=0.1")
    samples = cast(Any, SimpleNamespace(arrivals=np.array([0.0, 800.0])))
    with pytest.raises(InputError, match="a run lasts 8000 s or more"):
        check_time(trace, samples)
    check_time(configured("model=tiny", "scenario=trace", "dataset=trace"), samples)
