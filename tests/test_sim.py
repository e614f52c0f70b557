"""The simulator against what it stands for: LoadGen's schedule, measured trials, vLLM's memory."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.config.schema import HOST, Device, Stop
from autotune.errors import InputError
from autotune.measure import steps, trial
from autotune.measure.prepare import prepare, prepare_samples
from autotune.measure.result import Result, State
from autotune.measure.slot import Slot
from autotune.search.simulate import estimate, simulation
from autotune.sim import calibrate
from autotune.sim.backend import SimBackend, _tell_of_window, judge, simulate
from autotune.sim.cost import Cost
from autotune.sim.flags import resolve
from autotune.sim.shape import Shape
from tests import studies
from tests.studies import configured

ROOT = Path(__file__).parent.parent
MEASURED, H100 = ROOT / "datasets/calibration/h100", ROOT / "benchmarks/h100/data/one-gpu"


def simulated(*arguments: str) -> Result:
    """A trial of Llama-3.1-8B on a simulated H100."""
    config = configured("model=llama8b", "backend=sim", *arguments)
    return estimate(simulation(config, config.backend), {})


@pytest.mark.slow
def test_device_agrees_with_the_trials_it_was_fitted_to(monkeypatch: pytest.MonkeyPatch):
    """The limits are those within which an estimate is worth having: 5 % of a rate, 15 % of a p99."""
    monkeypatch.setattr(calibrate, "compose", studies.compose)
    cases = [case for file in sorted(MEASURED.glob("*.json")) for case in calibrate.read(file, file.stem)]
    assert len(cases) >= 13
    for name, errors in calibrate.errors(cases, calibrate.start_device([])).items():
        for metric, error in errors.items():
            if "p50" not in metric:
                assert abs(error) < (0.05 if metric == "samples_per_s" else 0.15), (name, metric, error)


@pytest.mark.slow
def test_calibration_finds_constants_that_were_changed(monkeypatch: pytest.MonkeyPatch):
    """Trials simulated with a slower GPU, given as measured ones, make a device of its speed."""
    monkeypatch.setattr(calibrate, "SLOWER", (1.0,))  # the next test is about several starts
    truth = replace(calibrate.start_device([]), math_efficiency=0.6)
    files = [MEASURED / "reference-offline.json", MEASURED / "offline-2048-tokens.json"]
    cases = [brief(case) for file in files for case in calibrate.read(file, file.stem)]
    slower = [replace(case, measured=case.estimated(truth), start_s=None) for case in cases]
    fitted = calibrate.fit(slower, calibrate.start_device([]))
    assert fitted.math_efficiency == pytest.approx(0.6, rel=0.15)  # other constants take up the rest
    assert all(abs(error) < 0.02 for found in calibrate.errors(slower, fitted).values() for error in found.values())


@pytest.mark.slow
def test_calibration_finds_a_host_that_is_slower():
    """What a step adds on the host shows with few tokens a step."""
    start = calibrate.start_device([])
    truth = replace(start, **{name: 2.2 * getattr(start, name) for name in HOST})
    cases = calibrate.read(H100 / "host-5/interactive-grid/trial-0.json", "trial-0")[:2]  # all at once, and by and by
    slower = [replace(case, measured=case.estimated(truth), start_s=None) for case in map(brief, cases)]
    assert calibrate.fit(slower, start).launch_s == pytest.approx(truth.launch_s, rel=0.1)  # 0.16 from one start alone


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"metrics": {"tpot_p99_ms": 0}}, "metrics.tpot_p99_ms=0: write a number above 0"),
        ({"metrics": {"tpot_p99_ms": None}}, "`metrics.tpot_p99_ms` is null"),
        ({"overrides": ["model=tinyy"]}, "model=tinyy: there is no such option; did you mean tiny?"),
        (
            {"runs": [{"folder": "x", "role": "certify", "qps": 1e15, "verdict": "VALID"}]},
            "scenario.qps=1000000000000000.0: write a number above 0, at most 1000000",
        ),
    ],
)
def test_broken_trial_is_left_out_of_a_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: dict[str, Any], said: str
):
    file = tmp_path / "trial-0.json"
    file.write_text(json.dumps({"state": "complete", "overrides": ["model=tiny"], **broken}))
    assert calibrate.read(file, "trial-0") == []
    assert f"{file} left out: " in (told := capsys.readouterr().err) and said in told and told.count("\n") == 1


def test_trials_of_the_same_name_in_two_studies_are_two(tmp_path: Path):
    one, other = tmp_path / "a/trial-0/result.json", tmp_path / "b/trial-0.json"
    assert calibrate.names([one, other]) == {one: "a/trial-0", other: "b/trial-0"}
    assert calibrate.names([one]) == {one: "trial-0"}
    assert calibrate.names([]) == {}


def test_calibration_begins_with_the_model_and_the_device_that_are_named():
    assert calibrate.start_device(["model=llama8b", "backend=sim", "backend/device=h200"]).name == "H200"
    with pytest.raises(InputError, match="backend: calibrate fits a simulated device; leave it out"):
        calibrate.start_device(["backend=live"])


def test_override_of_a_study_counts_after_that_of_its_user():
    assert calibrate.kept(["model=tiny", "gpus=all", "scenario.qps=1", "scenario.qps=4"]) == [
        "model=tiny",
        "scenario.qps=4",
    ]


def brief(case: calibrate.Case) -> calibrate.Case:
    return replace(case, draws=[(replace(scenario, min_queries=80), samples) for scenario, samples in case.draws])


@pytest.mark.slow
def test_ten_minutes_of_load_take_a_second():
    began = time.process_time()
    found = simulated("scenario=server", "scenario.qps=30", "scenario.min_duration_s=600")
    assert found.metrics["requests"] > 17_000
    assert time.process_time() - began < 3  # 0.4 s of simulation on a quiet machine; the rest loads the data set


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine.args.gpu_memory_utilization=0.1"], "no memory is left for the KV cache"),
        (["engine.args.num_gpu_blocks_override=1", "engine.args.block_size=131072"], "no memory is left for the KV"),
        (["engine.args.gpu_memory_utilization=0.21", "engine.args.max_model_len=131072"], "the KV cache holds"),
        (["engine.args.max_num_seqs=16384", "engine.args.max_num_batched_tokens=16384"], "CUDA out of memory"),
    ],
)
def test_what_does_not_fit_fails_as_vllm_would(arguments: list[str], message: str):
    failed = simulated("scenario=offline", "scenario.min_queries=8", *arguments)
    assert failed.state is State.failed and message in failed.reason
    assert failed.phases["start"] > 30  # what it takes of the budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine.args.max_num_seqs=64", "engine.args.max_num_batched_tokens=32"], "must be at least max_num_seqs"),
        (["engine.args.enable_chunked_prefill=false", "engine.args.max_num_batched_tokens=2048"], "without chunked"),
        (["engine.args.tensor_parallel_size=16"], "H100 has 8"),
        (["engine.args.tensor_parallel_size=3"], "can't be split"),
        (["engine.args.block_size=24"], "multiples of 16"),
        (["engine.args.max_model_len=131073"], "max_model_len=131073: the model takes at most 131072 tokens"),
        (["backend/device=a100", "engine.args.quantization=fp8"], "A100 has no fp8"),
    ],
)
def test_what_vllm_refuses_is_refused_with_the_reason(arguments: list[str], message: str):
    refused = simulated("scenario=offline", *arguments)
    assert refused.state is State.refused and message in refused.reason


@pytest.mark.slow
def test_kv_cache_is_as_large_as_vllm_measured_it():
    """462,944 tokens with vLLM's defaults, 1,046,576 with fp8 and 16,384 tokens a step (vllm.log of the H100)."""
    default = simulated("scenario=offline", "scenario.min_queries=8")
    assert kv_tokens(default) == pytest.approx(462_944, rel=0.01)
    fp8 = ["quantization=fp8", "kv_cache_dtype=fp8", "max_num_batched_tokens=16384", "gpu_memory_utilization=0.94"]
    quantised = simulated("scenario=offline", "scenario.min_queries=8", *(f"engine.args.{flag}" for flag in fp8))
    assert kv_tokens(quantised) == pytest.approx(1_046_576, rel=0.01)


