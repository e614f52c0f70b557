# Sourced by run.sh and two_gpus.sh. Commands run in $folder, so that the studies lie in $folder/multirun.
#
# WORDS  added to every study and trial: WORDS="model=tiny dataset=cnn_small" tries the whole thing without a GPU
# GPUS   `all` unless set

set -uo pipefail
folder=${1:?folder for what is measured}
shift
wanted=" $* " # steps; none is all
mkdir -p "$folder/done"
cd "$folder" || exit
read -ra words <<<"${WORDS:-}"
failed=0
trap 'exit 130' INT TERM

# step NAME COMMAND…  once; its seconds, exit code and what it printed stay in done/
step() {
    local name=$1 code began=$SECONDS
    shift
    [[ -e done/$name || ($wanted != "  " && $wanted != *" $name "*) ]] && return
    echo "== $name, $(date +%T)"
    "$@" 2>&1 | tee "done/$name.log"
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - began)) s"
    # autotune.verify: 2 is an answer
    if [[ $code == 0 || ($code == 2 && $1 == verify) ]]; then mv "done/$name.log" "done/$name"; else failed=1; fi
}

with_words() { # $words and the given ones, of those for the same key the last, in the array all
    local word
    local -A of=()
    for word in "$@" "${words[@]}"; do of[${word%%=*}]=$word; done
    all=("${of[@]}")
}

study() {
    with_words study="$1" model=llama8b_dummy launcher=gpus gpus="${GPUS:-all}" "${@:2}"
    python3 -m autotune -m "${all[@]}"
}

simulated() { # as a study of the same words, without a GPU
    with_words study="$1" model=llama8b_dummy backend=sim tracking=none "${@:2}"
    python3 -m autotune -m "${all[@]}"
}

trial() { # one alone, in multirun/trials/NAME; always in a subshell, whose process becomes the trial's
    with_words study="$1" model=llama8b_dummy gpus="${GPUS:-all}" tracking=none "${@:2}"
    exec python3 -m autotune "${all[@]}"
}

verify() {
    python3 -m autotune.verify study="$1" gpus="${GPUS:-all}" "${@:2}"
}

interactive=(
    scenario=interactive objective=max_qps
    scenario.min_duration_s=20 scenario.search.certify_queries=662 # LoadGen's test then forgives one query
    scenario.search.first_s=5 scenario.search.burst=100
)
