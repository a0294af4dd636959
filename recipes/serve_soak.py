"""A server under mixed load for a while: what fails, what leaks, and whether every text is plain
decoding's.

    flashdraft tasks --data DATA --task mt_bench --task gsm8k --first 20 --out prompts.jsonl
    python recipes/serve_soak.py prompts.jsonl FOLDER [--minutes 30] [--kernel int8]

Streams ask for chats and completions, streamed and whole, greedy and seeded, short and long, with
drafting off, on and auto; one request in ten hangs up in the middle, one in twenty is nonsense.
What the texts must be, plain decoding in this process says before the server starts. Prints what
was counted, and what is wrong with it; the exit status is 1 where anything is. Besides the minutes
it takes about one; `--minutes 1` is a short form.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import requests
from serving import ours, resident_bytes

import flashdraft
from flashdraft.bench.client import Api, ServerError
from flashdraft.bench.tasks import read_prompts
from flashdraft.types import SamplingParams

HANGS_UP = 0.10
IS_BAD = 0.05
SAMPLE = 5.0  # seconds from one look at memory to the next
BAD = (
    b"",
    b"{",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100000}',
    b'{"messages": [{"role": "user", "content": "hi"}], "n": 1000000000}',
    b'{"messages": [{"role": "user", "content": "hi"}], "model": "../../etc/passwd"}',
    b'{"messages": [{"role": "user", "content": "hi"}], "no_such_field": 1}',
    b"[" * 100_000,
)


class Case(NamedTuple):
    """One request that may be sent, and what must come of it."""

    path: str
    body: dict
    text: str
    finish: str


class Soak:
    """What all streams share."""

    def __init__(self, url, cases, deadline):
        self.url = url
        self.cases = cases
        self.deadline = deadline
        self.counts = Counter()
        self.wrong = []  # what must not be, in words

    def run_stream(self, seed):
        """Ask on until the deadline."""
        draw = random.Random(seed)
        api = Api(self.url)
        while time.monotonic() < self.deadline and len(self.wrong) < 20:
            try:
                self._ask(draw, api)
            except (ServerError, requests.RequestException) as error:
                self._fail(f"no answer: {error}")
            except Exception as error:  # a thread that dies in silence would ask and find nothing
                self._fail(f"no answer that can be read: {error!r}")
        api.close()

    def _ask(self, draw, api):
        chance = draw.random()
        if chance < IS_BAD:
            self._send_nonsense(draw.choice(BAD))
            return

        case = draw.choice(self.cases)
        body = case.body | {"drafting": draw.choice(("off", "on", "auto"))}
        if chance < IS_BAD + HANGS_UP:
            self._hang_up(api, case.path, body, draw.randrange(6))
        elif draw.random() < 0.7:
            self._check(case, "streamed", *streamed(api, case.path, body))
        else:
            self._check(case, "whole", *self._whole(case.path, body))

    def _send_nonsense(self, raw):
        headers = {"content-type": "application/json"}
        url = f"{self.url}/v1/chat/completions"
        answer = requests.post(url, raw, headers=headers, timeout=600)
        self.counts[f"nonsense: {answer.status_code}"] += 1
        is_refused = 400 <= answer.status_code < 500 and answer.status_code != 429
        if not is_refused or not answer.json()["error"]["message"]:
            self._fail(f"{raw[:60]!r}: {answer.status_code} {answer.text[:200]}")

    def _hang_up(self, api, path, body, num_events):
        events = api.events(path, body | {"stream": True})
        for _ in range(num_events):
            if next(events, None) is None:
                break
        api.close()
        self.counts["hung up"] += 1

    def _whole(self, path, body):
        answer = requests.post(f"{self.url}/v1{path}", json=body, timeout=600)
        if answer.status_code != 200:
            raise ServerError(f"{answer.status_code} {answer.text[:200]}")
        (choice,) = answer.json()["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return text, choice["finish_reason"]

    def _check(self, case, way, text, finish):
        self.counts[way] += 1
        if (text, finish) != (case.text, case.finish):
            body = json.dumps(case.body)
            expected = f"{case.finish} {case.text!r}"
            self._fail(f"{way} {case.path} {body[:300]}: {finish} {text!r}, not {expected}")

    def _fail(self, words):
        self.wrong.append(words)


def streamed(api, path, body):
    """The text and the reason of its end."""
    text = ""
    finish = None
    for event in api.events(path, body | {"stream": True}):
        for choice in event["choices"]:
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            finish = choice["finish_reason"] or finish
    return text, finish


# --- what is asked ------------------------------------------------------------------------------


def made_cases(path, target, kernel):
    """Requests of all sorts with plain decoding's texts."""
    model = flashdraft.load(target, draft="autoregressive", kernel=kernel)
    prompts = read_prompts(path)
    draw = random.Random(0)
    asked = []
    for number, prompt in enumerate(prompts):
        text = prompt.text
        if number % 8 == 7:  # a long one
            several = [one.text for one in draw.sample(prompts, 8)]
            text = "\n\n".join(several)
        is_chat = number % 4 != 3
        made = [{"role": "user", "content": text}] if is_chat else text
        if is_chat and number % 4 == 2:  # a second turn
            answer = {"role": "assistant", "content": "I see."}
            made = [*made, answer, {"role": "user", "content": "Say it in other words."}]
        is_seeded = number % 5 == 4
        params = SamplingParams(
            temperature=0.8 if is_seeded else 0.0,
            seed=number,
            max_new_tokens=draw.choice((4, 16, 48, 96)),
        )
        asked.append((made, params))

    ids = [tokens_of(model, made) for made, _ in asked]
    results = model.generate(ids, [params for _, params in asked])
    cases = []
    for (made, params), result in zip(asked, results, strict=True):
        body = {"max_tokens": params.max_new_tokens, "temperature": params.temperature}
        body["seed"] = params.seed
        if isinstance(made, list):
            route = "/chat/completions"
            body["messages"] = made
        else:
            route = "/completions"
            body["prompt"] = made
        cases.append(Case(route, body, result.text, result.finish_reason))
    return cases


