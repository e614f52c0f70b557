"""A study as its users look at it: MLflow's own pages, in a browser."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import Page, expect

from autotune.system.process import GuardedProcess
from tests.browser import WAIT_MS, browser_page, picture
from tests.studies import SEQS, SIMULATED, environment

pytestmark = [pytest.mark.slow, pytest.mark.browser]

TOKENS = "engine.args.max_num_batched_tokens"
# Someone who has chosen "Model training" once; a first visit opens an assistant beside the page.
RETURNING = """
localStorage.setItem("mlflow.workflowType_v1", '"machine_learning"');
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""

# The column is shown for the study's own run, the baseline and six trials, and falls.
SORTED = """() => {
  const top = cell => cell.getBoundingClientRect().top;
  const cells = [...document.querySelectorAll("[role=gridcell][col-id='metrics.`tokens_per_s`']")];
  const values = cells.sort((a, b) => top(a) - top(b)).map(cell => parseFloat(cell.innerText)).filter(v => !isNaN(v));
  return cells.length === 8 && values.length === 7 && values.every((v, at) => at === 0 || v <= values[at - 1]);
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a study called `tuned` was run and logged."""
    folder = tmp_path_factory.mktemp("ui")
    space = [f"{SEQS}=tag(log,int(interval(8,256)))", f"{TOKENS}=choice(1024,2048,4096)"]
    longer = ["scenario.min_queries=600", "backend.pace=0.004"]  # to show some course over time
    words = [*SIMULATED[:-1], *space, "study=tuned", "n_trials=6", *longer]
    command = [sys.executable, "-m", "autotune", "-m", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder), timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of an MLflow server on the study's database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    database = f"sqlite:///{folder}/multirun/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
    log = folder / "server.log"
    with GuardedProcess([*command, "--host", "127.0.0.1", "--port", str(port)], log, {}, stop_timeout_s=5) as process:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + WAIT_MS / 1000
        while not answers(f"{address}/health"):
            assert process.exit_code() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture
def page(server: str) -> Iterator[Page]:
    with browser_page(1440, 900, RETURNING) as page:
        page.goto(f"{server}/#/experiments/1/runs")
        yield page


def test_trials_are_sorted_selected_and_compared(page: Page):
    study = page.get_by_role("row").filter(has=page.get_by_role("link", name="tuned", exact=True))
    study.get_by_role("button").first.click()  # its trials, below it
    expect(page.get_by_role("link", name="baseline", exact=True)).to_be_visible()

    page.get_by_role("button", name="Sort:").click()
    page.get_by_role("menu").get_by_text("tokens_per_s", exact=True).click()
    page.keyboard.press("Escape")
    page.wait_for_function(SORTED)
    picture(page, "mlflow-runs")

    boxes = page.get_by_role("checkbox", name="Press Space to toggle row selection").filter(visible=True)
    for box in sorted(boxes.all(), key=top)[:4]:
        box.check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("Comparing 4 Runs")).to_be_visible()
    plot = page.locator(".js-plotly-plot .parcoords, .js-plotly-plot .parcoords-line-layers").first
    expect(plot).to_be_visible()
    picture(page, "mlflow-compare")


def test_study_shows_its_summary_and_holds_its_report(page: Page):
    page.get_by_role("link", name="tuned", exact=True).click()
    expect(page.get_by_text("Study tuned: 6 trials, 0 failed")).to_be_visible()
    picture(page, "mlflow-study")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("report.html", exact=True).first.click()
    report = page.frame_locator("iframe").first
    expect(report.locator("#headline")).to_be_visible()
    expect(report.locator(".plot[data-drawn]").first).to_be_attached()
    picture(page, "mlflow-report")


def test_trial_shows_its_course_over_time(page: Page, folder: Path):
    client = MlflowClient(f"sqlite:///{folder}/multirun/mlflow.db")
    trial = client.search_runs(["1"], "tags.trial = 'baseline'")[0]
    page.goto(f"{page.url.split('#')[0]}#/experiments/1/runs/{trial.info.run_id}/model-metrics")
    so_far = page.get_by_role("figure").filter(has_text=re.compile(r"^\s*run\s*\(\d+\)"))  # tokens/s, samples/s, …
    expect(so_far.first).to_be_visible()
    expect(page.get_by_role("heading", name="tokens_per_s").first).to_be_visible()
    picture(page, "mlflow-course")


def test_best_configuration_is_found_by_the_studys_name(page: Page):
    page.goto(f"{page.url.split('#')[0]}#/models/tuned")
    expect(page.get_by_text("@ best")).to_be_visible()
    picture(page, "mlflow-registry")


def top(locator: object) -> float:
    box = locator.bounding_box()  # type: ignore[attr-defined]
    return float(box["y"])
