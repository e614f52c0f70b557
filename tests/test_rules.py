"""MLPerf's rules: what is refused or recorded, and that records and settings are LoadGen's own."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg
import pytest

from autotune.config.schema import BenchmarkConfig, Config, Kind, Rules
from autotune.errors import InputError
from autotune.measure import arrivals, rules
from autotune.measure.prepare import configured_flags
from tests.studies import configured, study

CLOSED = ["model=llama8b", "dataset=cnn_dailymail", "rules=closed"]
BENCHMARKS = ["llama3_1_8b", "llama3_1_8b_edge", "llama2_70b", "deepseek_r1", "gpt_oss_120b", "llama3_1_405b"]


def check(*words: str) -> Config:
    """The configuration of `words`, if it keeps the rules that it names."""
    config = configured(*words)
    rules.check(config, configured_flags(config))
    return config


def official(name: str, kind: Kind) -> Any:
    """The settings in LoadGen's own mlperf.conf."""
    settings = lg.TestSettings()
    assert settings.FromConfig("", name, kind.value, 0) == 0
    return settings


def scenarios(benchmark: BenchmarkConfig) -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, one in asdict(benchmark.scenarios).items() if one["loadgen"]]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_record_says_what_loadgens_own_configuration_says(name: str):
    benchmark = configured(f"benchmark={name}").benchmark
    assert scenarios(benchmark)
    for scenario, record in scenarios(benchmark):
        kind = rules.KINDS[scenario]
        settings = official(record["loadgen"], kind)
        assert settings.min_query_count == record["min_queries"]
        assert settings.performance_sample_count_override == benchmark.samples
        assert settings.accuracy_sample_count_override == (benchmark.accuracy_samples or 0)
        assert settings.min_duration_ms == rules.LEAST_S * 1e3
        assert settings.sample_concatenate_permutation and settings.use_token_latencies
        assert [settings.qsl_rng_seed, settings.sample_index_rng_seed, settings.schedule_rng_seed] == rules.SEEDS
        if kind is Kind.Server:
            limits = settings.ttft_latency / 1e6, settings.tpot_latency / 1e6
            assert limits == (record["ttft_ms"], record["tpot_ms"])


def user_conf(words: Sequence[str], folder: str) -> tuple[str, dict[str, Any]]:
    """The user.conf for `words`, and where LoadGen's settings then differ from its mlperf.conf."""
    from autotune.live.loadgen import by_benchmark, settings

    config = configured(*words)
    scenario, path = config.scenario, Path(folder) / "user.conf"
    made = by_benchmark(scenario, settings(scenario), config.benchmark.samples or 0, path)
    assert scenario.benchmark
    before = official(scenario.benchmark, scenario.kind)
    names = [name for name in dir(made) if not name.startswith("_") and name not in ("FromConfig", "scenario")]
    pairs = {name: (getattr(made, name), getattr(before, name)) for name in names}
    return path.read_text(), {name: ours for name, (ours, theirs) in pairs.items() if ours != theirs}


@pytest.mark.parametrize(
    ("words", "lines", "differ"),
    [
        (["scenario=server"], "*.Server.target_qps = 9.5\n", {"server_target_qps": 9.5}),
        (["scenario=offline"], "*.Offline.target_qps = 9.5\n", {"offline_expected_qps": 9.5}),
        (
            ["scenario=single_stream", "benchmark=llama3_1_8b_edge", "scenario.qps=2"],
            "*.SingleStream.target_latency = 500.0\n",
            {"single_stream_expected_latency_ns": 5e8},
        ),
        (
            ["scenario=interactive", "rules=open", "scenario.ttft_ms=600.5", "scenario.min_duration_s=60"],
            "*.Server.min_duration = 60000\n*.Server.target_qps = 9.5\n*.Server.ttft_latency = 600.5\n",
            {"min_duration_ms": 60000, "server_target_qps": 9.5, "ttft_latency": 600_500_000},
        ),
    ],
)
def test_user_conf_has_what_differs_from_loadgens_own(
    words: list[str], lines: str, differ: dict[str, Any], tmp_path: Path
):
    with multiprocessing.get_context("fork").Pool(1) as child:  # LoadGen reads a user.conf once in a process
        text, differing = child.apply(user_conf, ([*CLOSED, "scenario.qps=9.5", *words], str(tmp_path)))
    assert (text, differing) == (lines, differ)