def tokens_of(model, made):
    """A completion's prompt is text as it is, a chat's goes through the template."""
    if isinstance(made, str):
        return model.tokenizer.encode(made)
    return model.encode(made)


# --- what is looked at meanwhile ----------------------------------------------------------------


def figures(url):
    """/metrics by name; of those with labels, the sum."""
    found = Counter()
    for line in requests.get(f"{url}/metrics", timeout=60).text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)
            if 'status="5' in name:
                found["5xx"] += float(value)
    return found


def watch(served, deadline):
    """(resident bytes, seconds that /health took), as long as the streams ask."""
    samples = []
    while time.monotonic() < deadline:
        started = time.perf_counter()
        requests.get(f"{served.url}/health", timeout=60).raise_for_status()
        waited = time.perf_counter() - started
        samples.append((resident_bytes(served.pid), waited))
        time.sleep(max(0.0, min(SAMPLE, deadline - time.monotonic())))
    return samples


def settled(url):
    """Figures when nothing runs any more; those after 30 seconds if something does."""
    for _ in range(60):
        found = figures(url)
        if not found["flashdraft_running_requests"] and not found["flashdraft_waiting_requests"]:
            break
        time.sleep(0.5)
    return found


def run(options, cases):
    """What was counted, and what is wrong."""
    arguments = ["--target", options.target, "--kernel", options.kernel]
    arguments += ["--max-rows", options.rows, *options.serve]
    with ours(*arguments, log=options.folder / "soak.log") as served:
        warm = Soak(served.url, cases, time.monotonic() + 600)
        api = Api(served.url)
        for case in cases:  # what grows once has grown
            warm._check(case, "streamed", *streamed(api, case.path, case.body))
        api.close()

        deadline = time.monotonic() + 60 * options.minutes
        soak = Soak(served.url, cases, deadline)
        streams = []
        for seed in range(options.streams):
            streams.append(threading.Thread(target=soak.run_stream, args=[seed]))
            streams[-1].start()
        samples = watch(served, deadline)
        for stream in streams:
            stream.join()
        found = settled(served.url)
        memory = [resident for resident, _ in samples]
        memory.append(resident_bytes(served.pid))

    wrong = warm.wrong + soak.wrong
    fifth = max(len(memory) // 5, 1)
    first = statistics.median(memory[:fifth])
    last = statistics.median(memory[-fifth:])
    running = found["flashdraft_running_requests"] + found["flashdraft_waiting_requests"]
    if found["5xx"]:
        wrong.append(f"{found['5xx']:.0f} answers of status 5xx")
    if running:
        wrong.append(f"{running:.0f} requests still run or wait")
    if last > 1.05 * first:
        wrong.append(f"memory has grown from {first / 1e6:.0f} to {last / 1e6:.0f} MB")
    if found["flashdraft_accepted_tokens_total"] > found["flashdraft_drafted_tokens_total"]:
        wrong.append("more tokens were accepted than drafted")

    slowest = max(waited for _, waited in samples)
    print(f"{options.minutes:g} minutes, {options.streams} streams, {options.rows} rows")
    for name, count in sorted(soak.counts.items()):
        print(f"{name}: {count}")
    print(f"memory, first and last fifth: {first / 1e6:.1f} and {last / 1e6:.1f} MB")
    print(f"/health: at most {1000 * slowest:.0f} ms")
    for name, value in sorted(found.items()):
        is_ours = name.startswith("flashdraft_") and not name.endswith(("_bucket", "_created"))
        if is_ours:
            print(f"{name} {value:g}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--kernel", default="int8")
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--serve", nargs="*", default=[], help="further options of the server")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    wrong = run(options, made_cases(options.prompts, options.target, options.kernel))
    for words in wrong:
        print(f"WRONG: {words}")
    print("nothing is wrong" if not wrong else f"{len(wrong)} things are wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
