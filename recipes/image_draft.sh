#!/usr/bin/env bash
# The learned image draft of the digits: what the model's own sampler does, without guidance and with it, and a draft of that.
#   recipes/image_draft.sh [MODEL] [FOLDER]
# MODEL: digits, or the folder that recipes/image_digits.py made. The draft lies in FOLDER/run/best, its figures in FOLDER/run/metrics.jsonl.
# About 15 minutes of one core; started again, it goes on. It made the shipped one.
# IMAGES: of each of the two recordings; STEPS: of the training. Seeds are from 1,000,000 on, so that no image of a figure is among them.
set -euo pipefail
model=${1:-digits} folder=${2:-runs/image-draft}
flashdraft=${FLASHDRAFT:-flashdraft}
images=${IMAGES:-400} steps=${STEPS:-4000}

mkdir -p "$folder"
PYTHONPATH=$(dirname "$0") python3 - "$images" > "$folder/captions.txt" << 'PYTHON'
import random, sys
from image_digits import caption
for number in range(int(sys.argv[1])):
    draw = random.Random(1_000_000 + number)
    print(caption((draw.randrange(10), draw.randrange(3), draw.randrange(3)), draw))
PYTHON

record() {
    $flashdraft image-record "$model" --prompts "$folder/captions.txt" --batch 20 --steps 100 --scheduler ddpm "$@"
}

record --out "$folder/plain" --seed 1000000
record --out "$folder/guided" --seed 2000000 --guidance 3
$flashdraft image-train "$folder/plain" "$folder/guided" --out "$folder/run" --steps "$steps"
