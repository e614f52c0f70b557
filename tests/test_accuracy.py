"""The gate: other numerics win only if a text is predicted as well as with the baseline's, in prefill and in decode."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray

from autotune.config.schema import AccuracyConfig, BenchmarkConfig, Check, Score
from autotune.data.models import Model
from autotune.data.samples import Samples
from autotune.errors import InputError, MeasureError
from autotune.live import scoring
from autotune.measure import accuracy, rouge
from autotune.measure.accuracy import GAP, NLL, Scores, Text
from autotune.measure.result import Result
from autotune.measure.slot import Slot
from autotune.sweep.launchers import Inline
from tests import standin
from tests.studies import SEQS, asked, study

KV = "engine.args.kv_cache_dtype"
WORSE = {"fp8": 0.2, "fp8_e5m2": 0.001, "int8_per_token_head": 0.0}  # nats a token that its prefill predicts worse
FASTER = {"fp8": 1.2, "fp8_e5m2": 1.3, "int8_per_token_head": 1.1}
DECODES_WORSE = {"int8_per_token_head": 0.1}
Floats = NDArray[np.float64]


class Answering:
    """An engine: each token has a log-probability of its own, less what the numerics take."""

    calls = 0

    def __init__(self, worse: float, decodes_worse: float) -> None:
        self.worse, self.decodes_worse = worse, decodes_worse

    def prefilled(self, texts: Sequence[list[int]]) -> list[Floats]:
        Answering.calls += 1
        return [np.array([-1 - token % 7 - self.worse for token in text[1:]]) for text in texts]

    def decoded(self, prompts: Sequence[tuple[list[int], int]], temperature: float) -> list[tuple[list[int], Floats]]:
        if not temperature:  # as much of the question as its numerics let it remember
            Answering.calls += 1
            answers = [prompt[: round(len(prompt) * (1 - self.worse))] for prompt, _ in prompts]
            return [(answer, np.zeros(len(answer))) for answer in answers]
        answers = [[prompt[-1], *range(most - 1)] for prompt, most in prompts]
        sure = self.decodes_worse - self.worse  # of what it says, though its own prefill is not
        return [(answer, np.array([-1 - token % 7 + sure for token in answer])) for answer in answers]


class Scored(standin.StandIn):
    """A stand-in that answers; the coarser its KV cache, the faster it is."""

    @contextmanager
    def start(
        self, model: Model, args: Mapping[str, Any], samples: Samples, folder: Path, slot: Slot
    ) -> Iterator[standin.StandInEngine]:
        dtype = args.get("kv_cache_dtype") or "auto"
        with super().start(model, args, samples, folder, slot) as engine:
            made = ScoredEngine(**(vars(engine) | {"speed": FASTER.get(dtype, 1.0), "estimated": False}))
            vars(made).update(vars(Answering(WORSE.get(dtype, 0.0), DECODES_WORSE.get(dtype, 0.0))))
            yield made


class ScoredEngine(standin.StandInEngine, Answering):
    pass


class Mute(Scored):
    """It can't say what it thinks of a text."""

    @contextmanager
    def start(self, *arguments: Any) -> Iterator[standin.StandInEngine]:
        with super().start(*arguments) as engine, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScoredEngine, "prefilled", refused)
            yield engine


def refused(*_: Any) -> None:
    raise MeasureError("vLLM refuses to score texts: max_logprobs is 0")


SCORED = [f"backend._target_={__name__}.Scored", "accuracy.texts=16", "dataset.count=20", "sampler=grid"]


def result(folder: Path, name: str) -> Result:
    return Result.load(folder / "multirun/s" / name)


def samples(*prompts: Sequence[int]) -> Samples:
    tokens = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    return Samples("made", "", tokens, np.full(len(tokens), 100, dtype=np.int32), True, Path())


@pytest.mark.parametrize(
    ("flags", "same"),
    [
        ({"kv_cache_dtype": "fp8"}, False),
        ({"quantization": "fp8_per_block"}, False),
        ({"dtype": "float16"}, False),
        ({"attention_backend": "TRITON_ATTN"}, False),
        ({"moe_backend": "marlin"}, False),
        ({"speculative_config": {"method": "ngram", "rejection_sample_method": "synthetic"}}, False),
        ({"speculative_config": {"method": "ngram"}}, True),
        ({"kv_cache_dtype": "auto", "quantization": None}, True),
        ({"max_num_seqs": 4, "tensor_parallel_size": 2, "kv_offloading_backend": "lmcache", "block_size": 64}, True),
    ],
)
def test_flags_that_decide_numerics(flags: dict[str, Any], same: bool):
    assert (accuracy.numerics(flags, {}) == accuracy.numerics({}, {})) is same
    assert accuracy.numerics(flags, {"VLLM_USE_DEEP_GEMM": "1"}) != accuracy.numerics(flags, {})


