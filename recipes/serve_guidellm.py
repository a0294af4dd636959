"""Of recipes/serve_guidellm.sh: the prompts of one run, and both programs' figures side by side.

python recipes/serve_guidellm.py --cut PROMPTS FIRST COUNT TOKENS
python recipes/serve_guidellm.py FOLDER
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from flashdraft.bench.load_report import read_load, summarise_load
from flashdraft.bench.report import print_table

NAMES = ("tokens/s", "first, ms", "ms/token")


def cut(prompts, first, count, tokens):
    """Lines of the file from number `first`, from 1; behind its end it begins again."""
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    for number in range(int(first) - 1, int(first) - 1 + int(count)):
        row = json.loads(lines[number % len(lines)])
        print(json.dumps({"prompt": row["prompt"], "output_tokens_count": int(tokens)}))


def theirs(path):
    """guidellm's figures, in the order of NAMES."""
    (run,) = json.loads(path.read_text())["benchmarks"]
    metrics = run["metrics"]
    totals = metrics["request_totals"]
    if totals["successful"] != totals["total"]:
        sys.exit(f"{path}: {totals}")
    rate = metrics["output_tokens_per_second"]["total"]["mean"]
    first = metrics["time_to_first_token_ms"]["successful"]["median"]
    return rate, first, metrics["inter_token_latency_ms"]["successful"]["median"]


def ours(path):
    """The same of `flashdraft bench serve`."""
    (row,) = summarise_load(read_load(path)[1])
    if row.failed:
        sys.exit(f"{path}: {row.failed} requests failed")
    return row.tokens_per_second, row.first, row.token


def show(folder):
    figures = defaultdict(list)
    for path in sorted(folder.glob("theirs-*.json")):
        streams, repeat = path.stem.split("-")[1:]
        figures[int(streams), "guidellm"].append(theirs(path))
        figures[int(streams), "bench serve"].append(ours(folder / f"ours-{streams}-{repeat}.jsonl"))

    rows = []
    for (streams, program), runs in sorted(figures.items(), reverse=True):
        medians = [median(column) for column in zip(*runs, strict=True)]
        rows.append([str(streams), program, *(f"{value:.1f}" for value in medians)])
    print_table(["streams", "program", *NAMES], rows)


if sys.argv[1] == "--cut":
    cut(*sys.argv[2:])
else:
    show(Path(sys.argv[1]))