def kv_tokens(result: Result) -> int:
    config = configured("model=llama8b", "backend=sim")
    prepared = prepare(config)
    assert isinstance(prepared.backend, SimBackend)
    device, shape = prepared.backend.config.device, Shape.of(prepared.model.config)
    return Cost(device, shape, resolve(result.args, device, shape)).kv_tokens()


def test_tensor_parallelism_is_faster_and_less_than_twice_as_fast():
    offline = ["scenario=offline", "scenario.min_queries=64"]
    one = simulated(*offline).metrics["samples_per_s"]
    two = simulated(*offline, "engine.args.tensor_parallel_size=2").metrics["samples_per_s"]
    assert one < two < 2 * one


def test_prefix_caching_saves_shared_prompts():
    shared = ["dataset=synthetic", "dataset.records.shared_prefix=0.8", "scenario=offline", "scenario.min_queries=200"]
    without = simulated(*shared).metrics["samples_per_s"]
    cached = simulated(*shared, "engine.args.enable_prefix_caching=true").metrics["samples_per_s"]
    assert cached > 1.5 * without


@pytest.mark.parametrize("stop", ["decided", "failed"])
def test_run_that_is_stopped_is_a_whole_one_without_what_follows(stop: str):
    words = ["scenario=interactive", "scenario.qps=60", "scenario.min_queries=700", f"scenario.stop={stop}"]
    config = configured("model=llama8b", "backend=sim", *words)
    prepared = prepare(config)
    samples, shape = prepare_samples(config, prepared), Shape.of(prepared.model.config)
    device = Device(**config.backend["device"])
    cost = Cost(device, shape, resolve({}, device, shape))
    whole, stopped = (simulate(cost, config.scenario, samples, stop=one) for one in (Stop.never, config.scenario.stop))
    assert len(stopped.requests) < len(whole.requests) == whole.total == stopped.total
    assert judge(stopped.requests, whole.total, config.scenario) == judge(whole.requests, whole.total, config.scenario)


