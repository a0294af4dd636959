"""Llama-shaped targets on our own decoder: fused and packed weights, few operations, equal to the Hugging Face model to 1e-4.

Does not know drafters, verification or text.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from flashdraft.decoding.tree import ancestors, chain
from flashdraft.models import native
from flashdraft.models.cache import SlotCache
from flashdraft.models.decoder import Block, CompiledStep, Decoder
from flashdraft.models.layers import ROPE_TYPES, Linear, Rotary, TorchLinear
from flashdraft.models.target import Indices, Output, Target, context_of
from flashdraft.models.timing import StepTimes, best_of
from flashdraft.process import INTS, undisturbed

__all__ = ["LeanTarget", "fastest", "unfit"]

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}  # and what their classes begin with
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, type(ACT2FN["silu"]))

_LONG = 256  # slots; the table of step times is measured behind an empty cache
_BEYOND_CACHES = (
    64 * 2**20
)  # bytes of blocks that no cache holds, so that steps of them read memory as steps of all do


class LeanTarget(Target):
    """llama, mistral, qwen2 or qwen3 behind the Target contract (target.py). kernel: compact, float32, int8, torch, compiled."""

    def __init__(
        self, model: Any, name: str, *, kernel: str = "compact", consume: bool = False
    ) -> None:
        """consume: the model's blocks lose their weights as these are packed, so that not both are held at once."""
        config, decoder = model.config, model.model
        self.name, self.config = name, config
        self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
        self.num_layers, self.context_length = int(config.num_hidden_layers), context_of(config)
        self.embedding, norm, rope = (
            decoder.embed_tokens.weight.detach(),
            decoder.norm.weight.detach(),
            decoder.rotary_emb,
        )
        rotary = Rotary(rope.inv_freq, rope.attention_scaling, self.embedding)
        blocks = (Block(block, self.embedding) for block in decoder.layers)
        self._tables: dict[int, StepTimes] = {}  # by number of threads
        self.decoder = Decoder(
            blocks,
            norm,
            rotary=rotary,
            eps=float(config.rms_norm_eps),
            kernel=kernel,
            consume=consume,
        )
        self._head_rows: Tensor = (
            model.lm_head.weight.detach()
        )  # the embedding itself where the two are tied
        bias = None if model.lm_head.bias is None else model.lm_head.bias.detach()
        self.blocked_keys = self.decoder.native
        make = (
            partial(native.NativeLinear, kernel=self.decoder.kernel)
            if self.blocked_keys
            else TorchLinear
        )
        self.head: Linear = make(self._head_rows, bias)
        self.row_exact = self.decoder.row_exact and self.head.row_exact
        formats = sorted({*self.decoder.formats, self.head.format})
        self.kernel_name = self.decoder.kernel
        dtype = str(self.embedding.dtype).removeprefix("torch.")
        self.kernel = (
            f"native {' + '.join(formats)}"
            if self.decoder.native
            else f"{' + '.join(formats)} {dtype}"
        )
        self._step = None
        if kernel == "compiled":
            self.kernel = f"compiled {dtype}"
            self.static_cache = True
            weights = [self.embedding, self._head_rows, bias]
            self._step = CompiledStep(
                self.decoder, self.embed, self.head, weights, num_positions=self.context_length
            )
        self.nbytes = self.decoder.nbytes + self.head.nbytes + self.embedding.nbytes

    @property
    def step_seconds(self) -> dict[int, float]:
        """Measured once per model shape, kernel, number of threads and machine, and again where steps contradict it."""
        return self._times.measured(self._timed_step())

    @property
    def _times(self) -> StepTimes:
        threads = torch.get_num_threads()
        if threads not in self._tables:
            gpu = (
                torch.cuda.get_device_name(self.embedding.device) if self.embedding.is_cuda else ""
            )
            facts = [
                self.config.to_diff_dict(),
                self.kernel + gpu,
                threads,
                torch.__version__,
                native.fingerprint(),
            ]
            self._tables[threads] = StepTimes(facts)
        return self._tables[threads]

    def _timed_step(self) -> Callable[[int], float]:
        """A step of so many tokens behind an empty cache, waited for."""
        cache = self.new_cache(1, 256)

        def step(count: int) -> float:
            tokens, sizes = torch.ones(1, count, **INTS), torch.tensor([count], **INTS)
            logits, _ = self.forward(cache, [0], tokens, chain(count)[None], sizes, ())
            return float(logits[0, 0, 0])

        return step

    def measure_again(self) -> dict[int, float]:
        """`step_seconds`, whatever was known."""
        return self._times.measure(self._timed_step())

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether this decoder computes what the Hugging Face model does: plain SiLU blocks, full attention, static rotary."""
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        plain = getattr(config, "hidden_act", None) == "silu" and not kinds
        nested = any(
            isinstance(value, Mapping) for value in rope.values()
        )  # by kinds of layers: one table is not enough
        static = (
            rope.get("rope_type", "default") in ROPE_TYPES
            and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
        )
        windowed = config.model_type == "mistral" and getattr(config, "sliding_window", None)
        return config.model_type in FAMILIES and plain and static and not nested and not windowed

    @undisturbed
    @torch.inference_mode()
    def forward(
        self,
        cache: SlotCache,
        slots: Indices,
        tokens: Tensor,
        parents: Tensor,
        sizes: Tensor,
        layers: Indices,
    ) -> Output:
        if self._step is None:
            started = time.perf_counter()
            output = super().forward(cache, slots, tokens, parents, sizes, layers)
            if len(slots) == 1 and self.embedding.device.type == "cpu":
                seconds, long = time.perf_counter() - started, cache.lengths[slots[0]] > _LONG
                self._times.check(tokens.shape[1], seconds, long=long)
            return output
        tree = ancestors(parents)
        return self._step(cache, slots, tokens, (tree, tree.sum(-1) - 1, sizes), layers)

    def _read(
        self,
        cache: SlotCache,
        slots: Indices,
        tokens: Tensor,
        parents: Tensor,
        sizes: Tensor,
        layers: Indices,
    ) -> Output:
        tree = ancestors(parents)
        return self.decoder(
            cache, slots, self.embed(tokens), (tree, tree.sum(-1) - 1, sizes), layers
        )

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens.to(self.embedding.device), self.embedding)

    def lm_head(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.reshape(-1, self.hidden_size)).view(
            *hidden.shape[:-1], self.vocab_size
        )

    def head_weight(self, tokens: Tensor) -> Tensor:
        return self._head_rows[tokens]


def unfit(model: Any) -> str | None:
    """Why LeanTarget would not compute what this model does, in words, or None: by its config and by every part's class.

    A quantised linear, an adapter's, a patched forward: whatever is no plain part of its family would be read as a plain weight.
    """
    if not LeanTarget.fits(model.config):
        return f"a {model.config.model_type} model of this config is not llama-shaped"
    family = str(model.config.model_type)
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    known = {getattr(module, FAMILIES[family] + part) for part in _PARTS}
    known |= {*_PLAIN}
    for name, part in model.named_modules():
        if type(part) not in known:
            return f"its `{name}` is a {type(part).__name__}"
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return f"its `{name or type(part).__name__}` has a forward of its own"
    dtype = model.lm_head.weight.dtype
    for name, weight in model.named_parameters():
        if type(weight) is not nn.Parameter:
            return f"its `{name}` is a {type(weight).__name__}"
        if weight.dtype != dtype or not dtype.is_floating_point:
            return f"its `{name}` is {weight.dtype}, its lm_head {dtype}"
    return None


def fastest(model: Any, name: str = "", *, consume: bool = False) -> LeanTarget | None:
    """The target by our kernels in the exact format of fewest bytes, or None where torch's operations are quicker.

    By steps of 1 and 8 tokens. What torch would take is measured once a machine, on as few blocks as show it; before torch is
    preferred the kernels are measured again, because the machine may have been busy. consume: as LeanTarget's.
    """
    if not native.usable(model.lm_head.weight):
        return None
    rival = _torch_seconds(model)
    made = LeanTarget(model, name, kernel="compact", consume=consume)
    if not made.decoder.native:
        return None
    if _together(made.step_seconds) <= rival or _together(made.measure_again()) <= rival:
        return made
    return None


def _together(seconds: Mapping[int, float]) -> float:
    return seconds[1] + seconds[8]


def _torch_seconds(model: Any) -> float:
    """What steps of 1 and 8 tokens would take by torch's operations."""
    facts = [
        "torch, by some blocks",
        model.config.to_diff_dict(),
        torch.get_num_threads(),
        torch.__version__,
        native.fingerprint(),
    ]
    times = StepTimes(facts, counts=(1, 8))
    known = times.read()
    if known is not None:
        return _together(known)

    num_layers = len(model.model.layers)
    block_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
    few = min(num_layers, 1 + _BEYOND_CACHES // block_bytes)
    part = SimpleNamespace(config=model.config, lm_head=model.lm_head)
    names = {name: getattr(model.model, name) for name in ("embed_tokens", "norm", "rotary_emb")}
    part.model = SimpleNamespace(layers=model.model.layers[:few], **names)
    target = LeanTarget(part, "", kernel="torch")
    steps = best_of(target._timed_step(), times.counts)
    heads = best_of(lambda count: target.lm_head(target.embedding[:count]), times.counts)
    whole = {}
    for count in times.counts:
        blocks = max(steps[count] - heads[count], 0.0)
        whole[count] = heads[count] + blocks * num_layers / few
    times.keep(whole)
    return _together(whole)
