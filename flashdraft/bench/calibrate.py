"""The CPU here as a Device of roofline.py: its memory, its kernels' arithmetic, and what a step costs whatever its size."""

import timeit
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashdraft import native
from flashdraft.bench.roofline import BYTES, Device
from flashdraft.errors import UnsupportedTarget
from flashdraft.generate import Model
from flashdraft.lean import LeanTarget
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.train.initialise import draft_config, random_weights

__all__ = ["calibrate"]


def calibrate(weights: str) -> tuple[Device, Device]:
    """What runs a target with weights of that format, and drafts in 8 bits; takes seconds. Raises UnsupportedTarget."""
    if not native.usable(torch.zeros(1)):
        raise UnsupportedTarget("the C++ kernels do not run on this machine", hint="install g++ or clang++, or name a GPU")
    large = native.NativeLinear(torch.zeros(1 << 15, 1024), kernel="float32")  # 128 MiB: beyond the caches
    bandwidth = large.nbytes / min(timeit.repeat(partial(large, torch.ones(1, 1024)), number=1, repeat=8))
    sizes = LlamaConfig(hidden_size=64, intermediate_size=64, vocab_size=64, num_hidden_layers=8, num_attention_heads=4)
    target = LeanTarget(LlamaForCausalLM(sizes).eval(), "tiny", kernel="float32")
    make = random_weights(draft_config(target, num_layers=8, mask_token_id=0), 0).drafters(target)  # as deep: as dear
    tokenizer, steps = SimpleNamespace(decode=lambda ids, **_: "a" * len(ids)), []
    for drafter in (Autoregressive, make):
        model = Model(target, tokenizer, drafter, eos=frozenset(), max_rows=1)
        runs = (model.generate([1] * 8, max_new_tokens=24).stats for _ in range(20))
        steps.append(min(stats.decode_seconds / stats.target_passes for stats in runs))
    device = Device(bandwidth, _rates(weights), BYTES[weights], 4.0, 0.0, steps[0], max(steps[1] - 2 * steps[0], 0.0))
    return device, replace(device, rates=_rates("int8"), weight=BYTES["int8"])


def _rates(kernel: str) -> dict[int, float]:
    """FLOP/s by number of tokens, on a matrix that stays in the cache; zeros fit every format."""
    linear, widths = native.NativeLinear(torch.zeros(1536, 576), kernel=kernel), (1, 2, 4, 8, 16, 32)
    times = [min(timeit.repeat(partial(linear, torch.ones(n, 576)), number=1, repeat=60)) for n in widths]
    return {n: 2 * n * 1536 * 576 / seconds for n, seconds in zip(widths, times, strict=True)}
