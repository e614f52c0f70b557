"""Arrivals are LoadGen's own: checked against the real LoadGen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.config.schema import Kind, ScenarioConfig
from autotune.live.messages import RunSpec
from autotune.measure.arrivals import issues

# Answers each query at once and writes down when LoadGen issued which sample.
NULL_SUT = """
import json, sys, time
import mlperf_loadgen as lg
from autotune.live.loadgen import settings, start_test
from autotune.live.messages import RunSpec
from pathlib import Path
scenario, samples, folder = RunSpec.load(Path(sys.argv[1])).scenario, int(sys.argv[2]), Path(sys.argv[3])
seen = []
class Null:
    def issue(self, queries):
        seen.extend((time.perf_counter(), query.index) for query in queries)
        if scenario.kind.value != "Offline":
            lg.FirstTokenComplete([lg.QuerySampleResponse(query.id, 0, 0) for query in queries])
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, 0, 0, 2) for query in queries])
    def flush(self): pass
start_test(Null(), settings(scenario), samples, folder)
print(json.dumps(seen))
"""


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("samples", [7, 64])
def test_arrivals_are_those_of_loadgen(kind: Kind, samples: int, tmp_path: Path):
    scenario = ScenarioConfig(name="s", kind=kind, qps=100.0, min_duration_s=0.5, min_queries=40, seed=3)
    file = tmp_path / "run.json"
    RunSpec(tmp_path, "", "", scenario, request_timeout_s=1.0).save(file)
    command = [sys.executable, "-c", NULL_SUT, str(file), str(samples), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    expected = [issue for issue, _ in zip(issues(scenario, samples), seen, strict=False)]
    assert [sample for _, sample in expected] == [sample for _, sample in seen]
    if kind is Kind.Server:
        assert len(expected) == len(list(issues(scenario, samples)))
        lateness = [at - seen[0][0] - time_s for (at, _), (time_s, _) in zip(seen, expected, strict=True)]
        assert sorted(lateness)[len(lateness) // 2] == pytest.approx(0, abs=0.01)
