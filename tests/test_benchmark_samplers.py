import json
from itertools import pairwise
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WORDS = (
    "model=tiny backend/device=cpu scenario=offline scenario.min_queries=64 dataset=synthetic dataset.records.count=64 "
    "prior.trials=8 prior.devices=2 "
    "engine.args.max_num_seqs=range(8,65,step=8) engine.args.max_num_batched_tokens=choice(32,256,1024)"
)


@pytest.mark.slow
def test_regret_falls_to_the_grids_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import samplers

    monkeypatch.setattr(samplers, "WORKLOADS", {"small": WORDS})
    samplers.main(["--seeds", "1", "--trials", "6", "--samplers", "tpe", "random", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "samplers.json").read_text())
    grid, runs = found["workloads"]["small"], found["runs"]
    assert grid["points"] == 24 and grid["refused"] == 4 and grid["best"] == max(grid["values"])
    assert 0 < grid["expected_s"] < grid["grid_s"]
    arms = [sampler + arm for sampler in ("tpe", "random") for arm in ("", "+prior", "+pruning", "+prior+pruning")]
    assert [run["arm"] for run in runs] == arms
    for run in runs:
        assert len(run["engine_s"]) == len(run["regret"]) >= 5
        assert all(before < after for before, after in pairwise(run["engine_s"]))
        assert all(1 >= before >= after >= 0 for before, after in pairwise(run["regret"]))
        assert run["engine_s"][-2] < 6 * grid["grid_s"] / grid["points"] <= run["engine_s"][-1]
    assert set(found["arms"]) == {"grid", *(run["arm"] for run in runs)}
    assert "0.5 of tpe's engine time" in capsys.readouterr().out
    assert (tmp_path / "samplers.png").stat().st_size
