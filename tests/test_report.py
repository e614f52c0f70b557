"""The page about a study: what it says, and that small and odd studies have one."""

import html
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from playwright.sync_api import expect

from autotune.config.schema import (
    Config,
    DatasetConfig,
    Kind,
    ModelConfig,
    ObjectiveConfig,
    ScenarioConfig,
    TrackingConfig,
)
from autotune.measure.result import Result, RunRecord, State
from autotune.results import figures, report
from autotune.results import sections as sections_of
from autotune.results.sections import Section
from autotune.results.study import SPACE as SPACE_FILE
from autotune.results.study import Study
from tests.browser import browser_page
from tests.conftest import Main

SPACE = {
    "engine.args.max_num_seqs": IntDistribution(8, 1024, log=True),
    "engine.args.max_num_batched_tokens": CategoricalDistribution([2048, 4096, 8192]),
    "engine.args.gpu_memory_utilization": FloatDistribution(0.9, 0.95, step=0.01),
    "engine.args.long_prefill_token_threshold": CategoricalDistribution([0, 256]),  # of some trials only
}
METRICS = ("tokens_per_s", "samples_per_s", "ttft_p99_ms", "tpot_p99_ms", "latency_p99_ms")


def config(metrics: list[str], directions: list[str]) -> Config:
    return Config(
        study="s",
        model=ModelConfig(name="m"),
        dataset=DatasetConfig(name="d"),
        scenario=ScenarioConfig("server", Kind.Server, qps=8.0, ttft_ms=2000.0, tpot_ms=100.0),
        objective=ObjectiveConfig("o", metrics, directions),
        tracking=TrackingConfig(enabled=False),
    )


def result(value: float, **changed: Any) -> Result:
    made = Result(
        state="complete",
        metrics={metric: value * (at + 1) for at, metric in enumerate(METRICS)},
        constraints={"ttft_p99": -0.5},
        verdict="VALID",
        args={"dtype": "bfloat16"},
        phases={"start": 30.0, "run": 60.0},
        start={"import": 10.0, "compile": 20.0},
        command=["vllm", "serve", "m", "--max-num-seqs", "8"],
        facts={"vllm": "0.32.0", "node": "n1"},
    )
    for name, field in changed.items():
        setattr(made, name, field)
    return made


def study(
    folder: Path,
    trials: list[Result],
    baseline: Result | None = None,
    metrics: tuple[str, ...] = ("tokens_per_s",),
    directions: tuple[str, ...] = ("maximize",),
    space: dict[str, Any] = SPACE,
) -> Study:
    """A study as its trials leave it in `folder`, with parameters drawn from `space`."""
    draw = random.Random(0)
    (folder / SPACE_FILE).write_text(
        json.dumps({name: json.loads(distribution_to_json(distribution)) for name, distribution in space.items()})
    )
    results = {"baseline": baseline} if baseline else {}
    for number, one in enumerate(trials):
        one.params = {name: drawn(distribution, draw) for name, distribution in space.items()}
        if number % 3 == 0:
            one.params.pop("engine.args.long_prefill_token_threshold", None)
        results[f"trial-{number}"] = one
    for one in results.values():
        one.values = [one.metrics[metric] for metric in metrics] if one.complete else []
    return Study(folder, config(list(metrics), list(directions)), results)


