"""One check of docs/gpu.md at a time, for recipes/gpu.sh.

    python recipes/gpu_checks.py {machine,texts,graphs,speed,memory,training} [--device cuda]

Exits with 1 where a check fails. Speeds and bytes are printed, not judged.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import flashdraft
from flashdraft import Model, Result, SamplingParams
from flashdraft.bench.report import print_table
from flashdraft.cli import main as command
from flashdraft.methods.autoregressive import Autoregressive

PROMPTS = (
    "A baker bakes 12 trays of 8 rolls and sells 71 of them. How many rolls are left?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Why is the sky blue?",
)
TIE = {"float32": 1e-3, "bfloat16": 0.25}  # how near two logits may be where texts fork
BLOCK = 6


def load(options: argparse.Namespace, kernel: str, dtype: str) -> Model:
    return flashdraft.load(
        options.target,
        draft=options.draft,
        block_size=BLOCK,
        device=options.device,
        kernel=kernel,
        dtype=dtype,
    )


def plain(model: Model) -> Model:
    return replace(model, new_drafter=Autoregressive)


def machine(options: argparse.Namespace) -> bool:
    """What is there."""
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    if torch.device(options.device).type != "cuda":
        print(f"device {options.device}")
        return True
    facts = torch.cuda.get_device_properties(options.device)
    print(f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    print(f"bfloat16: {torch.cuda.is_bf16_supported()}")
    return True


def texts(options: argparse.Namespace) -> bool:
    """Drafted greedy text is plain greedy text; a fork counts only at a tie."""
    passed = True
    for dtype in ("float32", "bfloat16"):
        for kernel in options.kernels:
            model = load(options, kernel, dtype)
            for prompt in PROMPTS:
                drafted = model.generate(prompt, max_new_tokens=options.tokens)
                alone = plain(model).generate(prompt, max_new_tokens=options.tokens)
                gap = fork_gap(model, prompt, drafted, alone)
                is_equal = gap is None
                is_tie = gap is not None and gap <= TIE[dtype]
                word = "equal" if is_equal else f"forks where two logits are {gap:.4f} apart"
                print(f"{kernel} {dtype} tau {drafted.stats.tau:.2f}: {word}")
                passed = passed and (is_equal or is_tie)
    return passed


def fork_gap(model: Model, prompt: str, drafted: Result, alone: Result) -> float | None:
    """How far apart the two likeliest logits are where the texts part; None if they do not."""
    if drafted.tokens == alone.tokens:
        return None
    same = 0
    for left, right in zip(drafted.tokens, alone.tokens, strict=False):
        if left != right:
            break
        same += 1
    read = [*model.encode(prompt), *alone.tokens[:same]]
    cache = model.target.new_cache(1, len(read))
    logits, _ = model.target.prefill(cache, 0, torch.tensor(read), ())
    best = logits.float().topk(2).values
    return float(best[0] - best[1])


def graphs(options: argparse.Namespace) -> bool:
    """`kernel="compiled"` records CUDA graphs, and does not trace again at another length."""
    counters = torch._dynamo.utils.counters
    model = load(options, "compiled", "bfloat16")
    model.generate(PROMPTS[0], max_new_tokens=options.tokens)
    first = counters["stats"]["unique_graphs"]
    model.generate(PROMPTS[1], max_new_tokens=options.tokens)
    again = counters["stats"]["unique_graphs"]
    skipped = counters["inductor"]["cudagraph_skips"]
    print(f"graphs traced {first}, with a second text {again}; left out of CUDA graphs: {skipped}")
    return skipped == 0


def speed(options: argparse.Namespace) -> bool:
    """Tokens/s behind the first one, all ways in turn; medians."""
    params = SamplingParams(max_new_tokens=4 * options.tokens)
    ways = {}
    for kernel in options.kernels:
        model = load(options, kernel, "bfloat16")
        ways[f"{kernel}, plain"] = plain(model)
        ways[f"{kernel}, drafted"] = model
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + options.repeats):
        for prompt in PROMPTS:
            for name, model in ways.items():
                started = time.perf_counter()
                result = model.generate(prompt, params)
                seconds = time.perf_counter() - started - result.stats.seconds["prefill"]
                if number > 0:  # the first round compiles and warms up
                    speeds[name].append((result.stats.num_tokens - 1) / seconds)
    cells = [[name, f"{statistics.median(own):.1f}"] for name, own in speeds.items()]
    print_table(["bfloat16", "tokens/s"], cells)
    return True


def memory(options: argparse.Namespace) -> bool:
    """Bytes on the GPU after a text, by kernel."""
    if torch.device(options.device).type != "cuda":
        print("no GPU: nothing to count")
        return True
    for kernel in options.kernels:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = load(options, kernel, "bfloat16")
        model.generate(PROMPTS[0], max_new_tokens=options.tokens)
        peak = torch.cuda.max_memory_allocated() / 2**20
        print(f"{kernel}: peak {peak:.0f} MiB, weights {model.target.nbytes / 2**20:.0f} MiB")
        del model
    return True


def training(options: argparse.Namespace) -> bool:
    """A few steps on the device that accelerate picks: features, FlexAttention, bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
        prompts.write_text("\n".join(lines), encoding="utf-8")
        answers = f"{folder}/answers.jsonl"
        features = f"{folder}/features"
        run = f"{folder}/run"
        target = ["--target", options.target]
        device = ["--device", options.device]
        short = ["--max-new-tokens", str(options.tokens)]
        steps = ["--steps", "20", "--eval-every", "20"]
        stages = [
            ["regenerate", str(prompts), "--out", answers, *target, *device, *short],
            ["features", answers, "--out", features, *target, *device],
            ["train", features, "--out", run, "--eval-prompts", str(prompts), *target, *steps],
        ]
        for stage in stages:
            if command(stage) != 0:
                return False
    return True


CHECKS = {check.__name__: check for check in (machine, texts, graphs, speed, memory, training)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--kernels", nargs="+", default=["transformers", "torch", "compiled"])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    sys.exit(0 if CHECKS[given.check](given) else 1)
