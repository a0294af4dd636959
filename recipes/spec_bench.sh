#!/usr/bin/env bash
# The six categories of Spec-Bench: tau (20 prompts each, 256 tokens, whole blocks), and tokens a second with default settings beside plain
# decoding (8 prompts each, 128 tokens, 3 repeats in turn), for every exact and 8-bit kernel. Tables of docs/measured.md. Default settings
# join the draft network with prompt lookup; KERNELS=float32 measures that kernel alone.
#   FLASHDRAFT_DATA=<folder with spec_bench/>  recipes/spec_bench.sh [RESULTS_FOLDER]
# DRAFT=FOLDER measures another drafter than the shipped one, BLOCK the size of its blocks; BEFORE=FOLDER and BEFORE_BLOCK add a table
# of an earlier one's tau. Results that exist are shown and not measured again.
set -euo pipefail
results=${1:-runs/spec-bench}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the evaluation sets}"
flashdraft=${FLASHDRAFT:-flashdraft}
ids=$(dirname "$0")/bench_ids.json
draft=(${DRAFT:+--draft "$DRAFT"})
mkdir -p "$results"

prompts() { $flashdraft tasks --data "$FLASHDRAFT_DATA" --ids "$ids" --task spec_bench --first "$1" --out "$2"; }
prompts 20 "$results/tau-prompts.jsonl"
prompts 8 "$results/speed-prompts.jsonl"

# texts and tau only, so prompts are decoded eight together: times of this file mean nothing
[ -e "$results/tau.jsonl" ] || $flashdraft bench --prompts "$results/tau-prompts.jsonl" --out "$results/tau.jsonl" \
    --methods autoregressive,dflash --block-size "${BLOCK:-8}" --max-new-tokens 256 --max-rows 8 "${draft[@]}" > "$results/tau.log"
$flashdraft report "$results/tau.jsonl"
[ -z "${BEFORE:-}" ] || [ -e "$results/before.jsonl" ] || $flashdraft bench --prompts "$results/tau-prompts.jsonl" \
    --out "$results/before.jsonl" --methods dflash --block-size "${BEFORE_BLOCK:-6}" --max-new-tokens 256 --max-rows 8 --draft "$BEFORE" \
    > "$results/before.log"
[ -z "${BEFORE:-}" ] || $flashdraft report "$results/before.jsonl"

for kernel in ${KERNELS:-float32 auto int8}; do
    [ -e "$results/$kernel.jsonl" ] || $flashdraft bench --prompts "$results/speed-prompts.jsonl" --out "$results/$kernel.jsonl" \
        --methods "autoregressive:$kernel,dflash+prompt_lookup:$kernel" --max-new-tokens 128 --repeats 3 "${draft[@]}" > "$results/$kernel.log"
    $flashdraft report "$results/$kernel.jsonl"
done
