"""Throughput of `flashdraft serve` by kernel, number of streams and drafting, beside the kernel
alone in the same hour.

    flashdraft tasks --data DATA --task gsm8k --task humaneval --task mt_bench --out prompts.jsonl
    python recipes/serve_throughput.py prompts.jsonl FOLDER [--kernels int8] [--repeats 6]

Every kernel is measured in a server of its own, with answers of 64 tokens. A kernel whose results
lie in the folder already is not measured again. On two cores about 4 minutes for int8, 5 for
compact and 8 for float32 with 6 repeats; `--repeats 2 --streams 1,8` is a short form.
"""

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path

from serving import ours
from step_times import medians

from flashdraft.bench.client import Api
from flashdraft.bench.load import LoadConfig, run_load
from flashdraft.bench.load_report import read_load, show_load, summarise_load
from flashdraft.loading import load_target

TOKENS = 64  # of an answer
BESIDE = 128  # of answers that run side by side
SIDE_BY_SIDE = (1, 8)  # streams
CONTEXT = 160  # about what a row holds in the middle of its answer


def kernel_alone(name, kernel):
    """Milliseconds of a step of one row and of eight; its target is gone afterwards."""
    target, _, _ = load_target(name, kernel=kernel)
    steps = []
    for rows in (1, 8):
        steps += medians({kernel: target}, context=CONTEXT, rows=rows, repeats=30)
    return steps


def side_by_side(url, count):
    """Milliseconds between two tokens of so many streams, while no prompt is read."""
    replies = []

    def ask(number):
        turns = [{"role": "user", "content": f"{number} {count}: tell me a long story."}]
        body = {"messages": turns, "max_tokens": BESIDE, "ignore_eos": True, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "drafting": "off"}
        started = time.perf_counter()
        reply = Api(url).ask(body)
        replies.append([started + arrival for arrival in reply.arrivals])

    threads = [threading.Thread(target=ask, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(replies) < count:
        sys.exit(f"{count - len(replies)} of {count} streams side by side have failed")

    first = max(arrivals[0] for arrivals in replies)
    last = min(arrivals[-1] for arrivals in replies)
    num_steps = 0
    for arrivals in replies:
        num_steps += sum(first < arrival <= last for arrival in arrivals) / count
    return 1000 * (last - first) / num_steps


def measure(options, kernel):
    """The kernel's results file; what the kernel alone does stands before and behind the server."""
    out = options.folder / f"{kernel}.jsonl"
    if out.exists():
        return out
    unfinished = out.with_suffix(".part.jsonl")
    unfinished.unlink(missing_ok=True)
    before = kernel_alone(options.target, kernel)
    config = LoadConfig(
        options.prompts,
        unfinished,
        concurrency=options.streams,
        repeats=options.repeats,
        max_new_tokens=TOKENS,
        ignore_eos=True,
        reuse=options.reuse,
    )
    rows = max(*config.levels, *SIDE_BY_SIDE)
    arguments = ["--target", options.target, "--kernel", kernel, "--max-rows", rows]
    with ours(*arguments, log=options.folder / f"{kernel}.log") as served:
        run_load(served.url, config)
        rounds = []
        for _ in range(3):
            rounds.append([side_by_side(served.url, count) for count in SIDE_BY_SIDE])
    after = kernel_alone(options.target, kernel)

    steps = [statistics.fmean(pair) for pair in zip(before, after, strict=True)]
    steps += [statistics.median(several) for several in zip(*rounds, strict=True)]
    text = " ".join(map(str, steps))
    out.with_suffix(".steps").write_text(text)
    unfinished.rename(out)
    return out


def show(out):
    show_load(out)
    one, eight, one_stream, streams = map(float, out.with_suffix(".steps").read_text().split())
    print(f"kernel alone: a step of 1 row {one:.2f} ms, of 8 rows {eight:.2f} ms")
    print(f"side by side, drafting off: 1 stream {one_stream:.2f} ms a token, 8 {streams:.2f} ms")
    print(f"  8 streams to 1: {one_stream / streams * eight / one:.1%} of the kernel's gain")
    print(f"  8 streams: {eight / streams:.1%} of the kernel's tokens/s")
    rates = {}
    tokens = {}
    for row in summarise_load(read_load(out)[1]):
        rates[row.streams, row.drafting] = row.tokens_per_second
        tokens[row.streams, row.drafting] = row.token
    if (8, "off") not in rates:
        return

    alone = 8000 / eight
    decoding = 8000 / tokens[8, "off"]
    print(f"8 streams, drafting off: {rates[8, 'off'] / alone:.1%} of the kernel's {alone:.0f}")
    print(f"  tokens/s with prompts, {decoding / alone:.1%} without")
    if (1, "off") in rates:
        gain = rates[8, "off"] / rates[1, "off"]
        best = 8 * one / eight
        print(f"8 streams to 1: {gain:.2f}, {gain / best:.1%} of the kernel's {best:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--kernels", default="float32,compact,int8")
    parser.add_argument("--streams", default="1,2,4,8,16")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--reuse", action="store_true", help="of the server's prefix cache")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for kernel in options.kernels.split(","):
        print(f"\n{kernel}", flush=True)
        show(measure(options, kernel))


if __name__ == "__main__":
    main()
