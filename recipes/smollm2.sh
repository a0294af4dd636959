#!/usr/bin/env bash
# The built-in drafter of SmolLM2-135M-Instruct, from prompts to a drafter's folder. Run it again to go on where it stopped.
#   FLASHDRAFT_DATA=<folder with gsm8k/, gpteacher/, self_instruct/>  recipes/smollm2.sh [RUN_FOLDER]
# SEED_ANSWERS=FILE.jsonl adds answers that this target wrote earlier (the same fields as `regenerate` writes).
set -euo pipefail
run=${1:-runs/smollm2}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the training sets}"
flashdraft=${FLASHDRAFT:-flashdraft}
mkdir -p "$run"

[ -s "$run/prompts.jsonl" ] || $flashdraft prompts --data "$FLASHDRAFT_DATA" --out "$run/prompts.jsonl"
# the last prompts of the shuffled file are held out: tau is measured on them while training
[ -s "$run/held_out.jsonl" ] || tail -n 12 "$run/prompts.jsonl" > "$run/held_out.jsonl"

$flashdraft regenerate "$run/prompts.jsonl" --target smollm2-135m --out "$run/answers.jsonl" \
    --max-new-tokens 256 --max-rows 32 --limit "${NUM_ANSWERS:-1600}"
$flashdraft features ${SEED_ANSWERS:+"$SEED_ANSWERS"} "$run/answers.jsonl" --target smollm2-135m --out "$run/features"
$flashdraft train "$run/features" --target smollm2-135m --out "$run/train" --init target \
    --num-layers 3 --block-size 4 --eval-prompts "$run/held_out.jsonl" \
    --steps "${STEPS:-1800}" --sequences 6 --anchors 64 --lr 1e-3 --gamma 3 --vocab 8192
echo "the drafter: $run/train/best"
