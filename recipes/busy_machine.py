"""Tokens a second of plain and drafted decoding while other processes keep the machine busy.

    python recipes/busy_machine.py [NUM_BUSY ...] [--runs 5] [--tokens 96]

Default settings. Every busy process is a Python loop. Prints one JSON object for each number of
them: medians of the runs, which take turns.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import flashdraft
from flashdraft.methods.autoregressive import Autoregressive

PROMPT = (
    "A baker bakes 12 trays of 8 rolls and sells 71 of them. How many rolls are left? "
    "Explain step by step."
)
LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that never rest; they end with this one."""
    processes = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("busy", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--kernel", default="auto")
    options = parser.parse_args()

    drafted = flashdraft.load("smollm2-135m", kernel=options.kernel)
    plain = replace(drafted, new_drafter=Autoregressive, adaptive=False)
    tokens = drafted.encode(PROMPT)
    how = {"max_new_tokens": options.tokens, "ignore_eos": True}
    methods = {"plain": plain, "drafted": drafted}
    for method in methods.values():
        method.generate(tokens, **how)  # kernels are built, prices are learned

    for count in options.busy:
        rates: dict[str, list[float]] = {name: [] for name in methods}
        texts = set()
        with busy(count):
            for _ in range(options.runs):
                for name, method in methods.items():
                    started = time.perf_counter()
                    result = method.generate(tokens, **how)
                    seconds = time.perf_counter() - started
                    rates[name].append(options.tokens / seconds)
                    texts.add(result.tokens)
        assert len(texts) == 1, "the texts differ"
        medians = {name: round(median(own), 1) for name, own in rates.items()}
        print(json.dumps({"busy": count} | medians), flush=True)


if __name__ == "__main__":
    main()
