"""Your own prompts, method by method: tau, tokens/s, and whether texts stay the same.

python examples/benchmark.py my_prompts.txt --out results.jsonl     # one prompt a line
"""

import argparse
import json
import tempfile
from pathlib import Path

from flashdraft.bench.report import show
from flashdraft.bench.run import BenchConfig, run_bench

QUESTIONS = ["What is the capital of Italy?", "Repeat this line twice: one two three four five."]

parser = argparse.ArgumentParser(description="Measure methods side by side on your own prompts.")
parser.add_argument(
    "prompts", nargs="?", type=Path, help="a text file; else two questions are asked"
)
parser.add_argument("--out", type=Path, help="keep the results, for `flashdraft plot`")
parser.add_argument("--methods", default="autoregressive,dflash,prompt_lookup")
parser.add_argument("--max-new-tokens", type=int, default=64)
options = parser.parse_args()

questions = QUESTIONS
if options.prompts is not None:
    questions = options.prompts.read_text(encoding="utf-8").splitlines()

with tempfile.TemporaryDirectory() as folder:
    prompts = Path(folder, "prompts.jsonl")
    lines = [json.dumps({"task": "mine", "prompt": question}) for question in questions]
    prompts.write_text("\n".join(lines), encoding="utf-8")

    out = options.out or Path(folder, "results.jsonl")
    tokens = options.max_new_tokens
    run_bench(BenchConfig(prompts, out, methods=options.methods, max_new_tokens=tokens))
    show(out)
