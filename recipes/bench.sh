#!/usr/bin/env bash
# The README's tables: speed (8 prompts a task, 128 tokens, 3 repeats) and tau (40 prompts a task, 256 tokens).
#   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/bench.sh [RESULTS_FOLDER]
# DRAFT=FOLDER measures another drafter than the shipped one, THREADS=N sets the threads of our methods.
# Results that exist are shown, not measured again; remove speed.jsonl or tau.jsonl after a run that was cut off.
set -euo pipefail
results=${1:-runs/bench}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft}
ids=$(dirname "$0")/bench_ids.json
options=(${DRAFT:+--draft "$DRAFT"} ${THREADS:+--threads "$THREADS"})
mkdir -p "$results"

$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$ids" --first 8 --out "$results/speed-prompts.jsonl"
$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$ids" --out "$results/tau-prompts.jsonl"

[ -e "$results/speed.jsonl" ] || $flashdraft bench --prompts "$results/speed-prompts.jsonl" --out "$results/speed.jsonl" \
    --max-new-tokens 128 --repeats 3 --transformers-prompts 4 "${options[@]}" > "$results/speed.log"
$flashdraft report "$results/speed.jsonl"

[ -e "$results/tau.jsonl" ] || $flashdraft bench --prompts "$results/tau-prompts.jsonl" --out "$results/tau.jsonl" \
    --methods autoregressive,dflash --max-new-tokens 256 "${options[@]}" > "$results/tau.log"
$flashdraft report "$results/tau.jsonl"

$flashdraft profile
