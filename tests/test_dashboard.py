"""optuna-dashboard opens a study's storage as it is."""

from pathlib import Path

import pytest

from autotune.measure.result import Result
from tests.studies import SEQS, autotune


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dashboard_shows_a_studys_trials_and_draws_them(tmp_path: Path):
    done = autotune(tmp_path, "sampler=grid", f"{SEQS}=choice(4,64)", "engine.args.tensor_parallel_size=choice(1,3)")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "multirun/s"
    from optuna_dashboard import wsgi  # seconds, with torch
    from werkzeug.test import Client

    dashboard = Client(wsgi(f"sqlite:///{folder}/study.db"))
    (listed,) = dashboard.get("/api/studies").json["study_summaries"]
    assert (listed["study_name"], listed["directions"]) == ("s", ["maximize"])
    address = f"/api/studies/{listed['study_id']}"
    shown = dashboard.get(address).json
    assert shown["objective_names"] == ["tokens_per_s"]
    states = [trial["state"] for trial in shown["trials"]]
    assert sorted(states) == ["Complete", "Complete", "Pruned", "Pruned"]  # 3 GPUs can't share the attention heads
    for trial in shown["trials"]:
        if trial["state"] == "Complete":
            result = Result.load(folder / f"trial-{trial['number']}")
            assert trial["values"] == result.values
            assert {one["name"]: int(one["param_external_value"]) for one in trial["params"]} == result.params
    for page in ("/dashboard", f"{address}/param_importances", f"{address}/plot/slice", f"{address}/plot/contour"):
        assert dashboard.get(page).status_code == 200
