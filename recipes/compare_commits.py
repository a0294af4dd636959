"""Whether a change made decoding slower: two checkouts in turn, on an idle machine.

    python recipes/compare_commits.py OLD_CHECKOUT NEW_CHECKOUT [--turns 40] [--tokens 48]

One process stays for each checkout, its models loaded. They take turns of a fraction of a second,
method by method, so that what the machine does meanwhile meets both alike. Prints for every method
the median of the ratios new / old of tokens a second, and its 95 % interval (the order statistics
of the ratios, by the sign test). Both must write the same texts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from scipy import stats

PROMPT = (
    "A baker bakes 12 trays of 8 rolls and sells 71 of them. How many rolls are left? "
    "Explain step by step."
)
METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {"draft": "autoregressive"},
    "dflash": {"draft": "dflash", "block_size": 6},
    "dflash tree": {"draft": "dflash", "block_size": 6, "tree_nodes": 12},
    "eagle3": {"draft": "eagle3", "block_size": 4},
    "eagle3 tree": {"draft": "eagle3", "block_size": 4, "tree_nodes": 12},
}


def work(kernel: str, tokens: int) -> None:
    """Answer every line, the name of a method, by what one generation with it took."""
    import flashdraft

    models = {}
    for name, options in METHODS.items():
        models[name] = flashdraft.load("smollm2-135m", kernel=kernel, **options)
    for line in sys.stdin:
        model = models[line.strip()]
        started = time.perf_counter()
        result = model.generate(PROMPT, max_new_tokens=tokens, ignore_eos=True)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "text": result.text}), flush=True)


class Worker:
    """A process that decodes with the package of one checkout."""

    def __init__(self, checkout: Path, kernel: str, tokens: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        call = [sys.executable, __file__, "--worker", "--kernel", kernel, "--tokens", str(tokens)]
        self.process = subprocess.Popen(
            call, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, method: str) -> dict[str, Any]:
        """The seconds and the text of one generation."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(method + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a worker ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of their median."""
    ordered = sorted(ratios)
    outside = int(stats.binom.ppf(0.025, len(ordered), 0.5)) - 1  # values left out at either end
    lowest = max(outside, 0)
    return ordered[lowest], ordered[-1 - lowest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="OLD NEW")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--kernel", default="float32")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.kernel, options.tokens)
        return
    if len(options.checkouts) != 2:
        parser.error("name two checkouts, the old one first")

    old, new = (Worker(path, options.kernel, options.tokens) for path in options.checkouts)
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(options.turns + 1):
        for name, own in ratios.items():
            order = [new, old] if turn % 2 else [old, new]
            answers = {worker: worker.ask(name) for worker in order}
            if answers[old]["text"] != answers[new]["text"]:
                sys.exit(f"{name}: the texts differ")
            if turn > 0:  # kernels are built in the first one, memory is touched
                own.append(answers[old]["seconds"] / answers[new]["seconds"])

    for name, own in ratios.items():
        low, high = interval(own)
        print(f"{name}: {median(own):.3f}, 95 % from {low:.3f} to {high:.3f}, {len(own)} turns")


if __name__ == "__main__":
    main()