def test_single_stream_never_waits():
    found = simulated("scenario=single_stream", "scenario.min_queries=20").metrics
    assert found["requests"] == 20 and found["ttft_p99_ms"] < 150


DECODER = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "architectures=.'BertForMaskedLM'."),
        ({"architectures": ["LlamaForSequenceClassification"]}, "where …ForCausalLM is one"),
        ({"architectures": None}, "where …ForCausalLM is one"),
        ({"is_encoder_decoder": True}, "where …ForCausalLM is one"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"num_experts": 4}, "how many experts it has, and how many of a token"),
        ({"kv_lora_rank": 512}, "config.json has no qk_rope_head_dim"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "keep a state"),
        ({"mamba_d_state": 16}, "keep a state"),
        ({"model_type": "gpt_neox"}, "gpt_neox has layers without a gate"),
    ],
)
def test_model_that_is_no_decoder_that_is_known_is_said_so(change: dict[str, object], why: str):
    assert Shape.of(DECODER).heads == 4
    with pytest.raises(InputError, match=f"knows decoders, and this model is none.*{why}.*; use backend=live"):
        Shape.of(DECODER | change)


@pytest.mark.parametrize("field", ["rope_scaling", "quantization_config", "intermediate_size", "kv_lora_rank"])
def test_config_with_a_text_in_a_numbers_place_is_one_line(field: str):
    with pytest.raises(InputError, match=r"config\.json"):
        Shape.of(DECODER | {field: "x"})


def test_longest_request_is_left_to_the_model_and_the_memory():
    automatic = simulated("scenario=offline", "scenario.min_queries=8", "engine.args.max_model_len=auto")
    assert automatic.complete and automatic.args["max_model_len"] == -1
    tight = ["engine.args.max_model_len=-1", "engine.args.gpu_memory_utilization=0.25"]
    assert simulated("scenario=offline", "scenario.min_queries=8", *tight).complete


def test_simulated_engine_leaves_the_steps_of_all_its_runs_if_it_is_asked_to(tmp_path: Path):
    words = ["model=llama8b", "backend=sim", "scenario=offline", "scenario.min_queries=20", "scenario.repeats=2"]
    config = configured(*words, "engine.args.max_num_batched_tokens=512", "backend.steps=true", "tracking=none")
    result = trial.run(config, [], tmp_path)
    found = steps.read(tmp_path / steps.NAME, "s")
    assert result.facts["steps"] == f"{len(found)} steps" and found.kv_tokens == kv_tokens(result)
    prepared = prepare(config)
    samples = prepare_samples(config, prepared)
    assert found.model == prepared.model.config and found.args["max_num_batched_tokens"] == 512
    with prepared.backend.start(prepared.model, prepared.args, samples, tmp_path, Slot()) as engine:
        runs = [engine.run(replace(config.scenario, seed=config.scenario.seed + add), tmp_path) for add in (0, 1)]
    sent = [request.sample for run in runs for request in run.requests]
    assert found.column("prefill_tokens").sum() == sum(len(samples.prompts[sample]) for sample in sent)
    assert found.column("decodes").sum() == sum(int(samples.output_tokens[sample]) - 1 for sample in sent)
    t0, t2 = found.column("t0"), found.column("t2")
    assert (np.diff(t0) >= 0).all() and (np.diff(t2) >= 0).all() and (t2 > t0).all()
    assert found.tokens.max() == 512 and found.column("waiting").max() > 0


def test_simulated_engine_leaves_no_steps_by_default(tmp_path: Path):
    config = configured("model=llama8b", "backend=sim", "scenario=offline", "scenario.min_queries=8", "tracking=none")
    assert "steps" not in trial.run(config, [], tmp_path).facts and not (tmp_path / steps.NAME).exists()


def test_window_that_is_not_simulated_is_said_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    _tell_of_window.cache_clear()
    prepared = prepare(configured("model=gpt_oss_20b", "backend=sim"))
    assert not prepared.dry_run().refusal and not prepared.dry_run({"max_num_seqs": 8}).refusal
    said = "simulation: layers that see 128 tokens are treated as if they saw all; long contexts are too slow"
    assert caplog.messages.count(said) == 1
