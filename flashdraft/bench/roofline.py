"""Predicted tokens/s from shapes and rates: is a drafter worth training for this model on that
hardware, and with which block?

A pass costs its bytes over the bandwidth and its FLOPs over the rate, part by part, mostly the
larger, and fixed seconds for each layer and pass (docs/roofline.md). Knows shapes, devices and
acceptance. Measures nothing: profile.py does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
_FACTS_FILE = Path(__file__).parents[1] / "assets" / "roofline.json"
FACTS = json.loads(_FACTS_FILE.read_text(encoding="utf-8"))
# of a weight, with its share of the scales
BYTES = {"float32": 4.0, "bfloat16": 2.0, "q8": 1.0625, "q4": 0.625, "int8": 1.0}
_BLOCKS = (
    1,
    2,
    4,
    8,
    16,
)  # that are predicted beside the asked one; a block of 1 is plain decoding
_ATTENTION = ("attention", "full_attention", "sliding_attention")  # kinds of layers
# what the keys of the others' sizes begin with
_OF_STATES = ("mamba_", "linear_attn_", "linear_conv_", "conv_L_", "ssm_", "lru_")
_WORTH = 1.2  # a smaller speed-up hardly repays the training


Json = Mapping[str, Any]


class Shape(NamedTuple):
    """Of a network like llama: grouped queries and SwiGLU."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """The numbers in the linears of one layer: q and o, k and v, and the three of the MLP."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.inner)


class Row(NamedTuple):
    """What is predicted for one drafter with one block."""

    drafter: str
    block: int
    draft: float  # seconds of a round
    verify: float  # seconds of a round
    tau: float
    speed: float  # tokens/s of all rows
    gain: float  # tokens/s to plain decoding


@dataclass(frozen=True)
class Device:
    """What runs a network: the rates that it attains, and the format that the weights lie in."""

    bandwidth: float  # bytes/s
    # FLOP/s by the number of tokens that go through a weight together, from 1 on
    rates: Mapping[int, float]
    weight: float  # bytes of a weight
    cached: float  # bytes of a number in the cache
    layer: float  # seconds of a layer whatever its size
    host: float  # seconds of a pass beside its layers
    round: float  # seconds of a drafted round beside its passes: verdict, caches, features

    def part(self, nbytes: float, flops: float, tokens: float) -> float:
        """Seconds of reading so many bytes and of `flops` for every one of the tokens.

        A roofline whose knee is round: the root of the two times' squared sum. Rates are read
        between the measured numbers of tokens; beyond the largest one, time grows with the tokens.
        """
        widths = sorted(self.rates)
        widest = widths[-1]
        seconds_by_width = [width / self.rates[width] for width in widths]
        seconds = np.interp(min(tokens, widest), widths, seconds_by_width)  # of one FLOP a token
        compute = flops * seconds * max(1.0, tokens / widest)
        return float(np.hypot(nbytes / self.bandwidth, compute))

    def step(self, net: Shape, tokens: float, rows: int, context: int, extra: int = 0) -> float:
        """Seconds of one pass in which each of `rows` rows reads `tokens` tokens behind `context`.

        extra: weights beside those of the shape.
        """
        together = rows * tokens
        numbers = (context + tokens) * net.layers * net.head_dim  # of one head's keys, a row
        cache_bytes = rows * 2 * numbers * net.kv_heads * self.cached
        attention = self.part(cache_bytes, 4 * numbers * net.heads, together)

        linears = 0.0
        for weights in (net.layers * net.layer_weights + extra, net.hidden * net.vocab):
            linears += self.part(weights * self.weight, 2 * weights, together)
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
        choices=tuple(BYTES),
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
        is_possible = self.tau <= self.block_size
        require(is_possible, "tau", self.tau, f"from 1 to the block size, {self.block_size}")

        is_here = self.device == "this"
        has_engine = self.engine != "auto"
        require(not (is_here and has_engine), "engine", self.engine, "auto on this machine")
        is_narrow = self.weights != "float32"
        require(is_here or is_narrow, "weights", self.weights, "16 bits or fewer on a GPU")


def expected(chances: Sequence[float], block: int) -> float:
    """tau of a chain: 1 + a_1 + a_1 a_2 + ...

    a_k is the chance of draft k behind accepted ones; the last one goes on.
    """
    last = len(chances) - 1
    by_draft = [chances[min(k, last)] for k in range(block - 1)]
    return 1.0 + float(np.cumprod(by_draft).sum())


def geometric(tau: float, block: int) -> list[float]:
    """The chance that, the same at every position, gives this tau at this block."""
    some = np.linspace(0, 1, 10_001)
    taus = [expected([chance], block) for chance in some]
    return [float(np.interp(tau, taus, some))]


