#!/usr/bin/env bash
# The measurements of docs/benchmarks/h100.md:
#
#     benchmarks/h100/run.sh FOLDER [STEP …]
#
# A step that has ended is not run again and one that was cut off goes on, so the same command continues after a stop.
# On a host with several GPUs, steps may run side by side: GPUS=[0] run.sh FOLDER interactive-closed & GPUS=[1] run.sh …
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

offline=(scenario=offline scenario.min_queries=1000)
loaded=(
    scenario=interactive scenario.qps=26 scenario.stop=never scenario.min_duration_s=20 scenario.min_queries=459
    engine.args.max_num_batched_tokens=1024
)
closed=("space=[scheduler,graphs]")
open=("space=[scheduler,graphs,quantization]")
# vLLM's auto_tune.sh: these sequences × tokens unless told otherwise
grid=(
    space=none sampler=grid
    'engine.args.max_num_seqs=choice(128,256)' 'engine.args.max_num_batched_tokens=choice(512,1024,2048,4096)'
)
guess=(prior=sim seed=1) # what a simulated study finds best, also on devices that are a little off

two=(n_trials=2 prior.keep=2)
one=(n_trials=1 prior.keep=1)
step interactive-closed-sim simulated interactive-closed-sim "${interactive[@]}" "${closed[@]}" "${guess[@]}" "${two[@]}"
step interactive-open-sim simulated interactive-open-sim "${interactive[@]}" "${open[@]}" "${guess[@]}" "${two[@]}"
step offline-closed-sim simulated offline-closed-sim "${offline[@]}" "${closed[@]}" "${guess[@]}" "${one[@]}"
step offline-open-sim simulated offline-open-sim "${offline[@]}" "${open[@]}" "${guess[@]}" "${one[@]}"

# What a start takes, and whether what it measures depends on how vLLM makes its engine's process: spawned, forked, spawned.
step start-first trial start-first "${loaded[@]}"
step start-fork trial start-fork "${loaded[@]}" backend.env.VLLM_WORKER_MULTIPROC_METHOD=fork
step start-spawn trial start-spawn "${loaded[@]}" backend.env.VLLM_WORKER_MULTIPROC_METHOD=spawn

# Three ways to search, each with the same engine time, in which it also measures a baseline of its own: the simulation's
# two guesses and TPE; random search; vLLM's grid.
arm() { study "$1" "${interactive[@]}" n_trials=100 budget="${BUDGET:-14m}" "${@:2}"; }
step interactive-closed arm interactive-closed "${closed[@]}" warm_start=interactive-closed-sim prior.keep=2
step interactive-random arm interactive-random "${closed[@]}" sampler=random seed=2
step interactive-grid arm interactive-grid "${grid[@]}"
step verify-interactive verify interactive-closed k=1 n="${REPEATS:-4}"
step offline-closed study offline-closed "${offline[@]}" "${closed[@]}" \
    n_trials="${OFFLINE:-3}" warm_start=offline-closed-sim prior.keep=1
step offline-open study offline-open "${offline[@]}" "${open[@]}" \
    baseline=false n_trials="${OFFLINE:-3}" warm_start=offline-open-sim prior.keep=1
step interactive-open study interactive-open "${interactive[@]}" "${open[@]}" \
    n_trials="${OPEN:-4}" warm_start=interactive-open-sim prior.keep=2
step verify-open verify interactive-open k=1 n="${REPEATS:-4}"
exit $failed