def test_texts_are_distinct_and_keep_their_first_and_last_tokens():
    config = AccuracyConfig(texts=2, tokens=3)
    found = accuracy.texts(samples([1, 2, 3, 4], [1, 9, 3, 4], [7], [5, 6], [8, 9]), config)
    assert found == [Text([1, 3, 4], 64), Text([8, 9], 64)]
    with pytest.raises(MeasureError, match="fewer than two texts"):
        accuracy.predicted(Answering(0.0, 0.0), found[:1])


def test_bound_of_a_small_difference_passes_and_that_of_a_large_one_does_not():
    draw = np.random.default_rng(1)
    base, noise = draw.normal(3, 0.5, 256), draw.normal(0, 0.02, 256)
    baseline = Scores("", {NLL: list(base), GAP: [0.0] * 64})

    def over(shift: float) -> float:
        return accuracy.judged(Scores("", {NLL: list(base + noise + shift), GAP: [0.0] * 64}), baseline, 0.03).over

    assert over(0.0) < 0 and over(0.02) < 0 < over(0.03) and over(0.36) == pytest.approx(11, abs=0.2)


def test_coarse_cache_that_prefill_does_not_read_shows_in_the_answers():
    texts = [Text([1, 2, number], 8) for number in range(8)]
    baseline, coarse = (Scores("", accuracy.predicted(Answering(0.0, worse), texts)) for worse in (0.0, 0.1))
    assert baseline.by_text[NLL] == coarse.by_text[NLL]
    found = accuracy.judged(coarse, baseline, 0.03)
    assert found.over > 0 and found.words.startswith("NLL of its decoded answers +0.1000 nats a token")


def test_logits_are_no_log_probabilities():
    with pytest.raises(MeasureError, match=r"leave out engine.args.logprobs_mode"):
        accuracy.predicted(Answering(-20.0, 0.0), [Text([1, 2], 4)] * 2)


def test_fast_and_wrong_trial_is_left_out_and_the_next_of_its_numerics_takes_no_gpu(tmp_path: Path):
    Answering.calls = 0
    said = study(tmp_path, *SCORED, f"{KV}=choice(auto,fp8,fp8_e5m2)", f"{SEQS}=choice(64,32)")
    found = {name: result(tmp_path, name) for name in ("baseline", *(f"trial-{number}" for number in range(6)))}
    assert Answering.calls == 3 * 2  # texts, then answers, for each numerics once
    by_dtype: dict[str, list[Result]] = {}
    for one in found.values():
        by_dtype.setdefault(one.params.get(KV, "auto"), []).append(one)
    assert all(one.feasible and one.accuracy == "same numerics" for one in by_dtype["auto"])
    wrong, spared = sorted(by_dtype["fp8"], key=lambda one: one.state)
    assert not wrong.feasible and wrong.constraints["accuracy"] == pytest.approx(0.2 / 0.03 - 1)
    assert wrong.accuracy == "refused: NLL +0.2000 nats a token, at most +0.2000; 0.03 allowed"
    assert spared.state == "refused" and "whose answers were refused" in spared.reason
    assert all(one.feasible and one.accuracy.startswith("passed: NLL +0.0010") for one in by_dtype["fp8_e5m2"])
    assert by_dtype["fp8_e5m2"][0].intervals["nll_over_baseline"] == pytest.approx([0.001, 0.001])
    assert found["baseline"].phases["accuracy"] > 0
    assert "Best: kv_cache_dtype=fp8_e5m2" in said and "Its answers against the baseline's: passed: NLL" in said
    assert "Left out for their answers" in said and ": refused: NLL +0.2000" in said
    told = {trial.params[KV]: trial.constraints for trial in asked(tmp_path) if "accuracy" in (trial.constraints or {})}
    assert told["fp8"]["accuracy"] > 0 > told["fp8_e5m2"]["accuracy"]


