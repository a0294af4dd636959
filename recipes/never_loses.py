"""Of recipes/never_loses.sh: a useless drafter (random weights), and the lower bounds of results files."""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from flashdraft import hub, load
from flashdraft.loading import NETWORKS
from flashdraft.train.initialise import random_weights

STUDENT = {19: 1.729, 59: 1.671}  # one-sided 95 %, by degrees of freedom


def bounds(path):
    """(task, method) -> mean ratio, lower bound, pairs: a pair is one group of prompts in one repeat, decoded together."""
    rates = defaultdict(dict)
    for line in map(json.loads, path.read_text().splitlines()[1:]):
        rates[line["task"], line["repeat"], line["prompt"] // line["max_rows"]][line["method"]] = (
            line["batch_tokens_per_second"]
        )
    logs = defaultdict(list)
    for (task, _, _), by in rates.items():
        for method in by.keys() - {"autoregressive"}:
            logs[task, method].append(math.log(by[method] / by["autoregressive"]))
    for key, values in sorted(logs.items()):
        margin = STUDENT.get(len(values) - 1, 1.75) * stdev(values) / math.sqrt(len(values))
        yield *key, math.exp(fmean(values)), math.exp(fmean(values) - margin), len(values)


if sys.argv[1] == "--make":
    target = load("smollm2-135m", draft="autoregressive").target
    shipped = NETWORKS["dflash"].from_pretrained(hub.builtin_draft("smollm2-135m"))
    useless = random_weights(shipped.config, 0)
    useless.extras = shipped.extras
    useless.save_pretrained(sys.argv[2])
else:
    for path in map(Path, sys.argv[1:]):
        for task, method, ratio, low, count in bounds(path):
            print(
                f"{path.stem:<10} {task:<10} {method:<8} ratio {ratio:.3f}  lower bound {low:.3f}  ({count} pairs)"
            )
