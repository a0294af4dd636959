"""tau against training positions, with a fitted curve.

    python recipes/scaling.py runs/one/metrics.jsonl [runs/next/metrics.jsonl ...] --out scaling.svg
    python recipes/scaling.py recipes/smollm2-curve.jsonl --out docs/scaling.svg

Where a drafter is on its scaling law, and what ten times more would give. Runs that go on from each
other are given in their order; their positions add up. Where rows name their held-out prompts
(`held_out`), each set has a line of its own. It is straight on the logarithmic axis: less than two
decades cannot tell where it bends. Needs matplotlib.
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


def points(paths: list[Path]) -> dict[str, list[Point]]:
    """By the held-out prompts on which tau was measured."""
    seen = 0
    found: dict[str, list[Point]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            seen += row["positions"]
            if "tau" in row:
                held_out = row.get("held_out", "held-out prompts")
                found.setdefault(held_out, []).append(Point(seen, row["tau"]))
    return found


class Line(NamedTuple):
    """tau = start + slope * log10(positions / 1 M)."""

    start: float
    slope: float

    def at(self, positions):
        return self.start + self.slope * np.log10(positions / 1e6)


def fitted(measured: list[Point]) -> Line:
    positions = np.array([point.positions for point in measured], dtype=float)
    taus = [point.tau for point in measured]
    slope, start = np.polyfit(np.log10(positions / 1e6), taus, 1)
    return Line(start, slope)


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

    _, axes = pyplot.subplots(figsize=(7, 4))
    for held_out, measured in points(options.metrics).items():
        line = fitted(measured)
        last = measured[-1].positions
        print(
            f"{held_out}: tau = {line.start:.2f} + {line.slope:.2f} * log10(positions / 1 M), "
            f"fitted to {len(measured)} measurements"
        )
        for factor in (1, 10):
            at = factor * last
            print(f"at {at / 1e6:.1f} M positions: {line.at(at):.2f}")

        xs = np.geomspace(measured[0].positions, 10 * last, 200)
        (drawn,) = axes.semilogx(xs, line.at(xs), linestyle="--", alpha=0.5)
        positions = [point.positions for point in measured]
        taus = [point.tau for point in measured]
        axes.semilogx(positions, taus, "o", color=drawn.get_color(), label=held_out)
    axes.set(xlabel="training positions", ylabel="tau on held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend()
    pyplot.savefig(options.out, bbox_inches="tight")


if __name__ == "__main__":
    main()
