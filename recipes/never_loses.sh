#!/usr/bin/env bash
# Does adaptive length ever lose to plain decoding? 20 interleaved pairs a task at batch 1, 4 and 16, with the shipped drafter and with a
# useless one of random weights; the mean ratio of tokens/s to plain decoding and its lower 95 % bound (t interval of the pairs' logarithms).
#   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/never_loses.sh [RESULTS_FOLDER]
set -euo pipefail
results=${1:-runs/never} here=$(dirname "$0")
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft} python=${PYTHON:-python}
mkdir -p "$results"
[ -e "$results/useless" ] || $python "$here/never_loses.py" --make "$results/useless"
for rows in 1 4 16; do
    first=$((rows > 4 ? rows : 4)) repeats=$((rows > 1 ? 20 : 5))
    $flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$here/bench_ids.json" --task gsm8k --task humaneval --task mt_bench --first $first \
        --out "$results/prompts-$rows.jsonl"
    [ -e "$results/batch-$rows.jsonl" ] || $flashdraft bench --prompts "$results/prompts-$rows.jsonl" --out "$results/batch-$rows.jsonl" \
        --methods "autoregressive,dflash,useless=$results/useless" --max-rows $rows --repeats $repeats \
        --max-new-tokens "${MAX_NEW_TOKENS:-64}" > "$results/batch-$rows.log"
done
$python "$here/never_loses.py" "$results"/batch-*.jsonl
