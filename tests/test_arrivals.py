"""Arrivals are LoadGen's own: checked against the real LoadGen."""

import json
import subprocess
import sys
from itertools import product

import pytest

from autotune.config.schema import Kind, ScenarioConfig
from autotune.live.messages import RunSpec
from autotune.measure.arrivals import issues

# Answers each query at once and says when LoadGen issued which sample; a run for each file and number of samples.
NULL_SUT = """
import json, sys, time
import mlperf_loadgen as lg
from autotune.live.loadgen import settings, start_test
from autotune.live.messages import RunSpec
from pathlib import Path
class Null:
    def __init__(self, scenario):
        self.offline, self.seen = scenario.kind.value == "Offline", []
    def issue(self, queries):
        self.seen.extend((time.perf_counter(), query.index) for query in queries)
        if not self.offline:
            lg.FirstTokenComplete([lg.QuerySampleResponse(query.id, 0, 0) for query in queries])
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, 0, 0, 2) for query in queries])
    def flush(self): pass
for file, samples in zip(sys.argv[1::2], sys.argv[2::2]):
    run = RunSpec.load(Path(file))
    null = Null(run.scenario)
    start_test(null, settings(run.scenario), int(samples), run.folder)
    print(json.dumps(null.seen))
"""
CASES = list(product([Kind.Offline, Kind.Server, Kind.SingleStream], [7, 64]))  # LoadGen's scenario, and samples
Seen = dict[tuple[Kind, int], list[tuple[float, int]]]


def scenario(kind: Kind) -> ScenarioConfig:
    return ScenarioConfig(name="s", kind=kind, qps=100.0, min_duration_s=0.5, min_queries=40, seed=3)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """When LoadGen issued which sample, by case."""
    words: list[str] = []
    for kind, samples in CASES:
        folder = tmp_path_factory.mktemp("loadgen")
        RunSpec(folder, "", "", scenario(kind), request_timeout_s=1.0).save(folder / "run.json")
        words += [str(folder / "run.json"), str(samples)]
    done = subprocess.run([sys.executable, "-c", NULL_SUT, *words], capture_output=True, text=True, check=True)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "samples"), CASES)
def test_arrivals_are_those_of_loadgen(seen: Seen, kind: Kind, samples: int):
    issued = seen[kind, samples]
    expected = [issue for issue, _ in zip(issues(scenario(kind), samples), issued, strict=False)]
    assert [sample for _, sample in expected] == [sample for _, sample in issued]
    if kind is Kind.Server:
        assert len(expected) == len(list(issues(scenario(kind), samples)))
        lateness = [at - issued[0][0] - time_s for (at, _), (time_s, _) in zip(issued, expected, strict=True)]
        assert sorted(lateness)[len(lateness) // 2] == pytest.approx(0, abs=0.01)