def drawn(distribution: Any, draw: random.Random) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return draw.choice(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return draw.randint(distribution.low, distribution.high)
    return round(draw.uniform(distribution.low, distribution.high), 2)


def sections(one: Study) -> dict[str, Section]:
    return {section.title: section for section in report.sections(one)}


def text(page: str) -> str:
    """What is read of a page, on one line."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def values(count: int) -> list[float]:
    draw = random.Random(1)
    return [draw.uniform(900, 1100) for _ in range(count)]


def test_best_is_compared_with_the_baseline_and_its_interval(tmp_path: Path):
    best = result(1200, intervals={"tokens_per_s": [1190, 1210]})
    page = text(report.page(study(tmp_path, [result(900), best], result(1000))))
    assert "+20.0%: 1,200 tokens/s (1,190 to 1,210), against 1,000 with vLLM's defaults" in page
    assert "vllm serve m --max-num-seqs 8 Copy" in page


def test_defaults_that_win_are_said_to_win(tmp_path: Path):
    page = text(report.page(study(tmp_path, [result(900)], result(1000))))
    assert "1,000 tokens/s: vLLM's defaults; no trial beat them" in page


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (1200, "+20.0%: 1,200 tokens/s, against 1,000 with vLLM's defaults, +9.1% against 1,100 with the recipe"),
        (1050, "1,100 tokens/s: the recipe; no trial beat it, +10.0% against 1,000 with vLLM's defaults"),
    ],
)
def test_recipe_stands_beside_the_defaults(tmp_path: Path, best: float, words: str):
    recipe = result(1100, values=[1100.0], params={"engine.args.speculative_config": {"method": "ngram"}})
    made = study(tmp_path, [result(best)], result(1000))
    made.results["recipe"] = recipe
    page = text(report.page(made))
    assert words in page and ("recipe 1,100" in page or best < 1100)


def test_edge_that_the_best_stands_on_is_said_at_the_top(tmp_path: Path):
    best = result(1200)
    best.metrics["queued_tpot_p99_ms"] = 95.0  # of the 100 that are allowed
    page = report.page(study(tmp_path, [best], result(1000)))
    assert "Close to a limit: while requests queue" in text(page[: page.index("</header>")])


def test_verdict_of_the_repeats_is_said_at_the_top(tmp_path: Path):
    one = study(tmp_path, [result(1200)], result(1000))
    (tmp_path / "verify.json").write_text('{"line": "Better than the defaults: trial-0, +18.0% in 5 repeats."}')
    page = report.page(one)
    assert "Verified. Better than the defaults: trial-0, +18.0%" in text(page[: page.index("</header>")])


def test_every_figure_is_drawn_of_a_study_that_has_all(tmp_path: Path):
    latencies = {qps: {"ttft_p99_ms": qps, "tpot_p99_ms": qps} for qps in (4.0, 8.0)}
    runs = [RunRecord(f"run-{qps}", "probe", qps, "VALID", metrics=found) for qps, found in latencies.items()]
    trials = [result(value, bound="kv" if value > 1000 else "tokens", runs=runs) for value in values(20)]
    drawn = sections(study(tmp_path, trials, result(1000, runs=runs)))
    assert {title: section.missing for title, section in drawn.items() if section.missing} == {}
    assert len(drawn["Parameter importance"].plots) == 2  # fANOVA and PED-ANOVA
    assert len(drawn["One parameter at a time"].plots) == len(SPACE)
    assert "limit 2,000 ms" in drawn["Latency over load"].plots[0].to_json()


@pytest.mark.slow
def test_hover_over_the_front_shows_the_whole_configuration(tmp_path: Path):
    two = ("tokens_per_s", "latency_p99_ms")
    one = study(tmp_path, [result(value) for value in values(8)], metrics=two, directions=("maximize", "minimize"))
    figure = sections(one)["Pareto front"].plots[0].to_json()
    assert "max_num_seqs" in figure and "bfloat16" in figure and "engine.args." not in figure
    assert "8 trials on the Pareto front" in text(report.page(one))


@pytest.mark.parametrize(
    ("trials", "baseline", "said"),
    [
        pytest.param([], None, ["No trial has completed.", "no trial completed"], id="nothing ran"),
        pytest.param([Result(State.interrupted)], None, ["No trial has completed."], id="stopped in its first trial"),
        pytest.param(
            [result(900, metrics=dict.fromkeys(METRICS, math.nan))], None, ["needs 4 trials"], id="not a number"
        ),
        pytest.param([result(900)], None, ["no usable baseline", "needs 4 trials that completed"], id="one trial"),
        pytest.param(
            [Result(reason="StartError: out of memory on GPU 1"), Result(reason="StartError: out of memory on GPU 2")],
            Result(reason="StartError: no weights"),
            ["No trial has completed.", "2 StartError: out of memory on GPU 1", "1 StartError: no weights"],
            id="all failed",
        ),
        pytest.param(
            [result(900) for _ in range(6)], result(900), ["every trial measured the same value"], id="constant"
        ),
        pytest.param(
            [result(value, constraints={"ttft_p99": 0.5}) for value in values(6)],
            result(900),
            ["vLLM's defaults, the only feasible configuration"],
            id="none feasible",
        ),
        pytest.param([result(value) for value in values(6)], None, ["every trial ran at one load"], id="no baseline"),
    ],
)
def test_odd_study_has_a_report_that_says_why_parts_are_missing(
    tmp_path: Path, trials: list[Result], baseline: Result | None, said: list[str]
):
    page = text(report.page(study(tmp_path, trials, baseline)))
    for words in said:
        assert words in page
    assert "could not be drawn" not in page and "GPU busy" not in page


@pytest.mark.parametrize(
    ("metrics", "directions", "space"),
    [
        (("tokens_per_s",), ("maximize",), {"engine.args.max_num_seqs": IntDistribution(8, 1024)}),
        (("ttft_p99_ms",), ("minimize",), {"engine.args.block_size": CategoricalDistribution([16])}),
        (("tokens_per_s", "ttft_p99_ms", "tpot_p99_ms"), ("maximize", "minimize", "minimize"), SPACE),
        (("tokens_per_s",), ("maximize",), {"scenario.qps": FloatDistribution(1, 64, log=True)}),
    ],
    ids=["one parameter", "one value", "three objectives", "load swept"],
)
def test_every_space_and_objective_has_a_report(
    tmp_path: Path, metrics: tuple[str, ...], directions: tuple[str, ...], space: dict[str, Any]
):
    one = study(tmp_path, [result(value) for value in values(8)], result(1000), metrics, directions, space)
    page = report.page(one)
    assert "could not be drawn" not in text(page) and 'class="plot"' in page


def test_study_whose_files_were_edited_by_hand_has_a_report(tmp_path: Path):
    one = study(tmp_path, [result(value, verdict="\ud800") for value in values(8)], result(1000))
    written = json.loads((tmp_path / SPACE_FILE).read_text())
    written["engine.args.max_num_batched_tokens"]["attributes"]["choices"] += [[1], {"a": [1]}]
    (tmp_path / SPACE_FILE).write_text(json.dumps(written))
    assert "could not be drawn" not in text(report.write(one).read_text())


def test_best_that_loadgen_calls_invalid_is_said_to_be(tmp_path: Path):
    best = result(900, verdict="INVALID", reasons=["shorter than min_duration"])
    assert "LoadGen says INVALID: shorter than min_duration." in text(report.page(study(tmp_path, [best])))


def test_page_says_where_the_time_went(tmp_path: Path):
    section = sections_of.phases(study(tmp_path, [result(5.0), result(6.0)]))
    assert section.text.startswith("3.0 min in all: start 33%, run 67%.")
    assert section.text.endswith("A start, by the median of each part: import 10 s, compile 20 s.")


def test_estimates_are_marked(tmp_path: Path):
    assert "Estimates of a simulation" in text(report.page(study(tmp_path, [result(900, estimated=True)])))


def test_what_a_trial_says_is_no_part_of_the_page(tmp_path: Path):
    reason = "StartError: </script><script>alert(1)</script>"
    args = {"chat_template": "</script><script>alert(2)</script>"}
    page = report.page(study(tmp_path, [Result(reason=reason), *(result(value, args=args) for value in values(5))]))
    assert "<script>alert" not in page


def test_page_asks_nothing_of_the_network(tmp_path: Path):
    page = report.page(study(tmp_path, [result(900)]))
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


@pytest.mark.slow
def test_study_is_found_by_name_and_one_that_is_not_there_is_one_line(main: Main, tmp_path: Path):
    words = ["model=llama8b", "backend=sim", "space=none", "scenario.min_queries=64", "tracking=none", "study=found"]
    done = main("-m", *words, "engine.args.max_num_seqs=choice(8,64)", "n_trials=2")
    assert "Report: multirun/found/report.html" in done.stdout
    (tmp_path / "multirun/found/report.html").unlink()
    assert main("report", "study=found").returncode == 0
    assert (tmp_path / "multirun/found/report.html").exists()
    for words, said in (["study=lost"], "there is found"), (["found"], "found: write key=value, or --help"):
        wrong = main("report", *words)
        assert wrong.returncode == 1 and said in wrong.stderr and wrong.stderr.count("\n") == 1


def test_table_shows_how_busy_the_gpu_was_where_there_was_one(tmp_path: Path):
    busy = result(900)
    busy.metrics |= {"gpu_utilization": 0.838, "gpu_j_per_token": 0.371}
    page = text(report.page(study(tmp_path, [busy])))
    assert "server (Server), 8 queries/s" in page
    assert "GPU busy" in page and "0.838" in page and "J/token" in page


@pytest.mark.slow
@pytest.mark.browser
def test_report_of_500_trials_is_small_opens_fast_and_fits_a_phone_and_paper(tmp_path: Path):
    over = {"ttft_p99": 0.2}
    trials = [result(value, constraints=over) if at % 9 == 0 else result(value) for at, value in enumerate(values(500))]
    one = study(tmp_path, trials, result(800, defaults=dict.fromkeys(SPACE, 8192)))
    path = report.write(one)
    assert path.stat().st_size < 5e6
    with browser_page() as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        for width, height in ((1280, 900), (375, 800)):
            page.set_viewport_size({"width": width, "height": height})
            page.goto(path.as_uri())
            opened_ms = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            assert opened_ms < 10_000  # half a second where nothing else runs
            page.evaluate("plotly().then(() => places.forEach(draw))")
            expect(page.locator(".plot[data-drawn]")).to_have_count(page.locator(".plot").count())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert len(page.pdf(format="A4")) > 50_000
        assert errors == []


def test_trials_that_were_left_early_are_drawn_at_about_the_load_that_they_hold(tmp_path: Path):
    ended = [result(load, metrics={"max_qps": load}) for load in (10.0, 20.0)]
    left = [result(0, state=State.pruned, metrics={"load_at_most": load}) for load in (12.0, 15.0, 18.0)]
    one = study(tmp_path, [*ended, *left], metrics=("max_qps",))
    shown = figures.optuna_study(one, ["max_qps"], ["maximize"])
    assert [trial.values for trial in shown.trials] == [[10.0], [20.0], [12.0], [15.0], [18.0]]
    assert shown.best_value == 20.0
    assert sections(one)["Parameter importance"].plots  # of two trials there is none


def test_expected_is_shown_beside_measured_with_kendalls_tau(tmp_path: Path):
    trials = [result(value, expected={"values": [2 * value], "feasible": True}) for value in (900, 1000, 1100)]
    failed = Result(reason="StartError", expected={"values": [], "feasible": False})
    one = study(tmp_path, [*trials, failed, result(950)], result(800))
    (section,) = sections_of.expectations(one)
    assert section.text.startswith("tokens/s: 3 trials, off by 50.0% (median); Kendall's τ 1.00")
    assert "expected %{x" in section.plots[0].to_json() and "max_num_seqs=" in section.plots[0].to_json()
    assert "Expected and measured" not in sections(study(tmp_path, [result(900)], result(800)))


def test_turns_of_conversations_are_told_one_by_one(tmp_path: Path):
    by_turn = {f"turn{turn}_{name}_p99_ms": 100.0 * turn for turn in (1, 2) for name in ("ttft", "tpot", "latency")}
    one = study(tmp_path, [result(2.0, metrics={**result(2.0).metrics, **by_turn})], result(1.0))
    section = sections(one)["Latency by turn"]
    assert section.rows == [
        ["turn", "", "TTFT", "TPOT", "latency"],
        ["1", "trial-0", "100", "100", "100"],
        ["2", "trial-0", "200", "200", "200"],
    ]
    assert "Latency by turn" not in sections(study(tmp_path, [result(2.0)], result(1.0)))


def test_hits_are_drawn_over_the_kv_caches_use_where_something_was_found(tmp_path: Path):
    found = {"prefix_hit_share": 0.4, "kv_use_max": 0.7, "prefix_lost_share": 0.2}
    one = study(tmp_path, [result(900, metrics={**result(900).metrics, **found}), result(800)])
    (plot,) = sections(one)["Prefix cache"].plots
    assert '"symbol":["x"]' in plot.to_json() and "20% computed again" in plot.to_json()
    assert "Prefix cache" not in sections(study(tmp_path, [result(900)]))


def test_trials_that_broke_a_limit_are_drawn_over_choices_too(tmp_path: Path):
    trials = [result(value, constraints={"ttft_p99": 0.2} if value > 1000 else {}) for value in values(20)]
    one = figures.optuna_study(study(tmp_path, trials), ["tokens_per_s"], ["maximize"])
    for param in ("max_num_seqs", "max_num_batched_tokens"):
        crosses, dots = figures.slice_of(one, param, "tokens_per_s").data
        assert crosses.marker.symbol == "x" and min(crosses.y) > 1000 >= max(dots.y)
        assert len(crosses.x) + len(dots.x) == 20


@pytest.mark.slow
def test_figures_do_without_matplotlib():
    plots = "import autotune.results.figures, optuna; print(optuna.visualization.matplotlib.is_available())"
    assert subprocess.run([sys.executable, "-c", plots], capture_output=True, text=True).stdout == "False\n"
