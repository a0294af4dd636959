"""Median milliseconds of a step by kernel: against tokens in a step, context, rows, threads, and the model's size.

    python recipes/step_times.py [TARGET]     (default smollm2-135m)

Kernels take turns step by step, so that a drifting machine hits all of them. The larger shapes have random weights.
"""

import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashdraft.bench.report import print_table
from flashdraft.decoding.tree import chain
from flashdraft.loading import load_target
from flashdraft.models.lean import LeanTarget

KERNELS = ("torch", "float32", "compact", "int8")


def medians(targets, *, tokens=1, context=64, rows=1, repeats=9):
    caches, times = {}, {name: [] for name in targets}
    for name, target in targets.items():
        caches[name] = target.new_cache(rows, context + tokens)
        for row in range(rows):
            target.prefill(caches[name], row, torch.arange(context) % 1000 + 100, ())
    proposal = (
        (torch.arange(tokens) + 100).repeat(rows, 1),
        chain(tokens).repeat(rows, 1),
        torch.full((rows,), tokens),
    )
    for _ in range(repeats):
        for name, target in targets.items():
            started = time.perf_counter()
            target.forward(caches[name], list(range(rows)), *proposal, ())
            times[name].append(1000 * (time.perf_counter() - started))
    return [f"{statistics.median(each[1:]):.1f}" for each in times.values()]


def table(title, targets, name, values, **fixed):
    rows = [[title, str(value), *medians(targets, **{name: value}, **fixed)] for value in values]
    print_table(["", name, *targets], rows)
    print()


name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
targets = {kernel: load_target(name, kernel=kernel)[0] for kernel in KERNELS}
print(
    {kernel: target.kernel for kernel, target in targets.items()},
    torch.get_num_threads(),
    "threads",
)
table("a row's tokens", targets, "tokens", (1, 2, 4, 8, 16, 32))
table("one token", targets, "context", (64, 256, 1024, 4096))
table("one token a row, context 64", targets, "rows", (1, 2, 4, 8, 16))
table("six tokens a row, context 64", targets, "rows", (1, 2, 4, 8, 16), tokens=6)
threads = torch.get_num_threads()
torch.set_num_threads(1)
table("1 thread", targets, "tokens", (1, 8))
torch.set_num_threads(threads)
shapes = {"0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2)}
for size, (hidden, inner, layers, heads, kv_heads) in shapes.items():
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = (
        LlamaForCausalLM(config).to(torch.bfloat16).float()
    )  # 16-bit numbers, as models are published
    some = {kernel: LeanTarget(model, size, kernel=kernel) for kernel in ("compact", "int8")}
    table(f"{size}, random bf16 weights", some, "tokens", (1, 8), repeats=5)
    del model, some
