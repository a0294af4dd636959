"""What is measured on this machine: where a step's time and the memory go, and the CPU as a Device of roofline.py.

Real steps of the engine, with clocks around the lean target's linears, its attention, its head and the drafter.
"""

import time
import timeit
from dataclasses import replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashdraft import hub
from flashdraft.bench.roofline import BYTES, Device
from flashdraft.engine import Engine
from flashdraft.errors import InvalidParameter, UnsupportedTarget
from flashdraft.generate import Model
from flashdraft.loading import MOST_NODES, drafters, load
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.models import native
from flashdraft.models.lean import LeanTarget
from flashdraft.process import FLOATS, INTS, undisturbed
from flashdraft.train.flops import FlopCount
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.types import COUNTS, Allowed, SamplingParams, check_option

__all__ = ["PARTS", "Profile", "calibrate", "profile", "profile_training"]

PARTS = ("weights", "attention", "lm_head", "drafting", "host")
_WARM_UP = 3


class Profile(NamedTuple):
    """Of one number of nodes: median milliseconds by part, and bytes by what holds them."""

    milliseconds: dict[str, float]
    nbytes: dict[str, int]


def profile(
    target: str,
    *,
    draft: str = "auto",
    nodes: int = 8,
    context: int = 256,
    steps: int = 20,
    kernel: str = "auto",
) -> Profile:
    """Measure steps behind `context` tokens; one node is plain decoding. An untrained drafter stands in where none is shipped."""
    check_option("nodes", nodes, int, Allowed(1, MOST_NODES))
    check_option("context", context, int, COUNTS)
    check_option("steps", steps, int, COUNTS)
    model = load(target, draft="autoregressive", kernel=kernel)
    if not isinstance(model.target, LeanTarget) or kernel == "compiled":
        raise UnsupportedTarget(
            f"`{target}` runs by {model.target.kernel}, which has no parts to time",
            hint="profile a llama",
        )
    room = model.target.context_length - (steps + _WARM_UP + 2) * nodes
    if context > room:
        got = f"context is {context}, but {steps} steps of {nodes} nodes behind it need more than `{target}` holds"
        hint = (
            f"context must be at most {room} for that"
            if room > 0
            else "ask for fewer steps or nodes"
        )
        raise InvalidParameter(got, hint=hint, option="context")
    drafter = _profiled_drafter(model, target, draft, nodes)
    engine = Engine(model.target, drafter)
    generator = torch.Generator("cpu").manual_seed(0)
    prompt = torch.randint(
        model.target.vocab_size, (context,), generator=generator, **INTS
    ).tolist()
    params = SamplingParams(max_new_tokens=(steps + _WARM_UP + 1) * nodes + nodes, ignore_eos=True)
    engine.admit(model.request(prompt, params))
    times, caches = (
        _times(engine, model.target, steps),
        sum(cache.nbytes for cache in drafter.caches),
    )
    nbytes = {"weights": model.target.nbytes, "cache": engine.cache_nbytes - caches}
    parts = getattr(drafter, "drafters", (drafter,))
    weights = sum(part.network.nbytes for part in parts if hasattr(part, "network"))
    nbytes |= {"drafter weights": weights, "drafter cache": caches}
    return Profile({part: 1000 * median(step[part] for step in times) for part in PARTS}, nbytes)


def _profiled_drafter(model: Model, target: str, draft: str, nodes: int) -> Any:
    if nodes == 1:
        return Autoregressive()
    if draft != "auto" or hub.builtin_draft(target) is not None:
        return drafters(draft, model.target, target, nodes, tokenizer=model.tokenizer)()

    most = max(model.target.num_layers - 3, 1)
    config = draft_config(
        model.target, num_layers=min(3, most), num_features=min(5, most), mask_token_id=0
    )
    return random_weights(config, 0).drafters(model.target)(block_size=nodes)


def profile_training(trainer: Any, steps: int) -> list[list[str]]:
    """Rows (part, milliseconds a step, share): where `steps` of a Trainer go, its rate, and the share of the matmul rate.

    The rate is block positions a second; the machine's is a float32 product of 1024 x 1024 matrices, at its best of five.
    """
    with FlopCount() as flops:  # type: ignore[no-untyped-call]  # the first step builds kernels: counted, not timed
        trainer.train_step()
    trainer.seconds.clear()
    started = time.perf_counter()
    positions = sum(trainer.train_step()["positions"] for _ in range(steps))
    seconds = time.perf_counter() - started
    parts = {**trainer.seconds, "other": seconds - sum(trainer.seconds.values())}
    rows = [
        [part, f"{1000 * spent / steps:.1f}", f"{spent / seconds:.0%}"]
        for part, spent in parts.items()
    ]
    rows += [
        ["step", f"{1000 * seconds / steps:.1f}", "100%"],
        [f"{positions / seconds:.0f} positions/s", "", ""],
    ]
    x = torch.ones(1024, 1024, **FLOATS)
    best = min(timeit.repeat(lambda: x @ x, number=1))
    rate = flops.total * steps / seconds / (2 * 1024**3 / best)
    return [
        *rows,
        [f"{rate:.0%} of the float32 matmul rate", "", ""],
        [f"{flops.total / 1e12:.4f} TFLOP a step", "", ""],
    ]


