"""What a trial reads in vLLM's log: the parts of a start, and why one failed."""

from datetime import datetime
from pathlib import Path

import pytest

from autotune.live import vllm_log

LOG = """\
Triton is installed
(APIServer pid=9) INFO 11-24 10:15:53 [api_utils.py:345]   version 0.26.0
(APIServer pid=9) WARNING 11-24 10:15:54 [vllm.py:1] words
(EngineCore pid=10) INFO 11-24 10:16:08 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='m'
(EngineCore pid=10) INFO 11-24 10:16:11 [model_runner.py:305] Model loading took 15.0 GiB and 1.864054 seconds
(EngineCore pid=10) INFO 11-24 10:16:37 [monitor.py:53] torch.compile took 26.21 s in total
(EngineCore pid=10) INFO 11-24 10:16:40 [kv_cache_utils.py:2177] GPU KV cache size: 457,504 tokens
(EngineCore pid=10) INFO 11-24 10:16:48 [model_runner.py:747] Graph capturing finished in 7 secs, took 0.98 GiB
(EngineCore pid=10) INFO 11-24 10:17:09 [core.py:340] init engine (profile, create kv cache, warmup model) took 58.2 s
(APIServer pid=9) INFO 11-24 10:17:10 [api_server.py:677] Starting vLLM server on http://127.0.0.1:54793
"""
READY = datetime(2026, 11, 24, 10, 17, 11)


def test_a_start_is_split_where_vllm_says_what_it_has_done(tmp_path: Path):
    log = tmp_path / "vllm.log"
    log.write_text(LOG)
    assert vllm_log.parts(log, READY, start_s=91.5) == {
        **{"import": 13.5, "engine": 15, "weights": 3, "compile": 26},
        **{"profile": 3, "graphs": 8, "warmup": 21, "serve": 2},
    }


def test_what_a_start_leaves_out_counts_to_what_follows(tmp_path: Path):
    log = tmp_path / "vllm.log"
    log.write_text("\n".join(line for line in LOG.splitlines() if "compile" not in line and "Graph" not in line))
    parts = vllm_log.parts(log, READY, start_s=91.5)
    assert (parts["profile"], parts["warmup"]) == (29, 29) and not {"compile", "graphs"} & set(parts)
    assert sum(parts.values()) == pytest.approx(91.5)


def test_a_log_of_another_kind_leaves_the_start_whole(tmp_path: Path):
    log = tmp_path / "vllm.log"
    log.write_text("something else\n")
    assert vllm_log.parts(log, READY, start_s=30.0) == {"serve": 30.0}


STAMP = "ERROR 11-24 08:20:27 [core.py:1510]"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            f"(EngineCore pid=1) {STAMP} ValueError: not enough memory\n"
            f"(EngineCore pid=1) {STAMP} Exception: WorkerProc initialization failed due to an exception\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: not enough memory",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for SchedulerConfig\n"
            "  Value error, max_num_batched_tokens (64) is too small [type=value_error, input_value=ArgsKwargs]\n"
            "    For further information visit https://errors.pydantic.dev\n",
            "ValidationError: Value error, max_num_batched_tokens (64) is too small",
        ),
        ("api_server.py: error: argument --max-num-seqs: invalid int value: 'a'\n", "error: argument --max-num-seqs"),
        (f"(Worker pid=9) {STAMP} torch.OutOfMemoryError: CUDA out of memory.\n", "OutOfMemoryError: CUDA out of"),
        ("all well\nand then nothing\n", "its last line: and then nothing"),
    ],
)
def test_reason_is_the_root_cause_not_its_echo(tmp_path: Path, log: str, cause: str):
    (tmp_path / "vllm.log").write_text(log)
    assert cause in vllm_log.reason(tmp_path / "vllm.log")
