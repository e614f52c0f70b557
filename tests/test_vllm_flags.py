"""Flags as vLLM reads them: what both backends take, refuse and hand on."""

import json
from typing import Any

import pytest

from autotune.config.vllm_flags import changes, command_line, read, recorded
from autotune.errors import InputError

JSON_CONFIG = {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2]}


@pytest.mark.parametrize(
    ("name", "written", "means"),
    [
        ("max_model_len", "4k", 4000),
        ("max_model_len", "1K", 1024),
        ("max_model_len", "25.6k", 25600),
        ("max_model_len", "auto", -1),
        ("max_model_len", -1, -1),
        ("max_num_batched_tokens", "8k", 8000),
        ("kv_cache_memory_bytes", "2G", 2 << 30),
        ("max_num_seqs", "501", 501),
        ("max_num_seqs", 501, 501),
        ("gpu_memory_utilization", "0.9", 0.9),
        ("gpu_memory_utilization", 1, 1.0),
        ("enforce_eager", True, True),
        ("quantization", "None", None),
        ("max_num_seqs", None, None),
        ("optimization_level", 2, "2"),
        ("cudagraph_capture_sizes", 4, [4]),
        ("cudagraph_capture_sizes", "[1, 2]", [1, 2]),
        ("compilation_config", json.dumps(JSON_CONFIG), JSON_CONFIG),
        ("compilation_config", JSON_CONFIG, JSON_CONFIG),
        (
            "speculative_config",
            {"method": "ngram", "num_speculative_tokens": 4},
            {"method": "ngram", "num_speculative_tokens": 4},
        ),
        ("kv_transfer_config", {"kv_buffer_size": "80m"}, {"kv_buffer_size": 80_000_000}),
        ("hf_overrides", '{"rope_theta": 1}', {"rope_theta": 1}),
        ("allowed_origins", ["*"], ["*"]),
    ],
)
def test_value_is_what_vllm_reads(name: str, written: Any, means: Any):
    assert read({name: written}, recorded(), "vLLM") == {name: means}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("max_num_seqs", 501.15, "max_num_seqs=501.15: vLLM takes a whole number"),
        ("max_num_seqs", "abc", "max_num_seqs=abc: vLLM takes a whole number"),
        ("max_num_seqs", "4k", "takes a whole number"),
        ("max_num_seqs", True, "max_num_seqs=True: vLLM takes a whole number"),
        ("max_num_seqs", [1, 2], r"max_num_seqs=\[1, 2\]: vLLM takes a whole number"),
        ("max_num_seqs", {"a": 1}, "takes a whole number"),
        ("max_num_seqs", "9" * 5000, "takes a whole number"),
        ("max_num_seqs", 0, "max_num_seqs=0: vLLM takes at least 1"),
        ("max_num_seqs", -1, "takes at least 1"),
        ("tensor_parallel_size", 0, "tensor_parallel_size=0: vLLM takes at least 1"),
        ("max_model_len", "1.5K", "takes a whole number, one like 4k"),
        ("max_model_len", -2, "takes at least -1"),
        ("max_num_batched_tokens", -1, "takes at least 1"),
        ("gpu_memory_utilization", 1.5, "takes more than 0 and at most 1"),
        ("gpu_memory_utilization", "nan", "takes a number"),
        ("enforce_eager", "abc", "enforce_eager=abc: vLLM takes true or false"),
        ("enforce_eager", 1, "takes true or false"),
        ("kv_cache_dtype", "fp9", "kv_cache_dtype=fp9: vLLM accepts auto, "),
        ("kv_cache_dtype", True, "takes text"),
        ("cudagraph_capture_sizes", [], "a list with at least one value"),
        ("cudagraph_capture_sizes", [1, None], "no null in it"),
        ("cudagraph_capture_sizes", [1, "x"], "takes a whole number"),
        ("compilation_config", 3, "takes an object"),
        ("speculative_config", "{broken", "takes an object"),
        ("max_num_seq", 8, r"max_num_seq: vLLM has no such flag; did you mean max_num_seqs"),
        ("port", 8000, "set by autotune itself; write backend.port instead"),
    ],
)
def test_value_that_vllm_does_not_take_is_one_line(name: str, value: Any, why: str):
    with pytest.raises(InputError, match=f"^engine.args.{why}" if why.startswith(name) else why) as raised:
        read({name: value}, recorded(), "vLLM")
    assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)


def test_fields_of_a_flag_are_set_within_what_is_there():
    args = {"compilation_config": {"mode": 3, "pass_config": {"fuse": True}}}
    fields = {
        "compilation-config.cudagraph_mode": "FULL",
        "compilation-config.pass_config.fuse": None,
        "max-num-seqs": 8,
    }
    made = changes(args, fields)
    assert made == {
        "max_num_seqs": 8,
        "compilation_config": {"mode": 3, "cudagraph_mode": "FULL", "pass_config": {}},
    }
    assert args == {"compilation_config": {"mode": 3, "pass_config": {"fuse": True}}}
    assert changes({}, {"compilation_config.mode": None}) == {"compilation_config": None}


def test_object_is_one_word_of_json_and_a_list_several_words():
    args = read(
        {"allowed_origins": ["*"], "cudagraph_capture_sizes": [1, 2], "compilation_config": {"mode": 3, "a": "b"}},
        recorded(),
        "vLLM",
    )
    assert command_line(args, recorded()) == [
        *("--allowed-origins", '["*"]'),
        *("--cudagraph-capture-sizes", "1", "2"),
        *("--compilation-config", '{"a": "b", "mode": 3}'),
    ]