@undisturbed
def calibrate(weights: str) -> tuple[Device, Device]:
    """What runs a target with weights of that format, and drafts in 8 bits; takes seconds. Raises UnsupportedTarget."""
    if not native.usable(torch.zeros(1, **FLOATS)):
        raise UnsupportedTarget(
            "the C++ kernels do not run on this machine",
            hint="install g++ or clang++, or name a GPU",
        )
    large = native.NativeLinear(
        torch.zeros(1 << 15, 1024, **FLOATS), kernel="float32"
    )  # 128 MiB: beyond the caches
    bandwidth = large.nbytes / min(
        timeit.repeat(partial(large, torch.ones(1, 1024, **FLOATS)), number=1, repeat=8)
    )
    sizes = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        vocab_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
    )
    with torch.random.fork_rng(devices=[]):
        tiny = LlamaForCausalLM(sizes).float().eval()
    target = LeanTarget(tiny, "tiny", kernel="float32")
    make = random_weights(draft_config(target, num_layers=8, mask_token_id=0), 0).drafters(
        target
    )  # as deep: as dear
    tokenizer, steps = SimpleNamespace(decode=lambda ids, **_: "a" * len(ids)), []
    for drafter in (Autoregressive, make):
        model = Model(target, tokenizer, drafter, eos=frozenset(), max_rows=1)
        runs = (model.generate([1] * 8, max_new_tokens=24).stats for _ in range(20))
        steps.append(min(stats.decode_seconds / stats.target_passes for stats in runs))
    device = Device(
        bandwidth,
        _rates(weights),
        BYTES[weights],
        4.0,
        0.0,
        steps[0],
        max(steps[1] - 2 * steps[0], 0.0),
    )
    return device, replace(device, rates=_rates("int8"), weight=BYTES["int8"])


def _times(engine: Engine, target: LeanTarget, steps: int) -> list[dict[str, float]]:
    """Seconds by part of every step after the warm-up. The engine and its target stay wrapped: they are not used again."""
    clock, times, decoder = _Clock(), [], target.decoder
    if decoder.kernel == "torch":
        for linears in decoder.linears:
            for name, linear in linears.items():
                linears[name] = clock.wrap("weights", linear)
        decoder.attention = clock.wrap("attention", decoder.attention)
    else:
        decoder.seconds = torch.zeros(3, dtype=torch.float64, device="cpu")
    target.head = clock.wrap("lm_head", target.head)
    for name in ("propose", "observe"):
        setattr(engine.drafter, name, clock.wrap("drafting", getattr(engine.drafter, name)))
    for step in range(_WARM_UP + steps):
        clock.seconds = dict.fromkeys(PARTS, 0.0)
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
        if decoder.seconds is not None:  # what a native pass says of itself
            clock.seconds["weights"], clock.seconds["attention"] = decoder.seconds[:2].tolist()
            decoder.seconds.zero_()
        clock.seconds["host"] = seconds - sum(clock.seconds.values())
        times += [clock.seconds] if step >= _WARM_UP else []
    return times


class _Clock:
    """Adds up the time inside wrapped calls; a wrapped call inside another one counts for the outer one."""

    def __init__(self) -> None:
        self.seconds, self.busy = dict[str, float](), False

    def wrap(self, part: str, call: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            inside, self.busy, started = self.busy, True, time.perf_counter()
            result = call(*args, **options)
            self.busy = inside
            self.seconds[part] += 0.0 if inside else time.perf_counter() - started
            return result

        return timed


def _rates(kernel: str) -> dict[int, float]:
    """FLOP/s by number of tokens, on a matrix that stays in the cache; zeros fit every format."""
    linear, widths = (
        native.NativeLinear(torch.zeros(1536, 576, **FLOATS), kernel=kernel),
        (1, 2, 4, 8, 16, 32),
    )
    times = [
        min(timeit.repeat(partial(linear, torch.ones(n, 576, **FLOATS)), number=1, repeat=60))
        for n in widths
    ]
    return {n: 2 * n * 1536 * 576 / seconds for n, seconds in zip(widths, times, strict=True)}
