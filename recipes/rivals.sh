#!/usr/bin/env bash
# The rivals' drafters of SmolLM2-135M on the answers of recipes/smollm2.sh, and a DFlash drafter of as many training FLOPs as EAGLE-3's
# (`flashdraft train ... --profile 5` tells FLOPs a step: 0.110 T of eagle3, 0.249 T of dflash). About 20 minutes each on one core.
#   recipes/rivals.sh FOLDER_OF_FEATURES HELD_OUT.jsonl [OUT]
# The features must hold the layers of all methods: flashdraft features answers.jsonl --out features --methods dflash,eagle3,medusa
set -euo pipefail
features=$1 held_out=$2 out=${3:-runs/rivals}
flashdraft=${FLASHDRAFT:-flashdraft}
train() { $flashdraft train "$features" --eval-prompts "$held_out" --sequences 6 --save-every 50 "$@"; }

train --method eagle3 --out "$out/eagle3" --steps 1000 --anchors 64 --lr 8e-4 --seed 31
train --method dflash --out "$out/dflash" --steps 443 --anchors 64 --lr 8e-4 --seed 31 --num-layers 3 --block-size 6 --head swiglu
train --method medusa --out "$out/medusa" --steps 500 --anchors 96 --lr 2e-3 --seed 32
train --method draft_model --out "$out/draft_model" --steps 600 --eval-every 200 --anchors 512 --lr 6e-4 --seed 33 --num-layers 3
