#!/usr/bin/env bash
# Every method beside the others, greedy and at T = 1, on three tasks: tau of whole blocks (40 prompts a task, eight together), speed (8 prompts
# a task, one by one), 128 tokens each, and pictures with a report.
#   FLASHDRAFT_DATA=<folder with gsm8k/, humaneval/, mt_bench/>  recipes/compare.sh [RESULTS_FOLDER [OPTION OF BENCH]...]
# METHODS=a,b,c; MORE=name=FOLDER of one drafter more; DRAFT=FOLDER of dflash's drafter; ASSISTANT=FOLDER of a small model with the target's tokenizer, which adds
# transformers_assisted; BLOCK_SIZE=N of the tau run; TASKS="a b c"; REPEATS=N of the speed run. Results that exist are not measured again.
set -euo pipefail
results=${1:-runs/compare}
shift $(($# > 0))
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft} ids=$(dirname "$0")/bench_ids.json
OURS=${OURS:-autoregressive,dflash,dflash_tree,dflash+prompt_lookup,eagle3,eagle3_tree,medusa,medusa_tree,draft_model,prompt_lookup}
METHODS=${METHODS:-$OURS,transformers,transformers_lookup,transformers_dflash${ASSISTANT:+,transformers_assisted}}${MORE:+,$MORE}
options=(--methods "$METHODS" --temperature 0 --temperature 1 --max-new-tokens "${MAX_NEW_TOKENS:-128}" ${DRAFT:+--draft "$DRAFT"} ${ASSISTANT:+--assistant "$ASSISTANT"} "$@")
case $METHODS in *transformers*) some=(--transformers-prompts 8) ;; *) some=() ;; esac
tasks=()
for task in ${TASKS:-gsm8k humaneval mt_bench}; do tasks+=(--task "$task"); done
mkdir -p "$results"

$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$ids" "${tasks[@]}" --out "$results/tau-prompts.jsonl"
$flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$ids" "${tasks[@]}" --first 8 --out "$results/speed-prompts.jsonl"
[ -e "$results/tau.jsonl" ] || $flashdraft bench --prompts "$results/tau-prompts.jsonl" --out "$results/tau.jsonl" --max-rows 8 \
    --block-size "${BLOCK_SIZE:-6}" "${options[@]}" "${some[@]}" > "$results/tau.log"
[ -e "$results/speed.jsonl" ] || $flashdraft bench --prompts "$results/speed-prompts.jsonl" --out "$results/speed.jsonl" \
    --repeats "${REPEATS:-1}" "${options[@]}" > "$results/speed.log"
$flashdraft report "$results/tau.jsonl" "$results/speed.jsonl"
$flashdraft plot "$results/tau.jsonl" "$results/speed.jsonl" --out "$results/plots"