def test_unknown_is_infeasible_until_the_check_is_left_out(tmp_path: Path):
    mute, space = [*SCORED, f"backend._target_={__name__}.Mute"], f"{KV}=choice(auto,fp8)"
    said = study(tmp_path, *mute, space)
    unknown = next(one for number in range(2) if (one := result(tmp_path, f"trial-{number}")).params[KV] == "fp8")
    assert unknown.complete and not unknown.feasible
    why = "vLLM refuses to score texts: max_logprobs is 0"
    assert unknown.accuracy == f"unknown: the baseline's answers have no scores ({why})"
    assert "Best: kv_cache_dtype=fp8" not in said
    assert "Best: kv_cache_dtype=fp8" in study(tmp_path, *mute, space, "accuracy=none")


def test_trial_that_ends_before_the_baseline_is_judged_once_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Inline, "n_jobs", 2)
    said = study(tmp_path, *SCORED, f"{KV}=choice(fp8_e5m2)", f"{SEQS}=choice(2)", "backend.steps=3")
    assert said.index("baseline: tokens_per_s") < said.index("trial-0: accuracy: passed") and "unknown" not in said
    assert asked(tmp_path)[0].constraints["accuracy"] < 0


def test_recipe_is_judged_too_unless_it_is_the_only_baseline(tmp_path: Path):
    recipe = [*SCORED, "model.recipe.args.kv_cache_dtype=fp8", f"{SEQS}=choice(2)"]
    said = study(tmp_path, *recipe, "baseline=[defaults,recipe]")
    assert "recipe is infeasible" in said and "accuracy refused: NLL +0.2000" in said
    (tmp_path / "alone").mkdir()
    study(tmp_path / "alone", *recipe, "baseline=recipe")
    assert result(tmp_path / "alone", "recipe").accuracy == "same numerics"
    assert result(tmp_path / "alone", "trial-0").accuracy.startswith("passed: NLL of its decoded answers +0.0000")


def test_margin_can_be_changed_afterwards(tmp_path: Path):
    space = f"{KV}=choice(fp8)"
    assert "trial-0: accuracy: refused" in study(tmp_path, *SCORED, space)
    said = study(tmp_path, *SCORED, space, "accuracy.margin=0.3")
    assert "trial-0: accuracy: passed" in said and "Best: kv_cache_dtype=fp8" in said


def test_study_of_a_scheduler_scores_nothing(tmp_path: Path):
    Answering.calls = 0
    study(tmp_path, *SCORED, f"{SEQS}=choice(16,32)")
    assert not Answering.calls and not result(tmp_path, "trial-0").accuracy


def test_lossy_speculation_is_checked(tmp_path: Path):
    way = "{method:ngram,num_speculative_tokens:2,rejection_sample_method:synthetic}"
    study(tmp_path, *SCORED, f"engine.args.speculative_config=choice({way})")
    assert 'speculative_config="synthetic"' in result(tmp_path, "trial-0").facts["numerics"]
    assert result(tmp_path, "trial-0").accuracy.startswith("passed")


def test_random_weights_have_no_answers(tmp_path: Path):
    dummy = [*SCORED, "engine.args.load_format=dummy", f"{KV}=choice(auto,fp8)"]
    with pytest.raises(InputError, match=r"accuracy=nll: there are no answers to check, .* write accuracy=none"):
        study(tmp_path, *dummy, "accuracy=nll")
    said = study(tmp_path, *dummy)
    assert "Best: kv_cache_dtype=fp8" in said
    assert "may change them: those of random weights (load_format=dummy) say nothing." in said


def test_simulation_has_no_answers(tmp_path: Path):
    said = study(tmp_path, f"{KV}=choice(auto,fp8)", "sampler=grid", "accuracy=nll", simulated=True)
    assert "may change them: a simulation gives none." in said
    assert not list((tmp_path / "multirun/s").glob("accuracy")) and not result(tmp_path, "baseline").accuracy


def answered(folder: Path, number: int = 40) -> list[str]:
    """Words that have a study's answers scored against references, each in its question."""
    pytest.importorskip("rouge_score")
    told = [
        f"The {at}th report says that river number {at * 7} rose by {at % 9} feet in spring" for at in range(number)
    ]
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps({"input": f"Repeat: {text}", "output": text}) for text in told))
    return [*SCORED[:2], "sampler=grid", f"dataset.path={data}", "accuracy=rouge", "accuracy.texts=30"]