def predict(
    net: Shape, config: RooflineConfig, on: tuple[Device, Device], chances: Sequence[float] = ()
) -> list[Row]:
    """A row for every drafter and block.

    on: what runs the target, and the drafts; chances: by position, instead of tau.
    """
    if not chances:
        chances = geometric(config.tau, config.block_size)
    target, drafting = on
    plain = target.step(net, 1, config.rows, config.context)

    rows = []
    drafters = ("dflash", "eagle3") if config.drafter == "both" else (config.drafter,)
    for drafter in drafters:
        for block in sorted({*_BLOCKS, config.block_size}):
            tau = expected(chances, block)
            verify = target.step(net, block, config.rows, config.context)
            draft = 0.0
            if block > 1:
                passes = _passes(drafter, net, config, block, tau)
                draft = _draft_seconds(drafting, passes, config)
            seconds = draft + verify
            speed = config.rows * tau / seconds
            gain = plain * tau / seconds
            rows.append(Row(drafter, block, draft, verify, tau, speed, gain))
    return rows


class _Passes(NamedTuple):
    """How a drafter drafts one block."""

    net: Shape
    extra: int  # weights beside the shape's
    tokens: list[float]  # that each pass reads, in every row


def _passes(drafter: str, net: Shape, config: RooflineConfig, block: int, tau: float) -> _Passes:
    if drafter == "dflash":
        vocab = config.draft_vocab or net.vocab
        small = net._replace(layers=config.draft_layers, vocab=vocab)
        joins_features = 5 * net.hidden**2  # fc, of five features
        return _Passes(small, joins_features, [float(block)])

    vocab = config.draft_vocab or min(32_000, net.vocab)
    small = net._replace(layers=1, vocab=vocab)
    # q, k and v read states twice as wide
    wider = net.hidden * (net.heads + 2 * net.kv_heads) * net.head_dim
    # a pass a draft, the first one over what was accepted
    tokens = [tau] + [1.0] * (block - 2)
    return _Passes(small, wider, tokens)


def _draft_seconds(device: Device, passes: _Passes, config: RooflineConfig) -> float:
    seconds = 0.0
    for tokens in passes.tokens:
        seconds += device.step(passes.net, tokens, config.rows, config.context, passes.extra)
    return seconds + device.round


def verdict(rows: Sequence[Row]) -> str:
    """One sentence for `predict`'s rows: whether to train a drafter, which kind, which block.

    And from which tau on it pays.
    """
    drafted = [row for row in rows if row.block > 1]
    best = max(drafted, key=lambda row: row.gain)
    least = _WORTH * best.tau / best.gain
    worth = "Worth" if best.tau >= least else "Not worth"
    needs = "that block never pays"
    if least <= best.block:
        needs = f"that block pays ({_WORTH} times) from tau {least:.2f} on"
    return (
        f"{worth} training a drafter: {best.drafter} with block {best.block} gives "
        f"{best.gain:.2f} times plain decoding at tau {best.tau:.2f}; {needs}."
    )


def shape(name: str) -> Shape:
    """A well-known model's shape, or of what is called so: a folder, a GGUF file or a hub id.

    The config alone is read. Raises UnsupportedTarget for a model that is not dense or no llama.
    """
    known = FACTS["models"].get(name.split("/")[-1].lower())
    if known and not Path(name).exists():
        return Shape(*known)

    folder = hub.resolve(name, ("config.json",))
    config = hub.read_config(folder) if isinstance(folder, Path) else {}
    text = config.get("text_config", config)
    if not _is_dense_llama(text):
        raise UnsupportedTarget(
            f"`{name}` is no dense llama-shaped model",
            hint=f"known: such, and {', '.join(FACTS['models'])}",
        )
    hidden = text["hidden_size"]
    heads = text["num_attention_heads"]
    return Shape(
        layers=text["num_hidden_layers"],
        hidden=hidden,
        inner=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        vocab=text["vocab_size"],
    )


def _is_dense_llama(config: Json) -> bool:
    if config.get("num_experts") or config.get("num_local_experts"):
        return False
    if _keeps_states(config):
        return False
    needed = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
    )
    return all(config.get(key) for key in needed)


def _keeps_states(config: Json) -> bool:
    """Whether some layers keep a running state, where keys and values would be counted."""
    kinds = config.get("layer_types")
    if kinds:
        return not all(kind in _ATTENTION for kind in kinds)
    return any(key.startswith(_OF_STATES) for key in config)


def named(config: RooflineConfig) -> tuple[Device, Device]:
    """The data sheet's GPU with the engine's overheads, for the target and for 16-bit drafts."""
    sheet = FACTS["devices"][config.device]
    attained = FACTS["attained"]
    engine = FACTS["engines"]["transformers" if config.engine == "auto" else config.engine]
    target = Device(
        bandwidth=sheet["bandwidth"] * attained["bandwidth"],
        rates={1: sheet["flops"] * attained["flops"]},
        weight=BYTES[config.weights],
        cached=2.0,
        layer=engine["launch"] * engine["layer"],
        host=engine["launch"] * engine["pass"],
        round=engine["round"],
    )
    return target, replace(target, weight=2.0)
