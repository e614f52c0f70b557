#!/usr/bin/env bash
# Shared servers against fresh ones, and a study on a shared server, of docs/benchmarks/h100.md:
#
#     GPUS=[0] benchmarks/h100/hot.sh FOLDER [STEP …]
hot=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../hot.py")
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

space=("space=[scheduler,graphs]" n_trials="${TRIALS:-6}" tracking=none)
twin=(sampler=twin backend/device@prior.backend.device=h200)
moe=(model=qwen3_30b_a3b_dummy "${interactive[@]}" scenario.ttft_ms=500 scenario.tpot_ms=30)
loaded=(scenario=interactive scenario.stop=never scenario.min_duration_s=15 scenario.min_queries=200 tracking=none)

against() { # NAME CONFIGURATIONS… -- WORDS…
    local name=$1 configs=()
    shift
    while [[ $1 != -- ]]; do configs+=(--config "$1") && shift; done
    with_words gpus="${GPUS:-all}" "${@:2}"
    python3 "$hot" "$name" --rounds "${ROUNDS:-1}" "${configs[@]}" "${all[@]}"
}

graphs=engine.args.max_cudagraph_capture_size tokens=engine.args.max_num_batched_tokens
step moe-study study moe-hot "${moe[@]}" "${space[@]}" "${twin[@]}"
step llama-against against llama-against \
    "$tokens=768 $graphs=512 engine.args.max_num_seqs=256" "$tokens=1024 $graphs=1024 engine.args.max_num_seqs=256" \
    -- model=llama8b_dummy "${loaded[@]}" scenario.qps=20
exit $failed
