"""Predictions of `flashdraft roofline` beside measurements: on this machine, or the DFlash paper's published ones.

    python recipes/roofline_check.py [--kernels float32,compact,int8]     this CPU, smollm2-135m and its drafter, one process
    python recipes/roofline_check.py --paper                              arXiv 2602.06036's tables, on their GPUs

On this machine only ratios are compared, all measured in turn step by step: steps of 4 and 8 nodes to steps of one, the share
of drafting in a round, and tokens/s to plain decoding with whole blocks. The predictions get the measured tau, the bytes that
the kernel's weights really take, and what `calibrate` measures in the same process; nothing is fitted. Wanted: within 15 %.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

import flashdraft
from flashdraft import hub
from flashdraft.bench.profile import calibrate
from flashdraft.bench.report import print_table
from flashdraft.bench.roofline import RooflineConfig, named, predict, shape
from flashdraft.decoding.tree import chain
from flashdraft.engine import Engine
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.types import Drafter, Proposal, SamplingParams

TARGET, BLOCK, STEPS, CONTEXT = "smollm2-135m", 6, 40, 256
FORMATS = {
    "float32": "float32",
    "compact": "q4",
    "int8": "int8",
}  # whose arithmetic a kernel's is; of compact most is q4
PROMPTS = [
    "A baker bakes 12 trays of 8 rolls and sells 71 of them. How many rolls are left? Explain step by step.",
    "Write a Python function that returns the prime numbers below n.",
    "Tell me how bees make honey.",
]
PAPER = [  # what it is, model, device, engine, drafter, block, rows, tau, published speed-up
    (
        "H200, transformers: GSM8K (fitted)",
        "qwen3-8b",
        "h200",
        "transformers",
        "dflash",
        16,
        1,
        6.54,
        5.15,
    ),
    (
        "H200, transformers: MATH-500",
        "qwen3-8b",
        "h200",
        "transformers",
        "dflash",
        16,
        1,
        7.87,
        6.08,
    ),
    (
        "H200, transformers: HumanEval",
        "qwen3-8b",
        "h200",
        "transformers",
        "dflash",
        16,
        1,
        6.50,
        5.14,
    ),
    ("H200, transformers: MBPP", "qwen3-8b", "h200", "transformers", "dflash", 16, 1, 5.95, 4.65),
    (
        "H200, transformers: MT-Bench",
        "qwen3-8b",
        "h200",
        "transformers",
        "dflash",
        16,
        1,
        4.24,
        2.75,
    ),
    ("H200, transformers: mean", "qwen3-8b", "h200", "transformers", "dflash", 16, 1, 6.49, 4.86),
    (
        "H200, transformers: mean at T = 1",
        "qwen3-8b",
        "h200",
        "transformers",
        "dflash",
        16,
        1,
        5.48,
        4.03,
    ),
    (
        "H200, transformers: EAGLE-3, mean",
        "qwen3-8b",
        "h200",
        "transformers",
        "eagle3",
        8,
        1,
        3.40,
        2.02,
    ),
    (
        "H200, transformers: EAGLE-3, mean at T = 1",
        "qwen3-8b",
        "h200",
        "transformers",
        "eagle3",
        8,
        1,
        3.26,
        1.88,
    ),
    (
        "B200, SGLang: MATH-500, 1 request",
        "qwen3-8b",
        "b200",
        "serving",
        "dflash",
        16,
        1,
        7.87,
        5.1,
    ),
    (
        "B200, SGLang: MATH-500, 32 requests",
        "qwen3-8b",
        "b200",
        "serving",
        "dflash",
        16,
        32,
        7.87,
        2.8,
    ),
    (
        "B200, SGLang: Llama-3.1, GSM8K",
        "llama-3.1-8b",
        "b200",
        "serving",
        "dflash",
        10,
        1,
        4.32,
        2.4,
    ),
    (
        "B200, SGLang: Llama-3.1, EAGLE-3",
        "llama-3.1-8b",
        "b200",
        "serving",
        "eagle3",
        8,
        1,
        4.55,
        1.9,
    ),
]


class Guess(Drafter):
    """Proposes a chain of one token over and over: a step's cost at so many nodes, nearly nothing else."""

    name = "guess"

    def __init__(self, nodes):
        self.nodes = nodes

    def propose(self, rows, max_nodes):
        nodes = min(self.nodes, max_nodes)
        return Proposal(
            torch.tensor([[rows.anchors[0]] + [500] * (nodes - 1)]),
            chain(nodes)[None],
            torch.tensor([nodes]),
        )


