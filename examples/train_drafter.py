"""From a handful of answers to a drafter, at toy size: the five stages of docs/training.md.

python examples/train_drafter.py --out toy-run      # needs flashdraft[train]
"""

import argparse
import json
import tempfile
from pathlib import Path

from flashdraft.cli import main as flashdraft

QUESTIONS = ["What is the capital of Italy?", "Name three colours.", "What is 2 + 2?"]

parser = argparse.ArgumentParser(description="Train a drafter on a handful of answers.")
parser.add_argument("--out", type=Path, help="keep the run and its drafter, best/")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--max-new-tokens", type=int, default=24)
options = parser.parse_args()


def run(command: str) -> None:
    print(f"$ flashdraft {command}")
    if flashdraft(command.split()) != 0:
        raise SystemExit(1)


with tempfile.TemporaryDirectory() as work:
    lines = [json.dumps({"prompt": question}) for question in QUESTIONS]
    Path(work, "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out, steps, tokens = options.out or f"{work}/run", options.steps, options.max_new_tokens
    shape = "--num-layers 1 --block-size 4 --vocab 512 --anchors 16"
    schedule = f"--steps {steps} --eval-every {steps} --save-every {steps} --lr 2e-3"
    run(f"prompts {work}/questions.jsonl --out {work}/prompts.jsonl")
    run(f"regenerate {work}/prompts.jsonl --out {work}/answers.jsonl --max-new-tokens {tokens}")
    run(f"features {work}/answers.jsonl --out {work}/features")
    data = f"{work}/features --eval-prompts {work}/prompts.jsonl"
    run(f"train {data} --out {out} {shape} {schedule}")
    run(f"eval {work}/prompts.jsonl --draft {out}/best --max-new-tokens {tokens}")
