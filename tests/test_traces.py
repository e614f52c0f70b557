"""Traces: each public form is read as it is, a wrong row is named, and prompts are made of their lengths and ids."""

import gzip
import json
import logging
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.config.command_line import compose
from autotune.config.schema import DatasetConfig, Kind, ScenarioConfig
from autotune.data import samples, traces
from autotune.data.models import Model, build_shape
from autotune.data.prompts import MadeUp
from autotune.data.samples import Samples
from autotune.errors import InputError
from autotune.measure import traffic, trial
from autotune.measure.backend import RequestTiming
from autotune.measure.metrics import begun_before
from autotune.sim.kv_cache import prefix_keys


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("trace") / "model"
    folder.mkdir()
    build_shape(folder, vocab_size=512)
    return Model(str(folder), None, folder)


def load(model: Model, name: str, body: str | bytes, piece_tokens: int | None = None, **settings: Any) -> Samples:
    path = model.folder.parent / name
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    fields: dict[str, Any] = {"path": str(path), "piece_tokens": piece_tokens, **settings.pop("records", {})}
    config = DatasetConfig(
        name="trace", path=str(path), records=fields, min_output_tokens=1, max_output_tokens=1_000_000, **settings
    )
    return samples.prepare(config, model, model.folder.parent / "cache", partial(traces.records, **fields))


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