def test_answers_that_lose_rouge_are_refused_and_the_verdict_is_kept(tmp_path: Path):
    Answering.calls = 0
    space = [f"{KV}=choice(fp8,fp8_e5m2)", f"{SEQS}=choice(64,32)"]
    said = study(tmp_path, *answered(tmp_path), *space)
    assert Answering.calls == 3  # each numerics once
    found = [result(tmp_path, name) for name in ("baseline", *(f"trial-{number}" for number in range(4)))]
    assert found[0].accuracy == "same numerics" and found[0].metrics["rouge1"] > 50 and "nll" not in found[0].metrics
    passed = [one for one in found if one.params.get(KV) == "fp8_e5m2"]
    assert all(one.feasible and one.accuracy.startswith("passed: rouge") for one in passed)
    wrong, spared = sorted((one for one in found if one.params.get(KV) == "fp8"), key=lambda one: one.state)
    assert not wrong.feasible and wrong.accuracy.startswith("refused: rouge") and spared.state == "refused"
    low, high = wrong.intervals["rouge1_over_baseline"]
    assert low <= wrong.metrics["rouge1_over_baseline"] <= high < -1
    assert "Best: kv_cache_dtype=fp8_e5m2" in said and "Its answers against the baseline's: passed: rouge" in said
    assert "accuracy: not checked" in study(tmp_path, *answered(tmp_path)[:4], *space, "accuracy=none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=cnn_small"], "the references of dataset=cnn_small are made up; write dataset=cnn_dailymail, "),
        (
            ['{"input": "a", "output": "b"}', '{"input": "a", "output_tokens": 9}'],
            r"record 2: no text of a reference, .*=nll",
        ),
        (['{"input": "a", "output": "b"}', '{"input": "a", "output": ["b"]}'], "record 2"),
        (['{"input": "a", "output": "b"}'], "one record, and a difference takes two or more"),
    ],
)
def test_data_without_references_has_no_rouge(tmp_path: Path, words: list[str], message: str):
    if words[0].startswith("{"):
        (tmp_path / "data.jsonl").write_text("\n".join(words))
        words = [f"dataset.path={tmp_path / 'data.jsonl'}"]
    with pytest.raises(InputError, match=message) as raised:
        study(tmp_path, SCORED[0], "accuracy=rouge", "dataset=file", *words, f"{KV}=choice(auto,fp8)")
    assert "\n" not in str(raised.value) and not (tmp_path / "multirun").exists()


def test_answers_with_nothing_of_the_references_have_no_scores():
    pytest.importorskip("rouge_score")
    texts = [Text([1, 2, number], 8, "quite another text") for number in range(4)]
    model: Any = SimpleNamespace(tokenizer=lambda: SimpleNamespace(decode_batch=lambda ids, **_: ["?"] * len(ids)))
    model.tokenizer_folder = model.folder = Path("/nowhere")
    with pytest.raises(MeasureError, match=r"nothing in common with the references \(rouge1 is 0\)"):
        accuracy.answered(Answering(0.0, 0.0), texts, model, whole=False)


def test_rouge_may_fall_by_its_share_and_no_more():
    draw = np.random.default_rng(1)
    base, noise = draw.normal(30, 9, 4096), draw.normal(0, 4, 4096)

    def over(lost: float) -> float:
        other = Scores("", {"rouge1": list(base * (1 - lost) + noise)})
        return accuracy.judged(other, Scores("", {"rouge1": list(base)}), 0.01).over

    assert over(0.0) < 0 and over(-0.1) < -1 and over(0.005) < 0 < over(0.01)


def test_bounds_of_a_benchmark_hold_for_all_samples_or_by_what_a_part_tells_of_them():
    draw = np.random.default_rng(2)
    rouge1, lengths = list(draw.normal(38.8, 12, 1000)), list(draw.normal(600, 90, 1000))
    mean, total = float(np.mean(rouge1)), sum(lengths)
    scores = Scores("", {"rouge1": rouge1, "gen_len": lengths})

    def over(least: float, most: float, samples: int = 1000) -> float:
        bounds = {"rouge1": Score(least=least), "gen_len": Score(least=0.9 * total, most=most)}
        return accuracy.within(scores, BenchmarkConfig(samples=samples, scores=bounds)).over

    assert over(mean - 1e-6, total + 1) < 0 < over(mean + 1e-6, total + 1)  # all: nothing is left to chance
    assert over(mean - 1, total - 1) > 0
    part = Scores("", {"rouge1": rouge1[:500]})
    bounds = {"rouge1": Score(least=float(np.mean(rouge1[:500])) - 0.1)}
    found = accuracy.within(part, BenchmarkConfig(samples=1000, scores=bounds))
    assert found.over > 0 and "in all 1000 samples" in found.words