@pytest.mark.parametrize("scenario", ["offline", "server", "interactive"])
def test_closed_pins_what_the_rules_ask_for(scenario: str):
    config = check(*CLOSED, f"scenario={scenario}", "scenario.qps=20")
    assert config.rules is Rules.closed
    assert arrivals.least_queries(config.scenario, 13368) % 13368 == 0


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("scenario.min_duration_s=60", "a run lasts 600 s or more"),
        ("scenario.min_queries=99", "a run has 100 queries or more"),
        ("scenario.max_duration_s=700", "a run goes to its end"),
        ("scenario.max_queries=20000", "a run goes to its end"),
        ("scenario.stop=failed", "a run goes to its end"),
        ("scenario.seeds=null", "LoadGen's seeds are MLPerf's"),
        ("scenario.seeds=[1,2,3]", "LoadGen's seeds are MLPerf's"),
        ("scenario.equal_issue=false", "each sample is issued equally often"),
        ("scenario.ttft_ms=1999", "the limit is 2000"),
        ("scenario.tpot_ms=null", "the limit is 100"),
        ("scenario.benchmark=llama3_1-8b-interactive", "LoadGen's settings are those of llama3_1-8b"),
        ("load=concurrency", "LoadGen sends server's requests"),
        ("dataset.output=reference", "the model itself ends an answer"),
        ("dataset.max_output_tokens=64", "an answer has max. 128 tokens"),
        ("dataset.min_output_tokens=2", "an answer has min. 1 tokens"),
        ("dataset.count=100", "all 13368 samples are used"),
        ("dataset=cnn_shaped", "the samples are those of dataset=cnn_dailymail"),
        ("model=llama8b_dummy", "load_format=dummy: the weights are the benchmark's, and not random"),
        ("engine.args.enable_prefix_caching=true", "nothing is kept from one query to the next"),
        ("engine.args.enable_prefix_caching=null", "nothing is kept from one query to the next"),
        ("engine.args.speculative_config={method: ngram}", "allows no speculative decoding"),
        ("benchmark.samples=100", "benchmark.samples=100: the record of the benchmark has 13368"),
        ("benchmark.scores.rouge1.least=1", "the record of the benchmark has 38.391408"),
        ("scenario=custom", "no scenario=custom; write offline or server or interactive"),
        ("benchmark=none", "model=llama8b is in no benchmark"),
        ("benchmark=gpt_oss_120b", "autotune lacks answers at temperature 1"),
        ("scenario.audit={mode: 2}", "the settings of no compliance test"),
    ],
)
def test_closed_refuses_what_breaks_a_rule_and_names_it(word: str, rule: str):
    scenario = "offline" if word == "benchmark=none" else "server"
    words = [*CLOSED, f"scenario={scenario}", word]
    with pytest.raises(InputError, match=rule.replace(".", r"\.")):
        check(*words)


def test_missing_code_execution_is_refused_by_name_for_answers():
    with pytest.raises(InputError, match=r"deepseek-r1 autotune lacks .*execution of generated code"):
        check("model=deepseek_r1", "rules=open", "scenario=offline", "scenario.mode=accuracy")


def test_interactive_deepseek_may_decode_speculatively():
    words = ["model=deepseek_r1", "rules=open", "engine.args.speculative_config={method: mtp}"]
    found = {name: configured(*words, f"scenario={name}") for name in ("server", "interactive")}
    told = {name: rules.deviations(one, configured_flags(one)) for name, one in found.items()}
    assert any("speculative" in line for line in told["server"])
    assert not any("speculative" in line for line in told["interactive"])


def test_open_records_each_deviation():
    words = ["model=llama8b", "rules=open", "scenario=server", "scenario.min_duration_s=60", "dataset.count=100"]
    config = check(*words)
    found = rules.deviations(config, configured_flags(config), 100)
    assert [line.partition(":")[0] for line in found] == [
        "scenario.min_duration_s=60",
        "dataset.count=100",
        "dataset=cnn_shaped",  # whose texts are made up
        "dataset=cnn_shaped",  # of which there are 100
    ]
    assert rules.told(config, found)[1:] == [f"  deviates from closed: {line}" for line in found]
    assert "Unverified" in rules.told(config, found)[0]


def test_tuning_has_no_accuracy_run():
    with pytest.raises(InputError, match="write rules=closed"):
        check("model=llama8b", "scenario.mode=accuracy")


def test_space_that_breaks_a_rule_is_refused_before_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["rules=closed", "scenario.min_queries=13368", "engine.args.enable_prefix_caching=choice(true,false)"]
    monkeypatch.setattr(rules, "_samples", lambda config, samples: [])  # the data set of 13,368 is not here
    (tmp_path / "own.jsonl").write_text('{"input": "a", "output": "b"}')
    words.append(f"dataset.path={tmp_path / 'own.jsonl'}")
    with pytest.raises(InputError, match=r"enable_prefix_caching: its value .* leave it out of the space"):
        study(tmp_path, *words)


def test_study_by_open_rules_tells_deviations_and_that_it_is_unverified(tmp_path: Path):
    words = ["rules=open", "scenario.min_duration_s=0", "engine.args.max_num_seqs=choice(64,128)", "n_trials=2"]
    said = study(tmp_path, *words)
    assert "Unverified: MLCommons has not reviewed it." in said
    assert "deviates from closed: scenario.min_duration_s=0: a run lasts 600 s or more" in said


@pytest.mark.parametrize("name", ["offline", "server", "interactive"])
def test_submission_asks_for_what_closed_pins(name: str):
    config = configured(*CLOSED, f"scenario={name}", "scenario.qps=20")
    assert rules.asked(config.benchmark, name, 20.0) == config.scenario
