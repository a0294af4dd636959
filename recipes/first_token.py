"""What a user waits for: from the shell to the first token of `flashdraft generate`, and its parts.

    python recipes/first_token.py [TARGET] [--cold]     (default smollm2-135m; medians of five)

Every round is a process of its own. Warm: the entry in the cache folder is there, and the first
round does not count. --cold: without that entry, so that the model is read and packed. CPU seconds
are printed beside the others, because these count what other programs took of the machine.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from flashdraft import hub
from flashdraft.bench.report import print_table

ROUNDS = 5
PROMPT = "Why is the sky blue?"
PARTS = """
import sys, time
target = sys.argv[1]
marks = [("", time.perf_counter(), time.process_time())]

def mark(part):
    marks.append((part, time.perf_counter(), time.process_time()))

import torch
mark("import torch")
import transformers.tokenization_utils_tokenizers
mark("import transformers (its tokenizers)")
from flashdraft import hub, loading
from flashdraft.cli import decode
from flashdraft.generate import Model
from flashdraft.types import SamplingParams
if hub.builtin_draft(target):
    import flashdraft.methods.dflash
mark("import flashdraft")
loaded = loading.load_target(target)
mark("load the target")
drafter = loading.drafters("auto", loaded.target, target, tokenizer=loaded.tokenizer)
mark("load the drafter")
model = Model(loaded.target, loaded.tokenizer, drafter, eos=loaded.eos, max_rows=8, adaptive=True)
for chunk in model.stream(sys.argv[2], SamplingParams(max_new_tokens=8)):
    if chunk.pieces:
        break
mark("first text")
for (_, wall, cpu), (part, wall_after, cpu_after) in zip(marks, marks[1:]):
    print(part, wall_after - wall, cpu_after - cpu, sep="\\t")
"""


def first_token(target: str) -> tuple[float, float]:
    """Seconds from a process's start to its first character, and CPU seconds until its end."""
    command = [sys.executable, "-m", "flashdraft", "generate", PROMPT, "--target", target]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--max-new-tokens", "1"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - started
    _, _, used = os.wait4(process.pid, 0)
    return seconds, used.ru_utime + used.ru_stime


def parts(target: str) -> list[tuple[str, float, float]]:
    """Every part of the way in a process that is told to stop the time between them."""
    command = [sys.executable, "-c", PARTS, target, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = []
    for line in done.stdout.splitlines():
        part, seconds, cpu = line.split("\t")
        rows.append((part, float(seconds), float(cpu)))
    return rows


def forget_entries() -> None:
    for entry in hub.cache_dir().glob("packed-*.safetensors"):
        entry.unlink()


def main() -> None:
    is_cold = "--cold" in sys.argv
    names = [word for word in sys.argv[1:] if not word.startswith("--")]
    target = names[0] if names else "smollm2-135m"
    if Path(target).exists():
        target = str(Path(target).resolve())

    whole = []
    by_part: dict[str, list[tuple[float, float]]] = {}
    for number in range(ROUNDS + 1):
        if is_cold:
            forget_entries()
        measured = first_token(target)
        if is_cold:
            forget_entries()
        told = parts(target)
        if number == 0:  # reads files that no process has read before
            continue
        whole.append(measured)
        for part, seconds, cpu in told:
            by_part.setdefault(part, []).append((seconds, cpu))

    rows = []
    for part, pairs in [*by_part.items(), ("flashdraft generate, first token", whole)]:
        seconds = statistics.median(wall for wall, _ in pairs)
        cpu = statistics.median(used for _, used in pairs)
        rows.append([part, f"{seconds:.2f}", f"{cpu:.2f}"])
    print_table(["part", "seconds", "CPU seconds"], rows)


if __name__ == "__main__":
    main()
