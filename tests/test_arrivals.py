"""Arrivals are LoadGen's own: checked against the real LoadGen."""

import json
import subprocess
import sys
from collections import Counter
from itertools import product
from typing import Any

import pytest

from autotune.config.schema import Kind, ScenarioConfig
from autotune.live.load_generator import RunSpec
from autotune.measure.arrivals import issues, least_queries

# Answers each query at once and says when LoadGen issued which sample; a run, in a process of its own, for each file
# and number of samples.
NULL_SUT = """
import json, os, sys, time
import mlperf_loadgen as lg
from autotune.live.loadgen import start_test
from autotune.live.load_generator import RunSpec
from pathlib import Path
class Null:
    def __init__(self, scenario):
        self.offline, self.seen = scenario.kind.value == "Offline", []
    def issue(self, queries):
        self.seen.extend((time.perf_counter(), query.index) for query in queries)
        if not self.offline:
            lg.FirstTokenComplete([lg.QuerySampleResponse(query.id, 0, 0) for query in queries])
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, 0, 0, 2) for query in queries])
for file, samples in zip(sys.argv[1::2], sys.argv[2::2]):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    run = RunSpec.load(Path(file))
    null = Null(run.scenario)
    start_test(null.issue, run.scenario, int(samples), run.folder)
    print(json.dumps(null.seen), flush=True)
    os._exit(0)
"""
# LoadGen's scenario, samples, and whether MLPerf's seeds and equal issue hold, by LoadGen's own mlperf.conf.
CASES = list(product([Kind.Offline, Kind.Server, Kind.SingleStream], [7, 64], [False, True]))
Case = tuple[Kind, int, bool]
Seen = dict[Case, list[tuple[float, int]]]
SEEDS = [2085463073848966840, 2747215439041700203, 16159082839903944936]


def scenario(kind: Kind, by_rules: bool) -> ScenarioConfig:
    rules: dict[str, Any] = {"seed": 3}
    if by_rules:
        rules = {"seeds": SEEDS, "equal_issue": True, "benchmark": "llama3_1-8b"}
    return ScenarioConfig(name="s", kind=kind, qps=100.0, min_duration_s=0.5, min_queries=40, **rules)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """When LoadGen issued which sample, by case."""
    words: list[str] = []
    for kind, samples, by_rules in CASES:
        folder = tmp_path_factory.mktemp("loadgen")
        RunSpec(folder, "", "", scenario(kind, by_rules), request_timeout_s=1.0).save(folder / "run.json")
        words += [str(folder / "run.json"), str(samples)]
    done = subprocess.run([sys.executable, "-c", NULL_SUT, *words], capture_output=True, text=True, check=True)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_arrivals_are_those_of_loadgen(seen: Seen, case: Case):
    kind, samples, by_rules = case
    asked, issued = scenario(kind, by_rules), seen[case]
    expected = [issue for issue, _ in zip(issues(asked, samples), issued, strict=False)]
    assert [sample for _, sample in expected] == [sample for _, sample in issued]
    if by_rules:
        assert len(set(Counter(sample for _, sample in issued).values())) == 1 or kind is Kind.SingleStream
        assert least_queries(asked, samples) <= len(issued)
    if kind is Kind.Offline:
        assert least_queries(asked, samples) == len(issued)
    if kind is Kind.Server:
        assert len(expected) == len(list(issues(asked, samples)))
        begins = sorted(at - time_s for (at, _), (time_s, _) in zip(issued, expected, strict=True))
        # A busy machine is late by less; another schedule would be by seconds.
        assert begins[len(begins) // 2] == pytest.approx(begins[0], abs=0.1)
