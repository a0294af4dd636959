"""tau against training positions, with a fitted curve: where a drafter is on its scaling law, and what ten times more would give.

    python recipes/scaling.py runs/one/metrics.jsonl [runs/next/metrics.jsonl ...] --out docs/scaling.svg

Runs that go on from each other are given in their order; their positions add up. The curve is a line on the logarithmic axis:
less than two decades cannot tell where it bends. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np


def points(paths: list[Path]) -> list[tuple[int, float]]:
    seen, found = 0, []
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            seen += row["positions"]
            if "tau" in row:
                found.append((seen, row["tau"]))
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

    positions, tau = (
        np.array(column, dtype=float) for column in zip(*points(options.metrics), strict=True)
    )
    slope, start = np.polyfit(np.log10(positions / 1e6), tau, 1)
    last = positions[-1]
    print(
        f"tau = {start:.2f} + {slope:.2f} * log10(positions / 1 M), fitted to {len(tau)} measurements"
    )
    for factor in (1, 10):
        print(
            f"at {factor * last / 1e6:.1f} M positions: {start + slope * np.log10(factor * last / 1e6):.2f}"
        )
    xs = np.geomspace(positions[0], 10 * last, 200)
    _, axes = pyplot.subplots(figsize=(7, 4))
    axes.semilogx(
        xs, start + slope * np.log10(xs / 1e6), color="tab:gray", linestyle="--", label="fit"
    )
    axes.semilogx(positions, tau, "o", color="tab:blue", label="measured")
    axes.set(xlabel="training positions", ylabel="tau on held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend()
    pyplot.savefig(options.out, bbox_inches="tight")


if __name__ == "__main__":
    main()
