#!/usr/bin/env bash
# sampler=twin against random search with the same engine time, of docs/benchmarks/h100.md:
#
#     GPUS=[0] benchmarks/h100/twin.sh FOLDER moe-twin long-twin & GPUS=[1] benchmarks/h100/twin.sh FOLDER moe-random long-random
#
# TPE draws its first ten trials at random, so that with so few trials it is random search, too.
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

space=("space=[scheduler,graphs]" n_trials=100 tracking=none)
twin=(sampler=twin backend/device@prior.backend.device=h200)
# The mixture's search costs five minutes with vLLM's defaults: random search is spared measuring them.
random=(sampler=random baseline=false seed="${SEED:-3}")

# Qwen3-30B-A3B's shape within MLPerf's Interactive limits.
moe=(
    model=qwen3_30b_a3b_dummy "${interactive[@]}" scenario.ttft_ms=500 scenario.tpot_ms=30
    budget="${BUDGET:-12m}"
)
# Llama-3.1-8B's shape, 4,000 tokens in and 300 out, 5 queries/s; limits that a reader of long documents might set.
long=(
    model=llama8b_dummy scenario=interactive objective=goodput scenario.qps=5 scenario.ttft_ms=3000 scenario.tpot_ms=30
    scenario.min_duration_s=45 scenario.stop=never
    dataset=synthetic dataset.records.prompt_tokens=4000 'dataset.records.prompt_bounds=[1000,6000]'
    dataset.records.output_tokens=300 dataset.records.output_deviation=60 'dataset.records.output_bounds=[100,512]'
    dataset.max_output_tokens=512 ++engine.args.max_model_len=8192 budget="${LONG_BUDGET:-6m}"
)

step moe-twin study moe-twin "${moe[@]}" "${space[@]}" "${twin[@]}"
step moe-random study moe-random "${moe[@]}" "${space[@]}" "${random[@]}"
step long-twin study long-twin "${long[@]}" "${space[@]}" "${twin[@]}"
step long-random study long-random "${long[@]}" "${space[@]}" "${random[@]}"
exit $failed
