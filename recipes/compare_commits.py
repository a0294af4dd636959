"""Whether a change made decoding slower: two checkouts in turn, on an idle machine.

    python recipes/compare_commits.py OLD_CHECKOUT NEW_CHECKOUT [--pairs 20]

Each run is a process of its own: recipes/busy_machine.py of this checkout with no other process
beside it, on the package of each of the two. Prints the mean ratio new / old of plain and of
drafted decoding, and its lower 95 % bound (Student's t over the pairs' logarithms).
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

from scipy import stats

SCRIPT = Path(__file__).with_name("busy_machine.py")


def rates(checkout: Path, kernel: str) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    call = [sys.executable, str(SCRIPT), "0", "--runs", "3", "--kernel", kernel]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--kernel", default="auto")
    options = parser.parse_args()

    logarithms: dict[str, list[float]] = {"plain": [], "drafted": []}
    for pair in range(options.pairs):
        order = [options.old, options.new]
        if pair % 2:
            order.reverse()
        found = {checkout: rates(checkout, options.kernel) for checkout in order}
        ratios = {}
        for name, own in logarithms.items():
            ratio = found[options.new][name] / found[options.old][name]
            own.append(math.log(ratio))
            ratios[name] = round(ratio, 3)
        print(pair + 1, ratios, flush=True)

    for name, own in logarithms.items():
        mean = fmean(own)
        error = stdev(own) / math.sqrt(len(own))
        bound = mean - stats.t.ppf(0.95, len(own) - 1) * error
        print(
            f"{name}: {math.exp(mean):.3f}, lower 95 % bound {math.exp(bound):.3f}, "
            f"{len(own)} pairs"
        )


if __name__ == "__main__":
    main()
