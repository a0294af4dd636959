"""The tables of step_times.py as curves.

    python recipes/step_times.py | tee steps.txt
    python recipes/plot_steps.py steps.txt docs/steps.svg

Needs matplotlib.
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

WANTED = {  # title of a table -> label of its axis
    "a row's tokens": "tokens of one row, context 64",
    "one token": "context, one token",
    "six tokens a row, context 64": "rows of six tokens",
}


def kernels_of(lines: list[str]) -> list[str]:
    """From the head of the first table: its columns."""
    for line in lines:
        words = line.split()
        if words[:1] == ["tokens"]:
            return words[1:]
    raise SystemExit("no table of step_times.py")


def draw(axis, lines: list[str], title: str, kernels: list[str]) -> None:
    """A curve of milliseconds for every kernel."""
    xs = []
    curves: list[list[float]] = [[] for _ in kernels]
    for line in lines:
        row = re.fullmatch(rf"{title} +(\d+) +([\d. ]+)", line)
        if row is None:
            continue
        xs.append(int(row[1]))
        for curve, milliseconds in zip(curves, row[2].split(), strict=True):
            curve.append(float(milliseconds))
    for kernel, curve in zip(kernels, curves, strict=True):
        axis.plot(xs, curve, marker="o", label=kernel)


lines = Path(sys.argv[1]).read_text().splitlines()
kernels = kernels_of(lines)
figure, axes = pyplot.subplots(1, len(WANTED), figsize=(11, 3.4), sharey=True)
for axis, (title, label) in zip(axes, WANTED.items(), strict=True):
    draw(axis, lines, title, kernels)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("milliseconds a step")
axes[1].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.02))
figure.tight_layout()
figure.savefig(sys.argv[2])
