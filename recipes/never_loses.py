"""Of recipes/never_loses.sh: a useless drafter (random weights), and lower bounds of results."""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from flashdraft import hub
from flashdraft.loading import NETWORKS
from flashdraft.train.initialise import random_weights

STUDENT = {19: 1.729, 59: 1.671}  # one-sided 95 %, by degrees of freedom
PLAIN = "autoregressive"


class Pair(NamedTuple):
    """Where two rates are of one pair: a group of prompts, decoded together, in one repeat."""

    task: str
    repeat: int
    group: int


def logarithms(path):
    """(task, method) -> of every pair the logarithm of its ratio to plain decoding."""
    rates = defaultdict(dict)
    for text in path.read_text().splitlines()[1:]:
        line = json.loads(text)
        pair = Pair(line["task"], line["repeat"], line["prompt"] // line["max_rows"])
        rates[pair][line["method"]] = line["batch_tokens_per_second"]

    logs = defaultdict(list)
    for pair, by_method in rates.items():
        for method, rate in by_method.items():
            if method != PLAIN:
                logs[pair.task, method].append(math.log(rate / by_method[PLAIN]))
    return logs


def show_bounds(path):
    for (task, method), values in sorted(logarithms(path).items()):
        count = len(values)
        mean = fmean(values)
        margin = STUDENT.get(count - 1, 1.75) * stdev(values) / math.sqrt(count)
        ratio = math.exp(mean)
        bound = math.exp(mean - margin)
        print(
            f"{path.stem:<10} {task:<10} {method:<8} ratio {ratio:.3f}  "
            f"lower bound {bound:.3f}  ({count} pairs)"
        )


def save_useless(folder):
    shipped = NETWORKS["dflash"].from_pretrained(hub.builtin_draft("smollm2-135m"))
    useless = random_weights(shipped.config, 0)
    useless.extras = shipped.extras
    useless.save_pretrained(folder)


if sys.argv[1] == "--make":
    save_useless(sys.argv[2])
else:
    for name in sys.argv[1:]:
        show_bounds(Path(name))
