#!/usr/bin/env bash
# A chat whose prompts share prefixes, prefix caching on: vLLM's defaults against what a study finds, then repeated in turn.
#
#     GPUS=[0] benchmarks/h100/chat.sh FOLDER [STEP …]
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

# Made-up conversations of four turns; all begin with the same 1,000 tokens, and a prompt holds the answers received.
chat=(
    scenario=sessions scenario.qps="${LOAD:-16}" objective=goodput scenario.ttft_ms=500 scenario.tpot_ms=30
    scenario.think_s=3 scenario.min_duration_s=45 scenario.stop=never
    dataset=sessions dataset.records.count=1024 dataset.records.system_tokens=1000 dataset.records.first_tokens=400
    dataset.records.later_tokens=150 dataset.records.output_tokens=150 ++engine.args.max_model_len=8192 tracking=none
)
space=("space=[scheduler,graphs]" sampler=twin backend/device@prior.backend.device=h200)

step chat study chat "${chat[@]}" "${space[@]}" n_trials=100 budget="${BUDGET:-7m}"
step verify verify chat k=1 n="${REPEATS:-5}"
exit $failed
