#!/usr/bin/env bash
# The checks that docs/gpu.md lists, in one run of at most 8 minutes on a machine with an NVIDIA GPU:
#   recipes/gpu.sh [RESULTS_FOLDER]
# What it writes: a log of each check, and summary.txt with a line a check: ok, FAILED or out of time.
# TARGET=NAME and DRAFT=NAME take another pair; DEVICE=cpu tries the script itself without a GPU.
set -uo pipefail
results=${1:-runs/gpu}
target=${TARGET:-smollm2-135m}
draft=${DRAFT:-auto}
device=${DEVICE:-cuda}
python=${PYTHON:-python}
ends=$((SECONDS + 480))
here=$(dirname "$0")
mkdir -p "$results"
: > "$results/summary.txt"

# check NAME SECONDS COMMAND...: run it for so long at most, and never beyond the end of the whole run
check() {
    local name=$1 limit=$2 left=$((ends - SECONDS))
    shift 2
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [ "$limit" -lt 5 ]; then
        echo "$name: out of time" | tee -a "$results/summary.txt"
        return
    fi
    timeout "$limit" "$@" > "$results/$name.log" 2>&1
    case $? in
        0) echo "$name: ok" ;;
        124) echo "$name: out of time after $limit s" ;;
        *) echo "$name: FAILED, see $results/$name.log" ;;
    esac | tee -a "$results/summary.txt"
}

check machine 30 "$python" "$here/gpu_checks.py" machine --device "$device"
check texts 90 "$python" "$here/gpu_checks.py" texts --device "$device" --target "$target" --draft "$draft"
check graphs 120 "$python" "$here/gpu_checks.py" graphs --device "$device" --target "$target" --draft "$draft"
check speed 120 "$python" "$here/gpu_checks.py" speed --device "$device" --target "$target" --draft "$draft"
check memory 60 "$python" "$here/gpu_checks.py" memory --device "$device" --target "$target" --draft "$draft"
check training 90 "$python" "$here/gpu_checks.py" training --device "$device" --target "$target"
cat "$results/speed.log" 2> /dev/null
! grep -q FAILED "$results/summary.txt"
