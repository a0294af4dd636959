"""Where a decoding step's time goes: weights, attention, lm_head, drafting, and the host's rest; and what is in memory.

Real steps of the engine, with clocks around the lean target's linears, its attention, its head and the drafter.
"""

import time
import timeit
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from flashdraft import hub
from flashdraft.engine import Engine
from flashdraft.errors import UnsupportedTarget
from flashdraft.generate import load
from flashdraft.lean import LeanTarget
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.train.batch import FlopCount
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.types import Drafter, SamplingParams, require

__all__ = ["PARTS", "Profile", "profile", "profile_training"]

PARTS = ("weights", "attention", "lm_head", "drafting", "host")
_WARM_UP = 3


@dataclass(frozen=True)
class Profile:
    """One number of nodes: median milliseconds by part, and bytes by what holds them."""

    nodes: int
    milliseconds: dict[str, float]
    nbytes: dict[str, int]


def profile(
    target: str, *, draft: str = "auto", nodes: int = 8, context: int = 256, steps: int = 20, kernel: str = "auto"
) -> Profile:
    """Measure steps behind `context` tokens; one node is plain decoding. An untrained drafter stands in where none is shipped."""
    require(min(nodes, context, steps) >= 1, "one of nodes, context and steps", min(nodes, context, steps), "1 or more")
    model = load(target, draft="autoregressive", kernel=kernel)
    if not isinstance(model.target, LeanTarget) or kernel == "compiled":
        raise UnsupportedTarget(f"`{target}` runs by {model.target.kernel}, which has no parts to time", hint="profile a llama")
    drafter: Drafter = Autoregressive()
    network = None
    if nodes > 1:
        shipped = hub.builtin_draft(target) if draft == "auto" else draft
        most = max(model.target.num_layers - 3, 1)
        shape: Any = {"num_layers": min(3, most), "num_features": min(5, most), "mask_token_id": 0}
        untrained = random_weights(draft_config(model.target, **shape), 0) if shipped is None else None
        drafting = untrained or DFlashDraftModel.from_pretrained(shipped or "")
        assert isinstance(drafting, DFlashDraftModel)
        network = PackedDraft(drafting, model.target)
        drafter = DFlashDrafter(network, block_size=nodes)
    engine = Engine(model.target, drafter)
    prompt = torch.randint(model.target.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_new_tokens=(steps + _WARM_UP + 1) * nodes + nodes, ignore_eos=True)
    engine.admit(model.request(prompt, params))
    times = _times(engine, model.target, steps)
    caches = sum(cache.nbytes for cache in drafter.caches)
    nbytes = {"weights": model.target.nbytes, "cache": engine.cache_nbytes - caches}
    nbytes |= {"drafter weights": network.nbytes if network else 0, "drafter cache": caches}
    return Profile(nodes, {part: 1000 * median(step[part] for step in times) for part in PARTS}, nbytes)


def profile_training(trainer: Any, steps: int) -> list[list[str]]:
    """Rows (part, milliseconds a step, share): where `steps` of a Trainer go, its rate, and the share of the matmul rate.

    The rate is block positions a second; the machine's is a float32 product of 1024 x 1024 matrices, at its best of five.
    """
    with FlopCount() as flops:  # the first step builds kernels: it is counted, not timed
        trainer.train_step()
    trainer.seconds.clear()
    started = time.perf_counter()
    positions = sum(trainer.train_step()["positions"] for _ in range(steps))
    seconds = time.perf_counter() - started
    parts = {**trainer.seconds, "other": seconds - sum(trainer.seconds.values())}
    rows = [[part, f"{1000 * spent / steps:.1f}", f"{spent / seconds:.0%}"] for part, spent in parts.items()]
    rows += [["step", f"{1000 * seconds / steps:.1f}", "100%"], [f"{positions / seconds:.0f} positions/s", "", ""]]
    x = torch.randn(1024, 1024)
    best = min(timeit.repeat(lambda: x @ x, number=1))
    rate = flops.total * steps / seconds / (2 * 1024**3 / best)
    return [*rows, [f"{rate:.0%} of the float32 matmul rate", "", ""], [f"{flops.total / 1e12:.4f} TFLOP a step", "", ""]]


def _times(engine: Engine, target: LeanTarget, steps: int) -> list[dict[str, float]]:
    """Seconds by part of every step after the warm-up. The engine and its target stay wrapped: they are not used again."""
    clock, times, decoder = _Clock(), [], target.decoder
    if decoder.kernel == "torch":
        for linears in decoder.linears:
            for name, linear in linears.items():
                linears[name] = clock.wrap("weights", linear)
        decoder.attention = clock.wrap("attention", decoder.attention)
    else:
        decoder.seconds = torch.zeros(3, dtype=torch.float64)
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
            if self.busy:
                return call(*args, **options)
            self.busy, started = True, time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.busy = False
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        return timed
