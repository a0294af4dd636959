"""Predictions of `flashdraft roofline` beside measurements: on this machine, or published ones.

    python recipes/roofline_check.py [--kernels float32,compact,int8]
    python recipes/roofline_check.py --paper

The first is of this CPU, smollm2-135m and its drafter, in one process; the second of the tables of
the DFlash paper, arXiv 2602.06036, on its GPUs.

On this machine only ratios are compared, all measured in turn step by step: steps of 4 and 8 nodes
to steps of one, the share of drafting in a round, and tokens/s to plain decoding with whole blocks.
The predictions get the measured tau, the bytes that the kernel's weights really take, and what
`calibrate` measures in the same process; nothing is fitted. Wanted: within 15 %.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

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

TARGET = "smollm2-135m"
BLOCK = 6
STEPS = 40
CONTEXT = 256
# whose arithmetic a kernel's is; of compact most is q4
FORMATS = {"float32": "float32", "compact": "q4", "int8": "int8"}
PROMPTS = [
    "A baker bakes 12 trays of 8 rolls and sells 71 of them. How many rolls are left? "
    "Explain step by step.",
    "Write a Python function that returns the prime numbers below n.",
    "Tell me how bees make honey.",
]


class Published(NamedTuple):
    """A row of the paper's tables."""

    name: str
    question: RooflineConfig
    speed_up: float
    model: str = "qwen3-8b"


def on_h200(name, tau, speed_up, *, drafter="dflash", block=16):
    question = RooflineConfig(
        device="h200", engine="transformers", drafter=drafter, block_size=block, tau=tau
    )
    return Published(f"H200, transformers: {name}", question, speed_up)


def on_b200(name, tau, speed_up, *, drafter="dflash", block=16, rows=1, model="qwen3-8b"):
    question = RooflineConfig(
        device="b200", engine="serving", drafter=drafter, block_size=block, rows=rows, tau=tau
    )
    return Published(f"B200, SGLang: {name}", question, speed_up, model)


PAPER = [
    on_h200("GSM8K (fitted)", 6.54, 5.15),
    on_h200("MATH-500", 7.87, 6.08),
    on_h200("HumanEval", 6.50, 5.14),
    on_h200("MBPP", 5.95, 4.65),
    on_h200("MT-Bench", 4.24, 2.75),
    on_h200("mean", 6.49, 4.86),
    on_h200("mean at T = 1", 5.48, 4.03),
    on_h200("EAGLE-3, mean", 3.40, 2.02, drafter="eagle3", block=8),
    on_h200("EAGLE-3, mean at T = 1", 3.26, 1.88, drafter="eagle3", block=8),
    on_b200("MATH-500, 1 request", 7.87, 5.1),
    on_b200("MATH-500, 32 requests", 7.87, 2.8, rows=32),
    on_b200("Llama-3.1, GSM8K", 4.32, 2.4, block=10, model="llama-3.1-8b"),
    on_b200("Llama-3.1, EAGLE-3", 4.55, 1.9, drafter="eagle3", block=8, model="llama-3.1-8b"),
]


class Guess(Drafter):
    """Proposes a chain of one token over and over: a step's cost at so many nodes, nearly alone."""

    name = "guess"

    def __init__(self, nodes):
        self.nodes = nodes

    def propose(self, rows, max_nodes):
        nodes = min(self.nodes, max_nodes)
        tokens = [rows.anchors[0]] + [500] * (nodes - 1)
        return Proposal(torch.tensor([tokens]), chain(nodes)[None], torch.tensor([nodes]))


def step_ratios(model):
    """Median seconds of an engine's step of 4 and of 8 nodes, to one's; in turn."""
    params = SamplingParams(max_new_tokens=16 * STEPS, ignore_eos=True)
    prompt = [100 + i % 1000 for i in range(CONTEXT)]
    engines = {}
    times = {}
    for nodes in (1, 4, 8):
        engines[nodes] = Engine(model.target, Guess(nodes))
        engines[nodes].submit(model.request(prompt, params))
        engines[nodes].step()
        times[nodes] = []
    for _ in range(STEPS):
        for nodes, engine in engines.items():
            started = time.perf_counter()
            engine.step()
            times[nodes].append(time.perf_counter() - started)

    medians = {nodes: statistics.median(own[5:]) for nodes, own in times.items()}
    return medians[4] / medians[1], medians[8] / medians[1]


