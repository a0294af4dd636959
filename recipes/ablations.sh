#!/usr/bin/env bash
# What single choices of training are worth: short runs from one drafter, on the same unseen samples in the same order, one change each.
#   recipes/ablations.sh FEATURES HELD_OUT.jsonl DRAFTER RESULTS_FOLDER
# FEATURES must have soft labels and samples that DRAFTER was not trained on. Prints the mean of `accepted` (the expected accepted length
# on each step's samples, new to the drafter within the first epoch) over the last 40 steps, tau on the held-out prompts, and a step's cost.
set -euo pipefail
features=$1 held_out=$2 drafter=$3 results=$4
flashdraft=${FLASHDRAFT:-flashdraft}

run() {
    local name=$1
    shift
    $flashdraft train "$features" --out "$results/$name" --eval-prompts "$held_out" --init-from "$drafter" --block-size 6 \
        --steps 100 --eval-every 100 --save-every 100 --lr 6e-4 "$@" > "$results-$name.log"
    python3 - "$name" "$results/$name/metrics.jsonl" << 'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[2])]
print(f"{sys.argv[1]:8} accepted {sum(row['accepted'] for row in rows[60:]) / 40:.3f}  tau {rows[-1]['tau']:.3f}")
PYTHON
    $flashdraft profile --draft "$results/$name/best" --nodes 6 | grep -E "drafting|step"
}

mkdir -p "$results"
run plain
run kl --kl 1
run kl-fifth --kl 0.2
run muon --optimizer muon
run dpace --weights dpace
run swiglu --head swiglu --head-rank 256