def step_ratios(model):
    """Median seconds of an engine's step of 4 and of 8 nodes, to one's; in turn."""
    engines, times = {n: Engine(model.target, Guess(n)) for n in (1, 4, 8)}, {1: [], 4: [], 8: []}
    for engine in engines.values():
        params = SamplingParams(max_new_tokens=16 * STEPS, ignore_eos=True)
        engine.admit(model.request([100 + i % 1000 for i in range(CONTEXT)], params))
    for _ in range(STEPS):
        for n, engine in engines.items():
            started = time.perf_counter()
            engine.step()
            times[n].append(time.perf_counter() - started)
    plain, *others = (statistics.median(each[5:]) for each in times.values())
    return [other / plain for other in others]


def answers(model):
    """tau, share of drafting, decode tokens/s to plain and the mean context: totals over the prompts, answered in turn."""
    both = replace(model, new_drafter=Autoregressive), model
    for each in both:
        each.generate(PROMPTS[0], max_new_tokens=8)
    pairs = [
        [each.generate(p, max_new_tokens=64, ignore_eos=True).stats for each in both]
        for p in PROMPTS * 2
    ]
    plain, drafted = (
        sum(stats.decode_seconds for stats in side) for side in zip(*pairs, strict=True)
    )
    stats = [pair[1] for pair in pairs]
    tau = sum(each.num_tokens - 1 for each in stats) / sum(each.target_passes for each in stats)
    context = sum(each.num_prompt_tokens + each.num_tokens // 2 for each in stats) // len(stats)
    return tau, sum(each.seconds["draft"] for each in stats) / drafted, plain / drafted, context


def here(kernels):
    net, draft = shape(TARGET), hub.read_config(hub.builtin_draft(TARGET))
    network = {"draft_layers": draft["num_hidden_layers"], "draft_vocab": draft["draft_vocab_size"]}
    size = (
        net.layers * net.hidden * (2 * (net.heads + net.kv_heads) * net.head_dim + 3 * net.inner)
        + net.hidden * net.vocab
    )
    for kernel in kernels:
        model = flashdraft.load(TARGET, kernel=kernel, block_size=BLOCK, max_rows=1)
        packed = model.target.nbytes - model.target.embedding.nbytes
        target, drafts = calibrate(FORMATS[kernel])
        on = replace(target, weight=packed / size), drafts
        (four, eight), (tau, share, gain, context) = step_ratios(model), answers(model)
        config = RooflineConfig(
            weights=FORMATS[kernel],
            tau=tau,
            block_size=BLOCK,
            context=CONTEXT + STEPS // 2,
            **network,
        )
        row = {row.block: row for row in predict(net, config, on)}
        one = next(
            row for row in predict(net, replace(config, context=context), on) if row.block == BLOCK
        )
        pairs = {
            "step(4) / step(1)": (row[4].verify / row[1].verify, four),
            "step(8) / step(1)": (row[8].verify / row[1].verify, eight),
            f"drafting in a round, block {BLOCK}": (one.draft / (one.draft + one.verify), share),
            f"tokens/s to plain, tau {tau:.2f}": (one.gain, gain),
        }
        rates = (
            f"{target.bandwidth / 1e9:.1f} GB/s, {target.rates[8] / 1e9:.0f} GFLOP/s with 8 tokens"
        )
        fixed = f"pass {1e3 * target.host:.2f} ms, round {1e3 * target.round:.2f} ms"
        print(
            f"{kernel}: {rates}, {fixed}, {packed / 1e6:.0f} MB of weights, {torch.get_num_threads()} threads"
        )
        rows = [
            [kernel, name, f"{guess:.2f}", f"{real:.2f}", f"{guess / real - 1:+.0%}"]
            for name, (guess, real) in pairs.items()
        ]
        print_table(["kernel", "ratio", "predicted", "measured", "error"], rows)


def paper():
    rows = []
    for what, model, device, engine, drafter, block, together, tau, published in PAPER:
        config = RooflineConfig(
            device=device, engine=engine, drafter=drafter, block_size=block, rows=together, tau=tau
        )
        gain = next(
            row.gain for row in predict(shape(model), config, named(config)) if row.block == block
        )
        rows.append(
            [what, f"{tau:.2f}", f"{gain:.2f}", f"{published:.2f}", f"{gain / published - 1:+.0%}"]
        )
    print_table(["published", "tau", "predicted", "measured", "error"], rows)


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--paper", action="store_true")
parser.add_argument("--kernels", default=",".join(FORMATS))
options = parser.parse_args()
paper() if options.paper else here(options.kernels.split(","))
