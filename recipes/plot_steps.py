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

WANTED = {
    "a row's tokens": "tokens of one row, context 64",
    "one token": "context, one token",
    "six tokens a row, context 64": "rows of six tokens",
}
lines = Path(sys.argv[1]).read_text().splitlines()
kernels = next(line.split()[1:] for line in lines if line.split()[:1] == ["tokens"])
figure, axes = pyplot.subplots(1, len(WANTED), figsize=(11, 3.4), sharey=True)
for axis, (title, label) in zip(axes, WANTED.items(), strict=True):
    found = [
        match.groups()
        for line in lines
        if (match := re.fullmatch(rf"{title} +(\d+) +([\d. ]+)", line))
    ]
    for kernel, column in zip(
        kernels, zip(*(times.split() for _, times in found), strict=True), strict=True
    ):
        axis.plot(
            [int(value) for value, _ in found],
            [float(ms) for ms in column],
            marker="o",
            label=kernel,
        )
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
