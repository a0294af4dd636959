#!/usr/bin/env bash
# Tables of docs/measured.md: speed (8 prompts a task, 128 tokens, 3 repeats), tau (40 prompts a task, 256 tokens), and T = 1.
#   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/bench.sh [RESULTS_FOLDER]
# DRAFT=FOLDER measures another drafter than the shipped one, THREADS=N sets the threads of all methods, METHODS=a,b,c those of the
# speed table, BLOCK the size of the drafter's blocks. tau is of whole ones; speed is of as many nodes as pay. Results that exist are shown and not measured again.
set -euo pipefail
results=${1:-runs/bench}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft}
methods=${METHODS:-autoregressive:float32,dflash:float32}
ids=$(dirname "$0")/bench_ids.json
options=(${DRAFT:+--draft "$DRAFT"} ${THREADS:+--threads "$THREADS"})
mkdir -p "$results"

$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$ids" --first 8 --out "$results/speed-prompts.jsonl"
$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$ids" --out "$results/tau-prompts.jsonl"

[ -e "$results/speed.jsonl" ] || $flashdraft bench --prompts "$results/speed-prompts.jsonl" --out "$results/speed.jsonl" \
    --methods "$methods" --max-new-tokens 128 --repeats 3 "${options[@]}" > "$results/speed.log"
$flashdraft report "$results/speed.jsonl"

# texts and tau only, so prompts are decoded eight together: times of this file mean nothing
[ -e "$results/tau.jsonl" ] || $flashdraft bench --prompts "$results/tau-prompts.jsonl" --out "$results/tau.jsonl" \
    --methods autoregressive,dflash --block-size "${BLOCK:-8}" --max-new-tokens 256 --max-rows 8 "${options[@]}" > "$results/tau.log"
$flashdraft report "$results/tau.jsonl"

[ -e "$results/sampled.jsonl" ] || $flashdraft bench --prompts "$results/speed-prompts.jsonl" --out "$results/sampled.jsonl" \
    --methods autoregressive,dflash --block-size "${BLOCK:-8}" --max-new-tokens 128 --temperature 1 --max-rows 8 "${options[@]}" > "$results/sampled.log"
$flashdraft report "$results/sampled.jsonl"

# PLAIN=FOLDER: the drafter as `save_pretrained(FOLDER, plain=True)` writes it
[ -z "${PLAIN:-}" ] || [ -e "$results/plain.jsonl" ] || $flashdraft bench --prompts "$results/tau-prompts.jsonl" --out "$results/plain.jsonl" \
    --methods dflash --block-size "${BLOCK:-8}" --max-new-tokens 256 --max-rows 8 --draft "$PLAIN" > "$results/plain.log"
[ -z "${PLAIN:-}" ] || $flashdraft report "$results/plain.jsonl"
