"""Median milliseconds of a draft pass with and without DFlash 2's convolutions.

    python recipes/draft_times.py [DRAFT] [--rows 8] [--threads 2]     (default: the built-in one)

Networks of the drafter's shape with random weights, beside a small target of its width, behind 300
tokens. They take turns pass by pass; `again` is the first one made twice: how far the machine is to
be trusted. With one thread the time is that thread's own, so that a busy machine matters less.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashdraft import DFlashDraftModel, hub
from flashdraft.bench.report import print_table
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.read import read_draft
from flashdraft.methods.dflash import DFlashDrafter, PackedDraft
from flashdraft.models.lean import LeanTarget
from flashdraft.types import Rows, SamplingParams

CONTEXT = 300
LAYERS = (0, 1)  # of the small target: what a draft network reads
NETWORKS = {  # taps, and channels of a group
    "v1": (0, 0),
    "convolutions 2/16": (2, 16),
    "convolutions 3/16": (3, 16),
    "v1 again": (0, 0),
}


def small_target(config: DraftConfig) -> LeanTarget:
    shape = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
    )
    return LeanTarget(LlamaForCausalLM(shape).eval(), "small", kernel="float32")


def drafter_of(config: DraftConfig, target: LeanTarget, rows: Rows) -> DFlashDrafter:
    """One that has observed what stands before the rows' anchors."""
    torch.manual_seed(0)
    model = DFlashDraftModel(config)
    for name, parameter in model.named_parameters():
        if "_conv." in name:
            torch.nn.init.normal_(parameter, 0.0, 0.05)

    drafter = DFlashDrafter(PackedDraft(model, target))
    tokens = [torch.arange(CONTEXT - 1)] * len(rows)
    features = [torch.randn(CONTEXT - 1, len(LAYERS) * config.hidden_size)] * len(rows)
    drafter.observe(rows, tokens, features)
    return drafter


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("draft", nargs="?")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter

    name = options.draft
    folder = hub.builtin_draft("smollm2-135m") if name is None else hub.resolve(name)
    published, _ = read_draft(folder)
    plain = replace(
        published,
        vocab_size=1000,
        mask_token_id=5,
        num_target_layers=0,
        target_layer_ids=LAYERS,
        sequential_head=None,
        confidence_head=False,
        draft_vocab_size=None,
    )
    target = small_target(plain)
    slots = list(range(options.rows))
    texts = [list(range(CONTEXT)) for _ in slots]
    rows = Rows(slots, texts, [SamplingParams()] * len(slots), [1] * len(slots))
    drafters = {}
    for name, (taps, group_size) in NETWORKS.items():
        config = replace(plain, conv_kernel_size=taps, conv_group_size=group_size)
        drafters[name] = drafter_of(config, target, rows)

    times = {name: [] for name in drafters}
    anchors = torch.tensor(rows.anchors)
    for _ in range(options.repeats):
        for name, drafter in drafters.items():
            started = clock()
            drafter._states(slots, anchors)
            times[name].append(1000 * (clock() - started))

    first = statistics.median(times["v1"])
    table = []
    for name, own in times.items():
        median = statistics.median(own)
        kernel = drafters[name].network.decoder.kernel
        table.append([name, kernel, f"{median:.3f}", f"{median / first:.3f}"])
    print_table(["network", "kernel", "ms", "of v1"], table)


if __name__ == "__main__":
    main()
