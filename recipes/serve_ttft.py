"""What a user waits for: a second turn behind a long first one, and others' streams while a long
prompt is read.

    python recipes/serve_ttft.py FOLDER [--kernel float32] [--target smollm2-135m]

1. The time to the first token of a prompt of 1,000 tokens, and of the second turn behind it.
2. While a prompt of 4,000 tokens is read: how long three running streams wait between two pieces
   of text at most, and how long /health takes.

About a minute on two cores. Prompts are words that no cache has seen. The exit status is 1 where a
second turn costs more than a fifth, a stream waits longer than 250 ms, or /health than 100 ms.
"""

import argparse
import random
import statistics
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import requests
from serving import ours
from transformers import AutoTokenizer

from flashdraft import hub
from flashdraft.bench.client import Api

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon", "tree", "salt")
SHARE = 0.2  # of a fresh prompt's time, at most
GAP = 0.250  # seconds
HEALTH = 0.100
BESIDE = 1200  # tokens of a stream beside the long prompt: it must run until that is read


def words(tokenizer, count, draw):
    """A text of about so many tokens."""
    made = []
    while len(made) < count:
        made.append(draw.choice(WORDS))
    text = " ".join(made)
    kept = tokenizer.encode(text)[:count]
    return tokenizer.decode(kept)


def first_token(api, turns):
    """Seconds to the first text, and the answer."""
    body = {"messages": turns, "max_tokens": 16, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    body["stream_options"] = {"include_usage": True}
    reply = api.ask(body)
    return reply.arrivals[0], reply


def second_turn(api, tokenizer, repeats=5):
    """Medians of the time to the first token: fresh, second turn; and what was cached."""
    fresh = []
    second = []
    cached = 0
    for number in range(repeats):
        turns = [{"role": "user", "content": words(tokenizer, 1000, random.Random(number))}]
        seconds, reply = first_token(api, turns)
        fresh.append(seconds)
        turns.append({"role": "assistant", "content": reply.text})
        turns.append({"role": "user", "content": "And now?"})
        seconds, reply = first_token(api, turns)
        second.append(seconds)
        cached = reply.num_cached
    return statistics.median(fresh), statistics.median(second), cached


class Running:
    """A stream beside the long prompt; `arrivals` are clock times of its pieces.

    It counts, greedily: every token of that is a piece of text that can be sent. (A story has
    tokens that are parts of one letter, and special ones.)
    """

    def __init__(self, url, number):
        self.api = Api(url)
        self.arrivals = []
        self.body = {
            "prompt": ", ".join(str(100 * number + i) for i in range(20)),
            "max_tokens": BESIDE,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        for event in self.api.events("/completions", self.body):
            if event["choices"]:
                self.arrivals.append(time.perf_counter())
        self.api.close()

    def longest_gap(self, start, end):
        """Seconds from one piece to the next, of pieces around that time."""
        gaps = []
        for sooner, later in pairwise(self.arrivals):
            if later > start and sooner < end:
                gaps.append(later - sooner)
        return max(gaps, default=0.0)


def long_prompt(url, tokenizer):
    """Seconds: the prompt of 4,000 tokens, the longest gap of the streams, the slowest /health."""
    streams = [Running(url, number) for number in range(3)]
    while min(len(stream.arrivals) for stream in streams) < 10:
        if not all(stream.thread.is_alive() for stream in streams):
            sys.exit("a stream has ended before the long prompt was sent")
        time.sleep(0.01)

    healths = []
    is_read = threading.Event()

    def watch():
        while not is_read.is_set():
            started = time.perf_counter()
            requests.get(f"{url}/health", timeout=60).raise_for_status()
            healths.append(time.perf_counter() - started)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    api = Api(url)
    started = time.perf_counter()
    text = words(tokenizer, 4000, random.Random(99))
    seconds, _ = first_token(api, [{"role": "user", "content": text}])
    ended = started + seconds
    is_read.set()
    watcher.join()
    api.close()
    for stream in streams:
        stream.thread.join()
    for stream in streams:
        if stream.arrivals[-1] < ended:
            print("WRONG: a stream has ended before the long prompt was read; BESIDE is too small")
            return seconds, float("inf"), max(healths)
    gap = max(stream.longest_gap(started, ended) for stream in streams)
    return seconds, gap, max(healths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--kernel", default="float32")
    parser.add_argument("--serve", nargs="*", default=[], help="further options of the server")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(options.target))

    arguments = ["--target", options.target, "--kernel", options.kernel, *options.serve]
    with ours(*arguments, log=options.folder / f"ttft-{options.kernel}.log") as served:
        api = Api(served.url)
        first_token(api, [{"role": "user", "content": "Hello"}])
        fresh, second, cached = second_turn(api, tokenizer)
        api.close()
        seconds, gap, health = long_prompt(served.url, tokenizer)

    share = second / fresh
    print(f"1,000 tokens: first token after {1000 * fresh:.0f} ms")
    print(f"second turn: {1000 * second:.0f} ms, {share:.1%} of it; {cached} tokens were cached")
    print(f"4,000 tokens beside 3 streams: first token after {seconds:.2f} s")
    print(f"longest wait of a stream meanwhile: {1000 * gap:.0f} ms")
    print(f"slowest /health: {1000 * health:.0f} ms")
    sys.exit(share > SHARE or gap > GAP or health > HEALTH)


if __name__ == "__main__":
    main()
