#!/usr/bin/env bash
# The measurements of docs/benchmarks/two-gpus.md, on a machine with two GPUs:
#
#     benchmarks/h100/two_gpus.sh FOLDER [STEP …]
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

offline=(scenario=offline scenario.min_queries=500 space=none sampler=grid)
two=(baseline=false 'engine.args.max_num_seqs=choice(512,1024)')

# vLLM's fused all-reduce needs NVLink multicast, and hangs on a host that has it switched off.
no_multicast=(engine.args.compilation_config.pass_config.fuse_allreduce_rms=false)
both=(engine.args.tensor_parallel_size=2 "${no_multicast[@]}")

killed() { # SIGKILL to a trial that holds both GPUs: seconds until they are empty, and whether their leases are free
    local began
    trial killed "${offline[@]}" "${both[@]}" &
    until [[ $(busy) == 2 ]]; do
        kill -0 $! || return 1
        sleep 0.2
    done
    began=$(date +%s%N)
    kill -9 $!
    until [[ $(busy) == 0 ]]; do
        (($(date +%s%N) - began < 60000000000)) || return 1
        sleep 0.1
    done
    echo "both GPUs empty after $((($(date +%s%N) - began) / 1000000)) ms"
    for gpu in 0 1; do
        flock -n "${AUTOTUNE_LEASES:-/tmp/autotune-leases}/gpu-$gpu.lock" echo "lease of GPU $gpu is free" || return 1
    done
    ! pgrep -f "vllm.*serve|VLLM::|autotune.live" >&2 && echo "no process is left"
}

parallelism() {
    local other
    trial out-of-memory "${offline[@]}" engine.args.kv_cache_memory_bytes=150000000000 &
    other=$!
    study parallelism "${offline[@]}" space=parallelism objective=throughput_per_gpu duplicates=measure \
        'engine.args.tensor_parallel_size=choice(1,2)' engine.args.pipeline_parallel_size=1 \
        engine.args.data_parallel_size=1 "${no_multicast[@]}" || return 1
    ! wait $other # it must fail
}

busy() { # GPUs with more than 5 GiB in use
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | awk '$1 > 5000 { n++ } END { print n + 0 }'
}

# The same two trials one after the other and side by side; what both compile is compiled before.
step warm trial warm "${offline[@]}"
step alone study alone "${offline[@]}" "${two[@]}" gpus="[0]"
step together study together "${offline[@]}" "${two[@]}"
step alone-max-qps study alone-max-qps "${interactive[@]}" space=none sampler=grid "${two[@]}" gpus="[0]"
step together-max-qps study together-max-qps "${interactive[@]}" space=none sampler=grid "${two[@]}"
# One-GPU trials and one that takes both; beside them a trial of somebody else's that runs out of memory.
step parallelism parallelism
step tensor-parallel trial tensor-parallel "${offline[@]}" "${both[@]}"
step killed killed
exit $failed
