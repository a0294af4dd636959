"""Bars of tokens/s by engine, from results files that have one method in common.

    python recipes/plot_peers.py dflash:int8 runs/peers/*.jsonl --out docs/peers.svg

Its speed makes them comparable: every file's speeds are multiplied so that the common method has
the speed of the first file. Needs matplotlib.
"""

import argparse
from pathlib import Path

import matplotlib

from flashdraft.bench.report import read_results, summarise

matplotlib.use("svg")
from matplotlib import pyplot


def speeds_of(path: Path) -> dict[str, float]:
    """Decode tokens/s by method, of all tasks together."""
    _, lines = read_results(path)
    speeds = {}
    for row in summarise(lines):
        if row.task == "all":
            speeds[row.method] = row.decode_tokens_per_second or 0.0
    return speeds


def comparable_speeds(paths: list[Path], common: str) -> dict[str, float]:
    """Of all files; of a method that several have, the first one's stands."""
    speeds: dict[str, float] = {}
    for path in paths:
        found = speeds_of(path)
        scale = speeds.get(common, found[common]) / found[common]
        for method, speed in found.items():
            speeds.setdefault(method, scale * speed)
    return speeds


def colour(method: str) -> str:
    if method.startswith("dflash"):
        return "C0"
    if method.startswith("autoregressive"):
        return "C7"
    return "C1"


def label(method: str) -> str:
    return method.replace("autoregressive:", "plain ").replace("dflash:", "DFlash ")


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("common", help="method that every file has")
parser.add_argument("results", nargs="+", type=Path)
parser.add_argument("--out", type=Path, required=True)
options = parser.parse_args()

speeds = comparable_speeds(options.results, options.common)
methods = sorted(speeds, key=lambda method: speeds[method])
labels = [label(method) for method in methods]
widths = [speeds[method] for method in methods]
colours = [colour(method) for method in methods]

figure, axis = pyplot.subplots(figsize=(7.5, 0.32 * len(methods) + 0.8))
bars = axis.barh(labels, widths, color=colours)
axis.bar_label(bars, fmt="%.0f", padding=3)
axis.set_xlabel("tokens/s after the first token, median of all answers")
axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(options.out)