OWN = [{"at_s": 1.5, "prompt_tokens": 20, "output_tokens": 3}, {"at_s": 0.5, "prompt_tokens": 7, "output_tokens": 1}]
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
FORMS: dict[str, tuple[str, str | bytes]] = {
    "our own": ("t.jsonl", lines(*OWN)),
    "our own as CSV": ("t.csv", "at_s,prompt_tokens,output_tokens\n1.5,20,3\n0.5,7,1\n"),
    "our own, packed": ("t.jsonl.gz", gzip.compress(lines(*OWN).encode())),
    "Mooncake": (
        "t.jsonl",
        lines(
            {"timestamp": 1000, "input_length": 20, "output_length": 3, "hash_ids": [46]},
            {"timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": []},
        ),
    ),
    "Qwen-Bailian": (
        "t.jsonl",
        lines(
            {"chat_id": 1, "timestamp": 1.0, "input_length": 20, "output_length": 3, "hash_ids": [46, 9], "turn": 1},
            {"chat_id": 2, "timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": [3], "turn": 1},
        ),
    ),
    "Azure 2023": ("t.csv", f"{AZURE}2023-11-16 18:15:46.6805900,20,3\n2023-11-16 18:15:45.6805900,7,1"),
    "Azure 2024": ("t.csv", f"{AZURE}2024-05-10 00:00:01.5+00:00,20,3\n2024-05-10 00:00:00.5+00:00,7,1\n"),
    "BurstGPT": ("t.csv", f"{BURST}6,,,ChatGPT,20,3,23,API log\n5,,,GPT-4,9,0,9,API log\n5.0,,,GPT-4,7,1,8,API log\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_trace_is_read_in_each_form(model: Model, form: str):
    found = load(model, *FORMS[form])
    assert found.arrivals is not None and found.arrivals == pytest.approx([1.0, 0.0])
    assert found.prompt_tokens.tolist() == [20, 7] == [len(prompt) for prompt in found.prompts]
    assert found.output_tokens.tolist() == [3, 1] and found.ignore_eos


def test_requests_that_failed_and_prompts_that_are_too_long_are_left_out_and_counted(
    model: Model, caplog: pytest.LogCaptureFixture
):
    body = f"{BURST}6,,,ChatGPT,20,3,23,API log\n5,,,GPT-4,9,0,9,API log\n5.0,,,GPT-4,700,1,701,API log\n"
    with caplog.at_level(logging.INFO):
        found = load(model, "t.csv", body, records={"max_prompt_tokens": 100})
    assert found.prompt_tokens.tolist() == [20]
    assert "1 requests left out, without output tokens: they failed" in caplog.text
    assert "1 requests left out, longer than dataset.records.max_prompt_tokens=100" in caplog.text


def test_bound_of_0_tokens_is_a_bound(model: Model):
    with pytest.raises(InputError, match="no records"):
        load(model, *FORMS["Azure 2023"], records={"max_prompt_tokens": 0})


def test_texts_with_times_are_a_trace_and_those_without_are_refused(model: Model):
    batch = {"custom_id": "1", "at_s": 2, "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}}
    found = load(model, "t.jsonl", lines({"at_s": 3, "prompt": "Hello", "output_tokens": 4}, batch))
    assert found.arrivals is not None and found.arrivals.tolist() == [1.0, 0.0]
    assert found.output_tokens.tolist() == [4, 9]
    assert model.tokenizer().decode(found.prompts[1].tolist()) == "User: Hi\nAssistant:"
    without = load(model, "t.jsonl", lines({"prompt": "Hello", "output_tokens": 4}))
    assert without.arrivals is None
    with pytest.raises(InputError, match=r"t\.jsonl: its requests have no times.*write `at_s`"):
        traffic.check(ScenarioConfig("s", Kind.Trace), without, searches=False)


GOOD = '{"at_s": 1, "prompt_tokens": 2, "output_tokens": 3}\n'


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("t.jsonl", "", "no records"),
        ("t.jsonl", b"PK\3\4\xff", "t.jsonl, line 1, byte 5: not utf-8 text"),
        (
            "t.jsonl",
            "[1]",
            "record 1: int instead of an object with `at_s`, `prompt_tokens` and `output_tokens`, or",
        ),
        ("t.jsonl", '{"a": 1}', "record 1: no trace among a; write `at_s`, `prompt_tokens` and"),
        ("t.jsonl", GOOD * 3 + "{", "record 4: not JSON"),
        ("t.jsonl", GOOD + lines({"prompt_tokens": 2, "output_tokens": 3}), "record 2: no `at_s`"),
        ("t.jsonl", GOOD + lines({"at_s": 1, "output_tokens": 3}), "record 2: no `prompt_tokens`"),
        ("t.jsonl", GOOD + '{"at_s": NaN, "prompt_tokens": 2, "output_tokens": 3}', "record 2: `at_s` must be a num"),
        ("t.jsonl", GOOD + '{"at_s": 1e99, "prompt_tokens": 2, "output_tokens": 3}', "record 2: `at_s` must be a num"),
        ("t.jsonl", GOOD + '{"at_s": true, "prompt_tokens": 2, "output_tokens": 3}', "record 2: `at_s` must be a num"),
        ("t.jsonl", GOOD + '{"at_s": 1, "prompt_tokens": -2, "output_tokens": 3}', "`prompt_tokens` must be a whole"),
        ("t.jsonl", GOOD + '{"at_s": 1, "prompt_tokens": 0, "output_tokens": 3}', "`prompt_tokens` must be 1 or more"),
        ("t.jsonl", GOOD + '{"at_s": 1, "prompt_tokens": 2.5, "output_tokens": 3}', "and is '2.5'"),
        ("t.jsonl", GOOD + '{"at_s": 1, "prompt_tokens": 9e99, "output_tokens": 3}', "and is '9e+99'"),
        ("t.jsonl", GOOD + '{"at_s": 1, "prompt_tokens": "x", "output_tokens": 3}', "and is 'x'"),
        ("t.jsonl", GOOD + '{"at_s": 1, "prompt": "x", "output_tokens": 3}', "record 2: no `prompt_tokens`"),
        ("t.csv", f"{AZURE}2023-11-16 18:15:46,20,3\nyesterday,7,1\n", "record 2: `TIMESTAMP` must be a date and time"),
        ("t.csv", f"{AZURE}2023-11-16 18:15:46,20\n", "record 1: no `GeneratedTokens`"),
        ("t.csv", f"{BURST}1,,,x,20,0,20,API log\n", "no records"),
        ("t.csv", "at_s,at_s,prompt_tokens,output_tokens\n0,1,2,3\n", "line 1: two columns are called 'at_s'"),
        ("t.jsonl", lines({"at_s": 1, "messages": []}), "record 1: `messages` is empty"),
        ("t.jsonl", lines({"at_s": 1, "prompt": "a", "max_tokens": "x"}), "`max_tokens` must be a whole number from 1"),
        (
            "t.jsonl",
            lines({"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": [1, 2]}),
            "2 `hash_ids` of 512 tokens each are more than `input_length`=20; write dataset.records.piece_tokens=",
        ),
        (
            "t.jsonl",
            lines({"timestamp": 0, "input_length": 20, "output_length": 3, "hash_ids": ["a"]}),
            "`hash_ids` must be a list of whole numbers",
        ),
    ],
)
def test_wrong_trace_is_named_by_file_record_and_field(model: Model, name: str, body: str | bytes, message: str):
    with pytest.raises(InputError) as caught:
        load(model, name, body)
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def mooncake(*rows: tuple[int, list[int]]) -> str:
    return lines(*({"timestamp": 0, "input_length": n, "output_length": 1, "hash_ids": ids} for n, ids in rows))


def test_prompts_share_what_their_ids_say_and_nothing_else(model: Model):
    rows = [(150, [7, 8]), (128, [7, 8]), (100, [7, 9]), (150, []), (150, []), (64, [9]), (3, [8]), (40_000, [])]
    found = load(model, "t.jsonl", mooncake(*rows), piece_tokens=64)
    first, same, other, alone, another, moved, short, long = (prompt.tolist() for prompt in found.prompts)
    assert [len(prompt) for prompt in (first, same, other, alone, another, moved, short, long)] == [n for n, _ in rows]
    assert same == first[:128] and other[:64] == first[:64] and short == first[64:67] and moved[:36] == other[64:]
    assert other[64:80] != first[64:80] and alone[:16] != another[:16] != first[:16] != moved[:16]
    blocks = [key for row in (0, 2, 3, 4, 5) for key in prefix_keys(found.prompts[row], 16)]
    assert len(blocks) - len(set(blocks)) == 4  # those of the piece that two of them begin with


def test_prompts_are_the_same_each_time_and_after_they_were_saved(model: Model):
    body = mooncake((150, [7, 8]), (90, []))
    one = load(model, "t.jsonl", body, piece_tokens=64)
    again = Samples.load(one.path)
    assert isinstance(again.prompts, MadeUp) and again.checksum == one.checksum
    assert [prompt.tolist() for prompt in again.prompts] == [prompt.tolist() for prompt in one.prompts]
    assert one.prompts[-1].tolist() == one.prompts[1].tolist()
    with pytest.raises(IndexError):
        one.prompts[2]


def test_million_prompts_differ_within_a_block():
    text = np.arange(500, dtype=np.int32).repeat(3)
    empty = np.zeros(0, dtype=np.int64)
    made = MadeUp(np.full(1_000_000, 16), empty, np.zeros(1_000_000, dtype=np.int64), 512, text)
    some = range(0, 1_000_000, 997)
    assert len({made[number].tobytes() for number in some}) == len(some)


def test_what_an_endless_cache_would_find_is_known_from_the_ids(model: Model):
    found = load(model, "t.jsonl", mooncake((150, [7, 8]), (150, [7, 9]), (100, [9]), (64, [7]), (150, [3])), 64)
    sent = [
        RequestTiming(sample, at, at + 1, at + 2, 1, int(found.prompt_tokens[sample]))
        for at, sample in enumerate([1, 0, 2, 3, 4])
    ]
    # 7 is found by the second, 9 by the third, and 7 by the fourth but for the block with its last token.
    assert begun_before(sent, found, 16) == 64 + 64 + 48
    assert begun_before(sent[::-1], found, 16) == 64 + 64 + 48


@pytest.mark.parametrize(
    ("fields", "times", "sent"),
    [
        ({}, [0, 1, 1, 2], [1, 0, 3, 2]),
        ({"scale": 2.0}, [0, 0.5, 0.5, 1], [1, 0, 3, 2]),
        ({"from_s": 0.5, "to_s": 2.0}, [0.5, 0.5], [0, 3]),
        ({"from_s": 1.0, "scale": 0.5}, [0, 0, 2], [0, 3, 2]),
        ({"max_duration_s": 1.5}, [0, 1, 1], [1, 0, 3]),
        ({"max_queries": 2}, [0, 1], [1, 0]),
    ],
)
def test_window_is_sent_at_its_scale(model: Model, fields: dict[str, Any], times: list[float], sent: list[int]):
    rows = [{"at_s": at, "prompt_tokens": 5, "output_tokens": 2} for at in (11.0, 10.0, 12.0, 11.0)]
    found = load(model, "t.jsonl", lines(*rows))
    source = traffic.source(ScenarioConfig("s", Kind.Trace, **fields), found)
    asks = list(source.first())
    assert [ask.at_s for ask in asks] == pytest.approx(times) and [ask.sample for ask in asks] == sent
    assert source.total == len(sent)
    halves = [list(traffic.source(ScenarioConfig("s", Kind.Trace, **fields), found, at, 2).first()) for at in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(asks)


@pytest.mark.parametrize(
    ("fields", "searches", "message"),
    [
        ({"from_s": 5.0}, False, "scenario.from_s=5, scenario.to_s=None: no request of .*, which lasts 2 s, is in"),
        ({"to_s": 1.0}, True, "1 requests, and the test of a limit at p99 takes 459; widen the window"),
    ],
)
def test_window_with_too_little_is_refused(model: Model, fields: dict[str, Any], searches: bool, message: str):
    rows = [{"at_s": at, "prompt_tokens": 5, "output_tokens": 2} for at in (0.0, 2.0)]
    with pytest.raises(InputError, match=message):
        traffic.check(ScenarioConfig("s", Kind.Trace, **fields), load(model, "t.jsonl", lines(*rows)), searches)


@pytest.mark.slow
def test_simulation_finds_in_its_prefix_cache_what_real_vllm_finds(tmp_path: Path):
    """Documents that are asked about again and again in a KV cache that holds a few of them: most are evicted."""
    draw = random.Random(3)
    rows = []
    for number in range(120):
        pieces = draw.randint(1, 4)
        first = draw.randrange(12) if draw.random() < 0.8 else 100 + number
        length = 32 * pieces + draw.randint(1, 120)
        ids = [10 * first + piece for piece in range(pieces)]
        rows.append({"timestamp": 150 * number, "input_length": length, "output_length": 2, "hash_ids": ids})
    (tmp_path / "t.jsonl").write_text(lines(*rows))
    flags = {"enforce_eager": "true", "max_model_len": 512, "block_size": 32, "num_gpu_blocks_override": 41}
    words = ["model=tiny", "scenario=trace", "dataset=trace", f"dataset.path={tmp_path / 't.jsonl'}", "tracking=none"]
    words += ["dataset.records.piece_tokens=32", *(f"engine.args.{name}={value}" for name, value in flags.items())]
    found = {}
    for backend in (["backend=live"], ["backend=sim", "backend/device=cpu"]):
        result = trial.run(compose([*words, *backend])[0], [], tmp_path / backend[0])
        assert result.metrics["requests"] == 120 and result.verdict_by == "autotune"
        found[backend[0]] = [result.metrics[f"prefix_{name}_tokens"] for name in ("hit", "query")]
    assert found["backend=live"] == found["backend=sim"]
    assert result.metrics["evicted_blocks"] > 200 and 0.05 < result.metrics["prefix_lost_share"] < 0.5