class Answers(NamedTuple):
    """Totals over the prompts, each answered plainly and with drafts in turn."""

    tau: float
    draft_share: float  # of the seconds of decoding
    gain: float  # decode tokens/s to plain decoding
    context: int  # mean


def answers(model):
    plain = replace(model, new_drafter=Autoregressive)
    for method in (plain, model):  # kernels are built
        method.generate(PROMPTS[0], max_new_tokens=8)

    plain_seconds = 0.0
    seconds = 0.0
    draft_seconds = 0.0
    tokens = 0
    passes = 0
    contexts = 0
    for prompt in PROMPTS * 2:
        plain_stats = plain.generate(prompt, max_new_tokens=64, ignore_eos=True).stats
        stats = model.generate(prompt, max_new_tokens=64, ignore_eos=True).stats
        plain_seconds += plain_stats.decode_seconds
        seconds += stats.decode_seconds
        draft_seconds += stats.seconds["draft"]
        tokens += stats.num_tokens - 1
        passes += stats.target_passes
        contexts += stats.num_prompt_tokens + stats.num_tokens // 2
    return Answers(
        tau=tokens / passes,
        draft_share=draft_seconds / seconds,
        gain=plain_seconds / seconds,
        context=contexts // (2 * len(PROMPTS)),
    )


def prediction(net, config, on, block):
    """The row of one block."""
    for row in predict(net, config, on):
        if row.block == block:
            return row
    raise ValueError(f"nothing is predicted for a block of {block}")


def here(kernels):
    net = shape(TARGET)
    for kernel in kernels:
        check_kernel(net, kernel)


def check_kernel(net, kernel):
    model = flashdraft.load(TARGET, kernel=kernel, block_size=BLOCK, max_rows=1)
    packed = model.target.nbytes - model.target.embedding.nbytes
    numbers = net.layers * net.layer_weights + net.hidden * net.vocab
    target, drafting = calibrate(FORMATS[kernel])
    on = (replace(target, weight=packed / numbers), drafting)

    four, eight = step_ratios(model)
    real = answers(model)
    draft = hub.read_config(hub.builtin_draft(TARGET))
    config = RooflineConfig(
        weights=FORMATS[kernel],
        tau=real.tau,
        block_size=BLOCK,
        context=CONTEXT + STEPS // 2,
        draft_layers=draft["num_hidden_layers"],
        draft_vocab=draft["draft_vocab_size"],
    )
    steps = {nodes: prediction(net, config, on, nodes).verify for nodes in (1, 4, 8)}
    whole = prediction(net, replace(config, context=real.context), on, BLOCK)
    draft_share = whole.draft / (whole.draft + whole.verify)

    print(
        f"{kernel}: {target.bandwidth / 1e9:.1f} GB/s, "
        f"{target.rates[8] / 1e9:.0f} GFLOP/s with 8 tokens, "
        f"pass {1e3 * target.host:.2f} ms, round {1e3 * target.round:.2f} ms, "
        f"{packed / 1e6:.0f} MB of weights, {torch.get_num_threads()} threads"
    )
    pairs = {
        "step(4) / step(1)": (steps[4] / steps[1], four),
        "step(8) / step(1)": (steps[8] / steps[1], eight),
        f"drafting in a round, block {BLOCK}": (draft_share, real.draft_share),
        f"tokens/s to plain, tau {real.tau:.2f}": (whole.gain, real.gain),
    }
    rows = []
    for name, (predicted, measured) in pairs.items():
        rows.append([kernel, name, *compared(predicted, measured)])
    print_table(["kernel", "ratio", "predicted", "measured", "error"], rows)


def compared(predicted, measured):
    return f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured - 1:+.0%}"


def paper():
    rows = []
    for row in PAPER:
        question = row.question
        net = shape(row.model)
        gain = prediction(net, question, named(question), question.block_size).gain
        rows.append([row.name, f"{question.tau:.2f}", *compared(gain, row.speed_up)])
    print_table(["published", "tau", "predicted", "measured", "error"], rows)


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--paper", action="store_true")
parser.add_argument("--kernels", default=",".join(FORMATS))
options = parser.parse_args()
if options.paper:
    paper()
else:
    here(options.kernels.split(","))
