#!/usr/bin/env bash
# sampler=twin against TPE, random search and vLLM's grid with the same engine time, of docs/benchmarks/h100.md; on two
# GPUs, side by side:
#
#     GPUS=[0] benchmarks/h100/twin.sh FOLDER recorder moe-twin moe-grid & GPUS=[1] … warm moe-tpe moe-random
#
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
source "$here/steps.sh"

space=("space=[scheduler,graphs]" n_trials=100 tracking=none)
twin=(sampler=twin backend/device@prior.backend.device=h200)
# The mixture's search costs up to eight minutes with vLLM's defaults, and nobody is to be held up by them: the twin learns
# from its first trial's steps instead. Another seed for each, as TPE's first ten trials are random ones.
spared=(baseline=false)
# vLLM's auto_tune.sh: these sequences × tokens unless told otherwise
grid=('engine.args.max_num_seqs=choice(128,256)' 'engine.args.max_num_batched_tokens=choice(512,1024,2048,4096)')

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

# A step's time while it is recorded and while it is not, of long answers without prefill.
long_answers=(
    scenario=offline dataset=synthetic dataset.records.prompt_tokens=32 dataset.records.prompt_sigma=0
    dataset.records.output_tokens=1500 dataset.records.output_deviation=0 'dataset.records.output_bounds=[16,1500]'
    dataset.max_output_tokens=1500 scenario.min_queries=256 engine.args.max_num_seqs=128 tracking=none
)
recorder() {
    with_words model=qwen3_30b_a3b_dummy gpus="${GPUS:-all}" "${long_answers[@]}"
    python3 "$here/../recorder.py" "$PWD/recorder" "${all[@]}"
}
# What the first start of a model compiles on a host, so that it is in no study's time.
warm() { trial warm model=qwen3_30b_a3b_dummy "${long_answers[@]}" dataset.records.output_tokens=16; }

step warm warm
step recorder recorder
step moe-twin study moe-twin "${moe[@]}" "${space[@]}" "${spared[@]}" "${twin[@]}"
step moe-tpe study moe-tpe "${moe[@]}" "${space[@]}" "${spared[@]}" sampler=tpe seed=4
step moe-random study moe-random "${moe[@]}" "${space[@]}" "${spared[@]}" sampler=random seed=5
step moe-grid study moe-grid "${moe[@]}" space=none "${grid[@]}" "${spared[@]}" sampler=grid
# The best of host 12's study and vLLM's defaults, repeated in turn on fresh servers: some 6 minutes for a pair, by what
# each took there.
step moe-restore python3 "$here/restore.py" one-gpu/host-12/moe-twin multirun/moe baseline trial-2
step moe-verify verify moe trials=[trial-2] n="${REPEATS:-5}"
step long-twin study long-twin "${long[@]}" "${space[@]}" "${twin[@]}"
step long-random study long-random "${long[@]}" "${space[@]}" "${spared[@]}" sampler=random seed=3
exit $failed
