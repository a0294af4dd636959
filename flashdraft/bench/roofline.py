"""Predicted tokens/s from shapes and rates: is a drafter worth training for this model on that hardware, and with which block?

A pass costs its bytes over the bandwidth and its FLOPs over the rate, part by part, mostly the larger, and fixed seconds for
each layer and pass (docs/roofline.md). Knows shapes, devices and acceptance. Measures nothing: profile.py does.
"""

import json
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashdraft import hub
from flashdraft.errors import UnsupportedTarget
from flashdraft.types import check_options, option, require

__all__ = [
    "BYTES",
    "Device",
    "RooflineConfig",
    "Row",
    "Shape",
    "geometric",
    "named",
    "predict",
    "shape",
    "verdict",
]

# data sheets, engines and the shapes of well-known models, each number with its source
FACTS: Any = json.loads(
    (Path(__file__).parents[1] / "assets" / "roofline.json").read_text(encoding="utf-8")
)
BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "q8": 1.0625,
    "q4": 0.625,
    "int8": 1.0,
}  # of a weight, with its share of the scales
Shape = namedtuple(
    "Shape", "layers hidden inner heads kv_heads head_dim vocab"
)  # llama-shaped: grouped queries and SwiGLU
Row = namedtuple(
    "Row", "drafter block draft verify tau speed gain"
)  # seconds of a round; tokens/s of all rows, and to plain


@dataclass(frozen=True)
class Device:
    """What runs a network: the rates that it attains, and the format that the weights lie in."""

    bandwidth: float  # bytes/s
    rates: Mapping[
        int, float
    ]  # FLOP/s by the number of tokens that go through a weight together, from 1 on
    weight: float  # bytes of a weight
    cached: float  # bytes of a number in the cache
    layer: float  # seconds of a layer whatever its size
    host: float  # seconds of a pass beside its layers
    round: float  # seconds of a drafted round beside its passes: verdict, caches, features

    def part(self, nbytes: float, flops: float, tokens: float) -> float:
        """Seconds of reading so many bytes and of `flops` for every one of the tokens: a roofline whose knee is round."""
        widths = sorted(self.rates)
        seconds = np.interp(
            min(tokens, widths[-1]), widths, [width / self.rates[width] for width in widths]
        )
        return float(
            np.hypot(nbytes / self.bandwidth, flops * seconds * max(1.0, tokens / widths[-1]))
        )

    def step(self, net: Shape, tokens: float, rows: int, context: int, extra: int = 0) -> float:
        """Seconds of one pass in which each of `rows` rows reads `tokens` tokens behind `context`. extra: weights beside."""
        layer = net.hidden * (2 * (net.heads + net.kv_heads) * net.head_dim + 3 * net.inner)
        seen = (context + tokens) * net.layers * net.head_dim
        attention = self.part(
            rows * 2 * seen * net.kv_heads * self.cached, 4 * seen * net.heads, rows * tokens
        )
        weights = net.layers * layer + extra, net.hidden * net.vocab
        linears = sum(self.part(n * self.weight, 2 * n, rows * tokens) for n in weights)
        return linears + attention + float(net.layers * self.layer + self.host)


@dataclass(frozen=True)
class RooflineConfig:
    """One question. Raises InvalidParameter for a value outside its range."""

    device: str = option(
        "this",
        f"this CPU, measured, or {', '.join(FACTS['devices'])}",
        choices=("this", *FACTS["devices"]),
    )
    engine: str = option(
        "auto",
        "on a named GPU: transformers (auto) or serving",
        choices=("auto", *FACTS["engines"]),
    )
    weights: str = option(
        "bfloat16",
        f"the target's: {', '.join(BYTES)}; q4 is the built-in model's",
        choices=(*BYTES,),
    )
    drafter: str = option(
        "dflash", "dflash, eagle3 (one pass a draft) or both", choices=("dflash", "eagle3", "both")
    )
    tau: float = option(
        5.0,
        "accepted length that you expect; published drafters reach 4.2 to 7.9 at a block of 16",
        least=1,
    )
    block_size: int = option(
        16, "the block that tau is for, the anchor included", least=2, most=1024
    )
    context: int = option(1024, "tokens read before", least=0, most=2**31 - 1)
    rows: int = option(1, "sequences decoded together", least=1, most=2**31 - 1)
    draft_layers: int = option(5, "of dflash's network", least=1, most=1024)
    draft_vocab: int | None = option(
        None,
        "tokens that drafts are taken from; by default all, eagle3: 32000",
        least=1,
        most=2**31 - 1,
    )

    def __post_init__(self) -> None:
        check_options(self)
        require(
            self.tau <= self.block_size,
            "tau",
            self.tau,
            f"from 1 to the block size, {self.block_size}",
        )
        require(
            self.device != "this" or self.engine == "auto",
            "engine",
            self.engine,
            "auto on this machine",
        )
        require(
            self.device == "this" or self.weights != "float32",
            "weights",
            self.weights,
            "16 bits or fewer on a GPU",
        )


