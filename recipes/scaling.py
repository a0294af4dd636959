"""tau against training positions, with a fitted curve.

    python recipes/scaling.py runs/one/metrics.jsonl [runs/next/metrics.jsonl ...] --out scaling.svg

Where a drafter is on its scaling law, and what ten times more would give. Runs that go on from each
other are given in their order; their positions add up. The curve is a line on the logarithmic axis:
less than two decades cannot tell where it bends. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    positions: int  # of training, seen until then
    tau: float


def points(paths: list[Path]) -> list[Point]:
    seen = 0
    found = []
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            seen += row["positions"]
            if "tau" in row:
                found.append(Point(seen, row["tau"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    measured = points(options.metrics)
    positions = np.array([point.positions for point in measured], dtype=float)
    tau = np.array([point.tau for point in measured], dtype=float)
    slope, start = np.polyfit(np.log10(positions / 1e6), tau, 1)

    def fitted(at):
        return start + slope * np.log10(at / 1e6)

    last = positions[-1]
    print(
        f"tau = {start:.2f} + {slope:.2f} * log10(positions / 1 M), "
        f"fitted to {len(tau)} measurements"
    )
    for factor in (1, 10):
        print(f"at {factor * last / 1e6:.1f} M positions: {fitted(factor * last):.2f}")

    xs = np.geomspace(positions[0], 10 * last, 200)
    _, axes = pyplot.subplots(figsize=(7, 4))
    axes.semilogx(xs, fitted(xs), color="tab:gray", linestyle="--", label="fit")
    axes.semilogx(positions, tau, "o", color="tab:blue", label="measured")
    axes.set(xlabel="training positions", ylabel="tau on held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend()
    pyplot.savefig(options.out, bbox_inches="tight")


if __name__ == "__main__":
    main()
