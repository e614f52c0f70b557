#!/usr/bin/env bash
# Shared servers against fresh ones, of docs/benchmarks/h100.md:
#
#     CUDA_VISIBLE_DEVICES=0 benchmarks/h100/hot.sh FOLDER [STEP …]
hot=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../hot.py")
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

loaded=(scenario=interactive scenario.stop=never scenario.min_duration_s=12 scenario.min_queries=200 tracking=none)

against() { # NAME CONFIGURATIONS… -- WORDS…; on the GPU that CUDA_VISIBLE_DEVICES names, and nothing else beside it
    local name=$1 configs=()
    shift
    while [[ $1 != -- ]]; do configs+=(--config "$1") && shift; done
    with_words engine.args.gpu_memory_utilization=0.42 "${@:2}"
    python3 "$hot" "multirun/$name" --rounds "${ROUNDS:-3}" "${configs[@]}" "${all[@]}"
}

graphs=engine.args.max_cudagraph_capture_size tokens=engine.args.max_num_batched_tokens
seqs=engine.args.max_num_seqs long=engine.args.long_prefill_token_threshold
step llama-against against llama-pairs \
    "$tokens=512 $graphs=512 $seqs=256 $long=256" "$tokens=768 $graphs=512 $seqs=256" \
    "$tokens=1024 $graphs=1024 $seqs=256" "$tokens=2048 $graphs=2048 $seqs=512" \
    -- model=llama8b_dummy "${loaded[@]}" scenario.qps=20
exit $failed