def expected(chances: Sequence[float], block: int) -> float:
    """tau of a chain: 1 + a_1 + a_1 a_2 + ..., where a_k is the chance of draft k behind accepted ones; the last one goes on."""
    return 1.0 + float(
        np.cumprod([chances[min(k, len(chances) - 1)] for k in range(block - 1)]).sum()
    )


def geometric(tau: float, block: int) -> list[float]:
    """The chance that, the same at every position, gives this tau at this block."""
    some = np.linspace(0, 1, 10_001)
    return [float(np.interp(tau, [expected([chance], block) for chance in some], some))]


def predict(
    net: Shape, config: RooflineConfig, on: tuple[Device, Device], chances: Sequence[float] = ()
) -> list[Row]:
    """A row for every drafter and block. on: what runs the target, and the drafts; chances: by position, instead of tau."""
    chances, found = chances or geometric(config.tau, config.block_size), []
    target, drafts = (
        partial(device.step, rows=config.rows, context=config.context) for device in on
    )
    plain = target(net, 1)
    for drafter in ("dflash", "eagle3") if config.drafter == "both" else (config.drafter,):
        for block in sorted({1, 2, 4, 8, 16, config.block_size}):
            tau, verify = expected(chances, block), target(net, block)
            if drafter == "dflash":  # one pass; fc joins five features
                small = net._replace(
                    layers=config.draft_layers, vocab=config.draft_vocab or net.vocab
                )
                passes, extra = [float(block)], 5 * net.hidden**2
            else:  # a pass a draft, the first one over what was accepted; q, k and v read states twice as wide
                small = net._replace(layers=1, vocab=config.draft_vocab or min(32_000, net.vocab))
                passes, extra = (
                    [tau] + [1.0] * (block - 2),
                    net.hidden * (net.heads + 2 * net.kv_heads) * net.head_dim,
                )
            draft = (
                sum(drafts(small, tokens, extra=extra) for tokens in passes) + on[1].round
                if block > 1
                else 0.0
            )
            found.append(
                Row(
                    drafter,
                    block,
                    draft,
                    verify,
                    tau,
                    *(n * tau / (draft + verify) for n in (config.rows, plain)),
                )
            )
    return found


def verdict(rows: Sequence[Row]) -> str:
    """One sentence for `predict`'s rows: whether to train a drafter, which kind, which block, and from which tau on it pays."""
    best = max((row for row in rows if row.block > 1), key=lambda row: row.gain)
    least = 1.2 * best.tau / best.gain  # a smaller speed-up hardly repays the training
    does = f"{best.drafter} with block {best.block} gives {best.gain:.2f} times plain decoding at tau {best.tau:.2f}"
    needs = (
        f"that block pays (1.2 times) from tau {least:.2f} on"
        if least <= best.block
        else "that block never pays"
    )
    return f"{'Worth' if best.tau >= least else 'Not worth'} training a drafter: {does}; {needs}."


def shape(name: str) -> Shape:
    """A well-known model's, or that of a folder, a llama's GGUF file or a hub id, of which only the config is read."""
    known = FACTS["models"].get(name.split("/")[-1].lower())
    if known and not Path(name).exists():
        return Shape(*known)
    folder = hub.resolve(name, ("config.json",))
    config = hub.read_config(folder) if isinstance(folder, Path) else {}
    c = config.get("text_config", config)
    keys = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
    )
    if not all(c.get(key) for key in keys) or c.get("num_experts") or c.get("num_local_experts"):
        raise UnsupportedTarget(
            f"`{name}` is no dense llama-shaped model",
            hint=f"known: such, and {', '.join(FACTS['models'])}",
        )
    layers, hidden, inner, heads, vocab = (c[key] for key in keys)
    return Shape(
        layers,
        hidden,
        inner,
        heads,
        c.get("num_key_value_heads") or heads,
        c.get("head_dim") or hidden // heads,
        vocab,
    )


def named(config: RooflineConfig) -> tuple[Device, Device]:
    """The GPU of the data sheet with the engine's overheads, for the target and for drafts in 16 bits."""
    sheet, part = FACTS["devices"][config.device], FACTS["attained"]
    engine = FACTS["engines"]["transformers" if config.engine == "auto" else config.engine]
    fixed = engine["launch"] * engine["layer"], engine["launch"] * engine["pass"], engine["round"]
    rates = sheet["bandwidth"] * part["bandwidth"], {1: sheet["flops"] * part["flops"]}
    target = Device(*rates, BYTES[config.weights], 2.0, *fixed)
    return target, replace(target, weight=2.0)
