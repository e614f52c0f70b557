"""Malformed input, made up by Hypothesis: each is refused in one line that names it, or is right by a rule of its own.

Nothing else may happen: another exception, a hang, several lines, a line that does not say where, a wrong acceptance.
"""

import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from autotune.commands import compare, export
from autotune.config.command_line import errors_in_one_line
from autotune.config.overrides import with_fields
from autotune.config.schema import Config, SimConfig
from autotune.measure import prepare
from autotune.results import report, summary
from autotune.results.study import load
from autotune.search.checks import check_space
from autotune.sim.backend import SimBackend
from tests.studies import SEQS, configured, space, study

pytestmark = pytest.mark.slow
HANG_S = 20

# What each field means, told apart from the schema: more than 0, a whole number of 1 or more, 0 or more, a share.
POSITIVE = (
    *("scenario.qps", "scenario.ttft_ms", "scenario.tpot_ms", "scenario.search.start_qps", "scenario.search.first_s"),
    *("backend.device.bandwidth_gbs", "backend.device.link_gbs", "backend.device.memory_gib", "backend.device.tflops"),
    *("backend.device.load_gbs", "backend.device.math_efficiency", "backend.device.fp8_factor"),
    *("prior.backend.device.tflops", "benchmark.scenarios.server.ttft_ms"),
)
COUNT = (
    *("scenario.min_queries", "scenario.repeats", "scenario.search.burst", "scenario.search.max_runs", "n_trials"),
    *("dataset.count", "dataset.max_output_tokens", "backend.device.gpus", "backend.device.block_size"),
    *("prior.keep", "prior.trials", "launcher.n_jobs", "max_failures"),
)
NOT_NEGATIVE = (
    *("scenario.min_duration_s", "scenario.warmup_requests", "scenario.seed", "seed", "backend.pace", "prior.sigma"),
    *("backend.device.step_s", "backend.device.host_s", "tracking.system_metrics_s", "prior.host_sigma"),
)
FIELDS = {
    **{key: lambda value: value > 0 for key in POSITIVE},
    **{key: lambda value: value >= 1 and value == int(value) for key in COUNT},
    **{key: lambda value: value >= 0 for key in NOT_NEGATIVE},
}
NO_NUMBERS = st.sampled_from(["abc", "", "1,5", "0x1g", "--", [], [1], {}, {"a": 1}, True])
NUMBERS = st.one_of(
    st.sampled_from([0, -0.0, -1, 1.5, 1e-300, 1e18, 1e308, 10**30, -(2**63), math.nan, math.inf, -math.inf]),
    st.integers(-5, 3),
    st.floats(-2, 2),
)


class Hang(BaseException):
    """The time is over."""


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """So many cases, always the same ones; a failing one is shown as it is."""
    always = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=examples, phases=[Phase.generate], **always)


@contextmanager
def no_hang() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_accepted(action: Callable[[], object], *named: str) -> bool:
    """True if `action` goes through; False if it ends in one line that has one of `named`."""
    try:
        with no_hang(), errors_in_one_line():
            action()
            return True
    except SystemExit as ended:
        line = str(ended.code)
        assert line.startswith("autotune: ") and len(line.splitlines()) == 1 and len(line) < 1500, line
        assert any(name in line for name in named), f"{line!r} names none of {named}"
        return False


@pytest.fixture(scope="module")
def config() -> Config:
    words = ["model=llama8b", "backend=sim", "scenario=server", "prior=sim", "launcher=gpus", "gpus=[0]"]
    return configured(*words)


@fuzzed(200)
@given(st.sampled_from(sorted(FIELDS)), st.one_of(NUMBERS, NO_NUMBERS))
def test_fields_take_what_they_mean(config: Config, key: str, value: Any):
    accepted = is_accepted(lambda: prepare.check(with_fields(config, {key: value})), key, key.split("prior.")[-1])
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    assert not accepted or (is_number and abs(value) < 1e12 and FIELDS[key](value)), f"{key}={value} was accepted"
    if is_number and 0.5 < value < 2 and FIELDS[key](value) and isinstance(value, int):
        assert accepted, f"{key}={value} was refused"


