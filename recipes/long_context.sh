#!/usr/bin/env bash
# A short fine-tune on long contexts: a drafter that was trained on short ones loses most of its accepted length at 16K (DFlash 2602.06036).
#   recipes/long_context.sh TARGET DRAFTER ANSWERS.jsonl HELD_OUT.jsonl RUN_FOLDER
# ANSWERS: the target's own, with long prompts or long answers. Anchors have at least MIN_CONTEXT tokens before them.
set -euo pipefail
target=$1 drafter=$2 answers=$3 held_out=$4 run=$5
flashdraft=${FLASHDRAFT:-flashdraft}
length=${LENGTH:-16384} least=${MIN_CONTEXT:-4096}

$flashdraft features "$answers" --target "$target" --out "$run/features" --max-length "$length"
$flashdraft train "$run/features" --target "$target" --out "$run/train" --init-from "$drafter" --eval-prompts "$held_out" \
    --min-context "$least" --steps "${STEPS:-500}" --sequences 1 --accumulate "${ACCUMULATE:-4}" --anchors 256 --lr 1e-4
echo "the drafter: $run/train/best"
