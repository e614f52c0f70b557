from pathlib import Path

import pytest

from autotune.live.vllm_log import reason

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
    assert cause in reason(tmp_path / "vllm.log")
