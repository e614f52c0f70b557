#!/usr/bin/env bash
# A start's seconds with what can be kept from an earlier one, and the seconds between two runs of one server:
#
#     GPUS=[0] benchmarks/h100/starts.sh FOLDER [STEP …]
#
# One start after the other on a host with nothing else on it, with caches of its own; the last step prints them all.
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

run=(scenario=interactive scenario.qps=10 scenario.stop=never scenario.min_duration_s=5 scenario.min_queries=20)
caches=("backend.env.VLLM_CACHE_ROOT=$PWD/vllm" "backend.env.TRITON_CACHE_DIR=$PWD/triton")
flags=(engine.args.max_num_seqs=256 engine.args.max_num_batched_tokens=2048)
other=(engine.args.max_num_seqs=128 engine.args.max_num_batched_tokens=1024)
start() { trial "$1" "${run[@]}" "${caches[@]}" "${@:2}"; }

step cold start cold "${flags[@]}"
step same start same "${flags[@]}"
# The limits of `other` under the sequences and tokens that the caches know; max_num_active_seqs needs vLLM 0.32.
step limits start limits "${flags[@]}" engine.args.max_num_scheduled_tokens=1024
step active start active "${flags[@]}" engine.args.max_num_active_seqs=128 engine.args.max_num_scheduled_tokens=1024
step other start other "${other[@]}"
# Whether Inductor's cache, which lies in TMPDIR unless vLLM moves it, makes another key cheaper.
inductor=("backend.env.TORCHINDUCTOR_CACHE_DIR=$PWD/inductor")
step inductor start inductor "${flags[@]}" "${inductor[@]}" "backend.env.VLLM_CACHE_ROOT=$PWD/vllm-inductor"
step inductor-other start inductor-other "${other[@]}" "${inductor[@]}" "backend.env.VLLM_CACHE_ROOT=$PWD/vllm-inductor"
# vLLM's startup plan: recorded, applied, and applied where it must not be.
plan=("${flags[@]}" backend.env.VLLM_ENABLE_STARTUP_PLAN=1)
step plan start plan "${plan[@]}"
step plan-applied start plan-applied "${plan[@]}"
step plan-half start plan-half "${plan[@]}" engine.args.gpu_memory_utilization=0.5
# Runs of one server, with the warm-up that a later one no longer has; `other` is what is neither start nor run.
step runs trial runs "${run[@]}" "${caches[@]}" "${flags[@]}" scenario.repeats=8

report() {
    python3 - <<'PYTHON'
import json
import re
from pathlib import Path

for file in sorted(Path("multirun/trials").glob("*/result.json"), key=lambda file: file.stat().st_mtime):
    result = json.loads(file.read_text())
    blocks = re.findall(r"GPU KV cache size: ([\d,]+) tokens", (file.parent / "vllm.log").read_text())
    seconds = {**result.get("start", {}), **result["phases"]}
    print(f"{file.parent.name:16}", *(f"{name} {value:.1f}" for name, value in seconds.items()), "| KV", *blocks[-1:])
PYTHON
}
report
exit $failed
