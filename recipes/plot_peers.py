"""Bars of tokens/s by engine, from results files that have one method in common, whose speed makes them comparable.

    python recipes/plot_peers.py dflash:int8 runs/peers/*.jsonl --out docs/peers.svg

Every file's speeds are multiplied so that the common method has the speed of the first file. Needs matplotlib.
"""

import argparse
from pathlib import Path

import matplotlib

from flashdraft.bench.report import read_results, summarise

matplotlib.use("svg")
from matplotlib import pyplot

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("common", help="method that every file has")
parser.add_argument("results", nargs="+", type=Path)
parser.add_argument("--out", type=Path, required=True)
options = parser.parse_args()

speeds: dict[str, float] = {}
for path in options.results:
    found = {
        row.method: row.decode_tokens_per_second or 0.0
        for row in summarise(read_results(path)[1])
        if row.task == "all"
    }
    scale = speeds.get(options.common, found[options.common]) / found[options.common]
    speeds |= {name: scale * speed for name, speed in found.items() if name not in speeds}
methods = sorted(speeds, key=lambda name: speeds[name])
colours = [
    "C0" if name.startswith("dflash") else "C7" if name.startswith("autoregressive") else "C1"
    for name in methods
]
figure, axis = pyplot.subplots(figsize=(7.5, 0.32 * len(methods) + 0.8))
bars = axis.barh(
    [name.replace("autoregressive:", "plain ").replace("dflash:", "DFlash ") for name in methods],
    [speeds[n] for n in methods],
    color=colours,
)
axis.bar_label(bars, fmt="%.0f", padding=3)
axis.set_xlabel("tokens/s after the first token, median of all answers")
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(options.out)
