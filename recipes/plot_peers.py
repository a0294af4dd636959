"""Bars of tokens/s after the first token, by engine and task, from a results file of `flashdraft bench`.

    python recipes/plot_peers.py runs/peers/peers.jsonl docs/peers.svg

Needs matplotlib.
"""

import sys
from pathlib import Path

import matplotlib

from flashdraft.bench.report import summarise

matplotlib.use("svg")
from matplotlib import pyplot

rows = [row for row in summarise(Path(sys.argv[1])) if row.decode_tokens_per_second is not None]
speeds = {(row.method, row.task): row.decode_tokens_per_second for row in rows}
tasks = list(dict.fromkeys(row.task for row in rows))
methods = sorted({row.method for row in rows}, key=lambda name: speeds[name, tasks[-1]])
figure, axis = pyplot.subplots(figsize=(8, 0.55 * len(methods) + 1))
height = 0.8 / len(tasks)
for n, task in enumerate(tasks):
    places = [i + 0.4 - height * (n + 0.5) for i in range(len(methods))]
    bars = axis.barh(places, [speeds.get((name, task), 0.0) for name in methods], height, label=task, color=f"C{n}")
    if task == tasks[-1]:
        axis.bar_label(bars, fmt="%.0f", padding=3)
axis.set_yticks(range(len(methods)), [name.replace("autoregressive", "plain") for name in methods])
axis.set_xlabel("tokens/s after the first token, median")
axis.legend(loc="lower right", frameon=False)
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(sys.argv[2])
