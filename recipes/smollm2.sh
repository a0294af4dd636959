#!/usr/bin/env bash
# The built-in drafter of SmolLM2-135M-Instruct, from prompts to a drafter's folder. Run it again to go on where it stopped.
#   FLASHDRAFT_DATA=<folder with gsm8k/, gpteacher/, self_instruct/>  recipes/smollm2.sh [RUN_FOLDER]
# SEED_ANSWERS=FILE.jsonl adds answers that this target wrote earlier (the same fields as `regenerate` writes).
# NUM_ANSWERS, STEPS_1 and STEPS_2 set how much of it; a core writes about 0.5 answers and trains about 1,000 block positions a second.
set -euo pipefail
run=${1:-runs/smollm2}
: "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the training sets}"
flashdraft=${FLASHDRAFT:-flashdraft}
mkdir -p "$run"

[ -s "$run/prompts.jsonl" ] || $flashdraft prompts --data "$FLASHDRAFT_DATA" --out "$run/prompts.jsonl"
# the last prompts of the shuffled file are held out: tau is measured on them while training
[ -s "$run/held_out.jsonl" ] || tail -n 12 "$run/prompts.jsonl" > "$run/held_out.jsonl"
[ -s "$run/train_prompts.jsonl" ] || head -n -12 "$run/prompts.jsonl" > "$run/train_prompts.jsonl"

# answers in bfloat16, 48 at a time; what the target saw is kept, so that `features` makes only what is missing
$flashdraft regenerate "$run/train_prompts.jsonl" --target smollm2-135m --out "$run/answers.jsonl" --draft autoregressive \
    --dtype bfloat16 --max-new-tokens 256 --max-rows 48 --limit "${NUM_ANSWERS:-4000}" --keep-features "$run/features"
$flashdraft features ${SEED_ANSWERS:+"$SEED_ANSWERS"} "$run/answers.jsonl" --target smollm2-135m --dtype bfloat16 --out "$run/features"

# short blocks first, then longer ones with a sequential head: it corrects each draft token by the one before it
$flashdraft train "$run/features" --target smollm2-135m --out "$run/train-1" --eval-prompts "$run/held_out.jsonl" --init target \
    --head none --num-layers 3 --block-size 4 --steps "${STEPS_1:-1800}" --lr 1e-3 --gamma 3
$flashdraft train "$run/features" --target smollm2-135m --out "$run/train-2" --eval-prompts "$run/held_out.jsonl" \
    --init-from "$run/train-1/best" --block-size 6 --head swiglu --head-rank 256 --steps "${STEPS_2:-2400}" --lr 8e-4 --weights dpace
echo "the drafter: $run/train-2/best"
