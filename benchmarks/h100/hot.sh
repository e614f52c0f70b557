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
    with_words engine.args.gpu_memory_utilization="${MEMORY:-0.42}" "${@:2}"
    python3 "$hot" "multirun/$name" --rounds "${ROUNDS:-3}" "${configs[@]}" "${all[@]}"
}

graphs=engine.args.max_cudagraph_capture_size tokens=engine.args.max_num_batched_tokens
seqs=engine.args.max_num_seqs long=engine.args.long_prefill_token_threshold
# What the first start with a step's size compiles on a host, so that it is in neither's time.
warm() {
    for size in 512 1024 2048; do
        (trial "warm-$size" model=llama8b_dummy "${loaded[@]}" scenario.qps=20 gpus=null "$tokens=$size" "$graphs=$size")
    done
}
step warm warm
step llama-against against llama-pairs \
    "$tokens=512 $graphs=512 $seqs=256 $long=256" "$tokens=768 $graphs=512 $seqs=256" \
    "$tokens=1024 $graphs=1024 $seqs=256" "$tokens=2048 $graphs=2048 $seqs=512" \
    -- model=llama8b_dummy "${loaded[@]}" scenario.qps=20
twelve=()
for size in 512 1024 2048; do
    for sequences in 128 256; do
        for threshold in 0 256; do twelve+=("$tokens=$size $graphs=$size $seqs=$sequences $long=$threshold"); done
    done
done
ROUNDS=1 step llama-twelve against llama-twelve "${twelve[@]}" -- model=llama8b_dummy "${loaded[@]}" scenario.qps=20
# Its weights take 57 GiB: both servers fit into an H200, barely.
MEMORY=0.49 step moe-against against moe-pairs \
    "$tokens=512 $graphs=512 $seqs=256" "$tokens=1024 $graphs=1024 $seqs=256" \
    "$tokens=1024 $graphs=1024 $seqs=256 $long=256" "$tokens=2048 $graphs=2048 $seqs=512" \
    -- model=qwen3_30b_a3b_dummy "${loaded[@]}" scenario.qps=20
exit $failed
