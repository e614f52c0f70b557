#!/usr/bin/env bash
# One Interactive and one Offline run by the rules of MLPerf's closed division, but for random weights and made-up
# texts: rules=open records just these two. A request generates 128 tokens unless the model ends it before.
#
#     benchmarks/h100/closed.sh FOLDER [interactive] [offline] [check]
#
# On an H200 12 and 16 minutes. With two GPUs they may run side by side:
# GPUS=[0] closed.sh FOLDER interactive & GPUS=[1] closed.sh FOLDER offline
#
# CHECKER  a checkout of mlcommons/inference, whose own check of performance logs the step `check` then makes, too
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
source "$here/steps.sh"

closed=(rules=open dataset=cnn_shaped dataset.records.count=13368)

# Equal issue: 13,368 queries up to 22.28 queries/s, and up to 40.5 samples/s 26,736 samples, which last over 600 s.
step interactive trial closed-interactive "${closed[@]}" scenario=interactive scenario.qps=22
step offline trial closed-offline "${closed[@]}" scenario=offline scenario.qps=34
step check python3 "$here/closed.py" multirun/trials/closed-{interactive,offline} ${CHECKER:+--checker "$CHECKER"}
exit $failed
