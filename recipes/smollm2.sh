#!/usr/bin/env bash
# The built-in drafter of SmolLM2-135M-Instruct, from nothing to a drafter's folder. Run it again to go on where it stopped.
#   FLASHDRAFT_DATA=<folder with gsm8k/, gpteacher/, self_instruct/>  recipes/smollm2.sh [RUN_FOLDER]
# ANSWERS=recipes/smollm2-answers.jsonl.xz takes 11,717 answers that were written so, and needs no sets.
# NUM_SELF, NUM_DATA: prompts that the model writes itself, and of the data sets. STEPS_1 to STEPS_5: optimizer steps of the runs.
# Reckoned from the rates below, on two cores: 1.5 hours of prompts and answers, 50 GB of features, 5 hours of training.
set -euo pipefail
run=${1:-runs/smollm2}
flashdraft=${FLASHDRAFT:-flashdraft}
recipes=$(dirname "$0")
mkdir -p "$run"

# 1. prompts: what the model asks itself, and three public sets (maths, code, role-play); the last 12 of each are held out
prompts() {
    : "${FLASHDRAFT_DATA:?set FLASHDRAFT_DATA to the folder of the training sets}"
    [ -s "$run/self.jsonl" ] || $flashdraft prompts --self "${NUM_SELF:-8000}" --kernel int8 --max-rows 96 --out "$run/self.jsonl"
    [ -s "$run/sets.jsonl" ] || $flashdraft prompts --data "$FLASHDRAFT_DATA" --out "$run/sets.jsonl"
    [ -s "$run/held_out.jsonl" ] || tail -qn 12 "$run/self.jsonl" "$run/sets.jsonl" > "$run/held_out.jsonl"
    [ -s "$run/prompts.jsonl" ] || {
        head -n -12 "$run/self.jsonl"
        head -n "${NUM_DATA:-7000}" "$run/sets.jsonl"
    } > "$run/prompts.jsonl"
}

# 2. its answers by 8-bit weights, 4 a second on two cores; what it saw is kept, 6 kB a token
answers() {
    $flashdraft regenerate "$1" --out "$2" --draft autoregressive --kernel int8 --max-rows "$3" --max-new-tokens 256 \
        --keep-features "$run/features" --max-length 1536
}

# 3. long contexts out of its own answers: talks, texts to summarise and to answer from, translations there and back
documents() { [ -s "$2" ] || python "$recipes/documents.py" "$1" "$2" "${@:3}"; }
cleaned() { [ -s "$2" ] || $flashdraft prompts "$1" --out "$2"; }
long_contexts() {
    [ -s "$run/talks.jsonl" ] ||
        $flashdraft prompts --self 150 --turns 3 --seed 1000000 --kernel int8 --max-rows 64 --out "$run/talks.jsonl"
    answers "$run/talks.jsonl" "$run/talks.answers.jsonl" 48

    [ -s "$run/document-prompts.jsonl" ] || head -n 110 "$run/self.jsonl" > "$run/document-prompts.jsonl"
    $flashdraft regenerate "$run/document-prompts.jsonl" --out "$run/documents.jsonl" --draft autoregressive --kernel int8 \
        --max-rows 96 --max-new-tokens 700 --temperature 0.8 --top-p 0.95
    documents "$run/documents.jsonl" "$run/long.raw.jsonl" --kinds summary,question --most 190
    documents "$run/own.answers.jsonl" "$run/texts.raw.jsonl" --kinds summary,question --most 500 --seed 3
    documents "$run/own.answers.jsonl" "$run/there.raw.jsonl" --kinds translation --most 700 \
        --languages German,German,French,Spanish,Italian
    for kind in long texts there; do
        cleaned "$run/$kind.raw.jsonl" "$run/$kind.jsonl"
        answers "$run/$kind.jsonl" "$run/$kind.answers.jsonl" 32
    done
    documents "$run/there.answers.jsonl" "$run/back.raw.jsonl" --kinds back
    cleaned "$run/back.raw.jsonl" "$run/back.jsonl"
    answers "$run/back.jsonl" "$run/back.answers.jsonl" 96
}

if [ -n "${ANSWERS:-}" ]; then
    [ -s "$run/shuffled.jsonl" ] || xz -dc "$ANSWERS" | shuf --random-source=<(yes) > "$run/shuffled.jsonl"
    [ -s "$run/held_out.jsonl" ] || tail -n 24 "$run/shuffled.jsonl" > "$run/held_out.jsonl"
    [ -s "$run/own.answers.jsonl" ] || head -n -24 "$run/shuffled.jsonl" > "$run/own.answers.jsonl"
else
    prompts
    answers "$run/prompts.jsonl" "$run/own.answers.jsonl" 96
    long_contexts
fi
$flashdraft features "$run"/*.answers.jsonl --target smollm2-135m --kernel int8 --max-length 1536 --out "$run/features"

# 4. short blocks first, then longer ones with a sequential head, which corrects each draft token by the one before it; then larger
#    batches with Muon, and longer blocks last. 1,000 block positions a second on one core, 1,600 by two processes on two
train() {
    local name=$1
    shift
    $flashdraft train "$run/features" --target smollm2-135m --out "$run/$name" --eval-prompts "$run/held_out.jsonl" "$@"
}
goes_on() { train "$1" --init-from "$run/$2/best" --weights dpace "${@:3}"; }
train train-1 --init target --head none --num-layers 3 --block-size 4 --steps "${STEPS_1:-1800}" --lr 1e-3 --gamma 3
goes_on train-2 train-1 --steps "${STEPS_2:-3600}" --lr 8e-4 --block-size 6 --head swiglu --head-rank 256
goes_on train-3 train-2 --steps "${STEPS_3:-1800}" --lr 5e-4
goes_on train-4 train-3 --steps "${STEPS_4:-300}" --lr 7e-4 --accumulate 4 --optimizer muon
goes_on train-5 train-4 --steps "${STEPS_5:-140}" --lr 5e-4 --accumulate 4 --optimizer muon --block-size 8
echo "the drafter: $run/train-5/best"
