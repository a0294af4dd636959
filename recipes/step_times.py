"""Median milliseconds of a step by kernel.

    python recipes/step_times.py [TARGET]     (default smollm2-135m)

Against tokens in a step, context, rows, threads, and the model's size. Kernels take turns step by
step, so that a drifting machine hits all of them. The larger shapes have random weights.
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
    """Of every target: a step in which each row reads so many tokens behind the context, in ms."""
    caches = {}
    times = {}
    prompt = torch.arange(context) % 1000 + 100
    for name, target in targets.items():
        times[name] = []
        caches[name] = target.new_cache(rows, context + tokens)
        for row in range(rows):
            target.prefill(caches[name], row, prompt, ())

    slots = list(range(rows))
    read = (torch.arange(tokens) + 100).repeat(rows, 1)
    parents = chain(tokens).repeat(rows, 1)
    sizes = torch.full((rows,), tokens)
    for _ in range(repeats):
        for name, target in targets.items():
            started = time.perf_counter()
            target.forward(caches[name], slots, read, parents, sizes, ())
            times[name].append(1000 * (time.perf_counter() - started))

    return [statistics.median(own[1:]) for own in times.values()]


def table(title, targets, name, values, **fixed):
    """A row for every value of the argument of `medians` that is called `name`."""
    rows = []
    for value in values:
        milliseconds = medians(targets, **{name: value}, **fixed)
        rows.append([title, str(value), *(f"{one:.1f}" for one in milliseconds)])
    print_table(["", name, *targets], rows)
    print()


def random_target(size, kernels):
    """By kernel; with weights of 16 bits, as models are published."""
    hidden, inner, layers, heads, kv_heads = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).float()
    return {kernel: LeanTarget(model, size, kernel=kernel) for kernel in kernels}


# hidden and inner size, layers, heads, heads of keys and values
SHAPES = {"0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2)}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    targets = {}
    for kernel in KERNELS:
        targets[kernel], _, _ = load_target(name, kernel=kernel)
    words = {kernel: target.kernel for kernel, target in targets.items()}
    threads = torch.get_num_threads()
    print(words, threads, "threads")

    table("a row's tokens", targets, "tokens", (1, 2, 4, 8, 16, 32))
    table("one token", targets, "context", (64, 256, 1024, 4096))
    table("one token a row, context 64", targets, "rows", (1, 2, 4, 8, 16))
    table("six tokens a row, context 64", targets, "rows", (1, 2, 4, 8, 16), tokens=6)

    torch.set_num_threads(1)
    table("1 thread", targets, "tokens", (1, 8))
    torch.set_num_threads(threads)

    for size in SHAPES:
        some = random_target(size, ("compact", "int8"))
        table(f"{size}, random bf16 weights", some, "tokens", (1, 8), repeats=5)
        del some  # before the next one is made


if __name__ == "__main__":
    main()