def benchmarked(folder: Path, least: float) -> list[str]:
    record = [f"benchmark.{end}=40" for end in ("samples", "accuracy_samples")]
    record += [f"benchmark.scores.{name}.least={least}" for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")]
    record += ["benchmark.scores.gen_len.least=1", "benchmark.scores.gen_len.most=1e6"]
    length = ["dataset.output=natural", "dataset.max_output_tokens=128", "dataset.min_output_tokens=1"]
    return [*answered(folder), "benchmark=llama3_1_8b", *record, *length, "accuracy=mlperf", "accuracy.texts=100"]


def test_benchmarks_bounds_need_no_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rouge, "splitter", lambda: lambda text: [text])
    said = study(tmp_path, *benchmarked(tmp_path, 20), f"{KV}=choice(fp8_e5m2,fp8)")
    baseline = result(tmp_path, "baseline")
    assert baseline.feasible and baseline.accuracy.startswith("passed: ") and baseline.metrics["gen_len"] > 50
    assert "Its answers against MLPerf's bounds: passed" in said
    (tmp_path / "high").mkdir()
    study(tmp_path / "high", *benchmarked(tmp_path / "high", 99), f"{SEQS}=choice(64)")
    baseline, spared = (result(tmp_path / "high", name) for name in ("baseline", "trial-0"))
    assert not baseline.feasible and baseline.accuracy.startswith("refused: rouge2 ") and "needed" in baseline.accuracy
    assert spared.state == "refused" and "whose answers were refused" in spared.reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["benchmark=none"], "is in no benchmark; write benchmark="),
        (["benchmark=deepseek_r1"], "autotune lacks a reader of its data set"),
        (["dataset.output=reference"], "dataset.output=reference: the model itself ends an answer; follow the rule"),
        (["dataset.count=20"], "dataset.count=20: all 40 samples are used.*20 samples instead of 40"),
    ],
)
def test_benchmark_that_cannot_be_scored_is_refused(tmp_path: Path, words: list[str], message: str):
    with pytest.raises(InputError, match=f"accuracy=mlperf: .*{message}"):
        study(tmp_path, *benchmarked(tmp_path, 20), *words, f"{KV}=choice(auto,fp8)")


class Vllm(BaseHTTPRequestHandler):
    """Answers each request for a completion with `status` and `body`."""

    status, body = 200, b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, b'{"error": {"message": "max_logprobs is 0\\nmore"}}', "vLLM refuses to score texts: max_logprobs is 0"),
        (500, b"oops", "vLLM refuses to score texts: HTTP Error 500"),
        (200, b'{"choices": [', r"vLLM did not score texts \(JSONDecodeError"),
        (200, b'{"choices": [{"prompt_logprobs": null}]}', r"vLLM did not score texts \(TypeError"),
        (200, b'{"choices": [{"prompt_logprobs": [null]}]}', r"vLLM did not score texts \(ValueError"),
        (200, b'{"choices": [{"prompt_logprobs": [null, {"8": {"logprob": -1}}]}]}', r"\(KeyError: '9'"),
    ],
)
def test_answer_without_log_probabilities_is_told_in_one_line(status: int, body: bytes, words: str):
    handler = type("Made", (Vllm,), {"status": status, "body": body})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        server: Any = SimpleNamespace(url=url, model="m", check_alive=lambda: None, process=Mock())
        with pytest.raises(MeasureError, match=words) as raised:
            scoring.prefilled(server, [[7, 9]], 5.0, lambda: None)
        http.shutdown()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"numerics": ""}',
        *(f'{{"numerics": "", "by_text": {one}}}' for one in ("{}", '{"nll": [NaN, 1.0]}')),
    ],
)
def test_damaged_scores_are_measured_again(tmp_path: Path, damage: str):
    config, model = AccuracyConfig(check=Check.nll, kept_in=str(tmp_path)), Mock()
    texts = [Text([1, 2, number], 8) for number in range(4)]
    first = accuracy.scored(config, Answering(0.0, 0.0), texts, "", model)
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    assert accuracy.scored(config, Answering(0.0, 0.0), texts, "", model) == first == Scores.load(file)
