#!/usr/bin/env bash
# What a sequential head is worth: the same drafter without one goes on with each of them, on the same answers in the same order, for the
# same FLOPs (those of STEPS steps with a swiglu head; each has learnt nearly as many positions, too). About 22 minutes each on one core.
#   [STEPS=600] recipes/heads.sh FEATURES HELD_OUT.jsonl DRAFTER RESULTS_FOLDER
# Then, on a quiet machine, with prompts of `flashdraft tasks` (recipes/bench.sh says how they are made):
#   recipes/heads.sh measure SPEED_PROMPTS.jsonl TAU_PROMPTS.jsonl RESULTS_FOLDER
#   recipes/heads.sh table RESULTS_FOLDER          what the trainings' own logs say
# Run again to go on: what is finished is not done again. `markov` must learn its anchor-first blocks from a drafter whose blocks are
# filled in; `markov-fill` is the same head without that. FLOPs leave out what is no matrix product: the convolutions' sums.
set -euo pipefail
flashdraft=${FLASHDRAFT:-flashdraft}
arms="swiglu markov selector none markov-fill"

table() {
python3 - "$results" $arms << 'PYTHON'
import json
import sys
from pathlib import Path

results, *arms = sys.argv[1:]
logs = {}
for arm in arms:
    path = Path(results) / arm / "metrics.jsonl"
    if not path.exists():
        continue
    lines = path.read_text(encoding="utf-8").splitlines()
    logs[arm] = [json.loads(line) for line in lines]

common = min(len(log) for log in logs.values())  # steps that all have made: equal positions
for arm, log in logs.items():
    equal = sum(row["accepted"] for row in log[common - 40 : common]) / 40
    last = sum(row["accepted"] for row in log[-40:]) / 40
    taus = [f"{row['tau']:.3f}" for row in log if "tau" in row]
    print(f"{arm:12} steps {len(log)}  accepted {equal:.3f} up to step {common}, {last:.3f} at the end  tau {' '.join(taus)}")
PYTHON
}

if [ "$1" = table ]; then
    results=$2
    table
    exit
fi
if [ "$1" = measure ]; then
    speed=$2 tau=$3 results=$4
    trained=$(for arm in $arms; do [ ! -d "$results/$arm/best" ] || echo "$arm"; done)
    drafters=$(for arm in $trained; do printf ',%s=%s' "$arm" "$results/$arm/best"; done)
    for arm in $trained; do
        echo "$arm: $($flashdraft profile --draft "$results/$arm/best" --nodes 6 | grep drafting)"
    done
    [ -e "$results/speed.jsonl" ] || $flashdraft bench --prompts "$speed" --out "$results/speed.jsonl" \
        --methods "autoregressive$drafters" --kernel float32 --max-new-tokens 128 --repeats 2 > "$results/speed.log"
    $flashdraft report "$results/speed.jsonl"
    # texts and tau only: times of this file mean nothing
    [ -e "$results/tau.jsonl" ] || $flashdraft bench --prompts "$tau" --out "$results/tau.jsonl" --methods "autoregressive$drafters" \
        --block-size 6 --max-new-tokens 256 --max-rows 8 > "$results/tau.log"
    $flashdraft report "$results/tau.jsonl"
    exit
fi

features=$1 held_out=$2 drafter=$3 results=$4
declare -A options=(
    [none]="" [swiglu]="--head swiglu --head-rank 256" [selector]="--head selector" [markov]="--head markov"
    [markov-fill]="--head markov --layout fill-in"
)
mkdir -p "$results"
[ -e "$results/start" ] || python3 - "$drafter" "$results/start" << 'PYTHON'
import sys

from flashdraft.methods.dflash import DFlashDraftModel

DFlashDraftModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], plain=True)
PYTHON

train() {
    $flashdraft train "$features" --eval-prompts "$held_out" --init-from "$results/start" --weights dpace --lr 5e-4 --eval-every 150 \
        --save-every 50 --seed 21 "$@"
}
flops() { train --out "$results/unused" ${options[$1]} --profile 2 | grep -oE '[0-9.]+ TFLOP' | cut -d' ' -f1; }

whole=$(flops swiglu)
for arm in $arms; do
    steps=$(python3 -c "import sys; print(round(${STEPS:-600} * $whole / float(sys.argv[1])))" "$(flops "$arm")")
    train --out "$results/$arm" ${options[$arm]} --steps "$steps" >> "$results/$arm.log"
done
table