def misspelt(key: str, at: int, letter: str) -> str:
    return key[: at % len(key)] + letter + key[at % len(key) + 1 :]


@fuzzed(100)
@given(
    st.sampled_from([SEQS, "engine.args.block_size", *sorted(FIELDS)]),
    st.none() | st.tuples(st.integers(0, 40), st.sampled_from("xq_.")),
    st.sampled_from(
        ["choice({0},{1})", "interval({0},{1})", "range({0},{1})", "tag(log,interval({0},{1}))", "{0},{1}"]
    ),
    st.tuples(*[st.sampled_from([0, 1, 2, 8, -1, 1.5, "abc", "nan", "inf", 1e18, "", "[1]", "{a:1}"])] * 2),
)
def test_sweeps_are_of_fields_and_their_values(
    config: Config, key: str, error: tuple[int, str] | None, form: str, ends: tuple[Any, Any]
):
    swept = misspelt(key, *error) if error else key
    word = f"{swept}={form.format(*ends)}"
    backend = SimBackend(SimConfig(), Path())
    accepted = is_accepted(lambda: check_space(space(word), config, backend, {}), *swept.split("."), word)
    numbers = all(isinstance(end, (int, float)) and end < 1e12 for end in ends)
    group = key.partition(".")[0]
    if accepted:
        assert swept == key and group in ("engine", "scenario", "dataset", "backend"), word
        assert numbers and (
            key not in FIELDS or all(FIELDS[key](end) for end in ends[: 2 if "range" not in form else 1])
        )


CONTENT = {
    **{name: text.encode() for name, text in (("empty", ""), ("list", "[1]"), ("number", "3"), ("text", "a: [b"))},
    **{name: text.encode() for name, text in (("nulls", "null"), ("deep", "[" * 10**5), ("other", '{"version": 9}'))},
    **{"binary": bytes(range(256)), "surrogate": b'{"a": "\xff"}', "duplicate": b"study: a\nstudy: b\n"},
}
BROKEN = ["folder", "loop", "dangling", "half", "strings", *CONTENT]
FILES = [
    *("baseline/result.json", "trial-0/result.json", "baseline/config.yaml", "trial-0/config.yaml", "space.json"),
    *("summary.json", "summary.txt", "verify.json", "report.html", "trial-0/progress.jsonl", "trial-0/server.csv"),
    *("trial-0/command.json", "mlflow_run.json", "autotune.log", "study.log", "baseline/run-1", "trial-x/result.json"),
]


def break_file(path: Path, how: str) -> None:
    written = path.read_text() if path.is_file() else "{}"
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if how == "folder":
        path.mkdir()
    elif how in ("loop", "dangling"):
        path.symlink_to(path.name if how == "loop" else "nowhere")
    elif how in ("half", "strings"):
        path.write_text(written[: len(written) // 2] if how == "half" else written.replace(": ", ': "x",', 3))
    else:
        path.write_bytes(CONTENT[how])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    study(folder, f"{SEQS}=choice(4,8)", "sampler=random", "n_trials=2")
    return folder / "multirun/s"


def everything_that_reads(folder: Path, draw: int) -> Iterator[Callable[[], object]]:
    yield lambda: compare.render([compare.column_of(load(str(folder)))] * 2)
    yield lambda: summary.write(load(str(folder)))
    form = list(export.Format)[draw]
    yield lambda: export.text(export.Export(str(folder), form, trial="trial-0"))
    if draw == 0:
        yield lambda: report.write(load(str(folder)))
    if draw % 2:
        yield lambda: study(folder.parents[1], f"{SEQS}=choice(4,8)", "sampler=random", "n_trials=2")


@fuzzed(30)
@given(st.sampled_from(FILES), st.sampled_from(BROKEN), st.integers(0, 4))
def test_studies_with_a_broken_file_go_on_or_name_it(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, file: str, how: str, draw: int
):
    root = tmp_path_factory.mktemp("broken")
    folder = root / "multirun/s"
    shutil.copytree(whole, folder)
    break_file(folder / file, how)
    for action in everything_that_reads(folder, draw):
        is_accepted(action, Path(file).name, file.partition("/")[0], "trial-0", str(folder), "storage")
    shutil.rmtree(root)
