"""Llama-shaped targets on our own decoder: fused and packed weights, few operations, equal to the Hugging Face model to 1e-4.

Does not know drafters, verification or text.
"""

import hashlib
import json
import timeit
from contextlib import suppress
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from flashdraft import hub, native
from flashdraft.cache import SlotCache
from flashdraft.decoder import Block, CompiledStep, Decoder
from flashdraft.files import write_file
from flashdraft.layers import ROPE_TYPES, Linear, TorchLinear, rotary_table
from flashdraft.process import INTS, undisturbed
from flashdraft.target import Indices, Output, Target
from flashdraft.tree import ancestors, chain

__all__ = ["LeanTarget", "fastest", "unfit"]

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # and what their classes begin with
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, type(ACT2FN["silu"]))


class LeanTarget(Target):
    """llama, mistral, qwen2 or qwen3 behind the Target contract (target.py). kernel: compact, float32, int8, torch, compiled."""

    def __init__(self, model: Any, name: str, *, kernel: str = "compact") -> None:
        config, decoder = model.config, model.model
        self.name, self.config = name, config
        self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
        self.num_layers, self.context_length = int(config.num_hidden_layers), int(config.max_position_embeddings)
        self.embedding, norm, rope = decoder.embed_tokens.weight.detach(), decoder.norm.weight.detach(), decoder.rotary_emb
        rotary = rotary_table(rope.inv_freq, self.context_length, rope.attention_scaling, self.embedding.dtype)
        blocks = (Block(block, self.embedding) for block in decoder.layers)
        self.decoder = Decoder(blocks, norm, rotary=rotary, eps=float(config.rms_norm_eps), kernel=kernel)
        self._head_rows: Tensor = model.lm_head.weight.detach()  # the embedding itself where the two are tied
        bias = None if model.lm_head.bias is None else model.lm_head.bias.detach()
        self.blocked_keys = self.decoder.native
        make = partial(native.NativeLinear, kernel=self.decoder.kernel) if self.blocked_keys else TorchLinear
        self.head: Linear = make(self._head_rows, bias)
        self.row_exact = self.decoder.row_exact and self.head.row_exact
        formats = sorted({*self.decoder.formats, self.head.format})
        self.kernel_name = self.decoder.kernel
        dtype = str(self.embedding.dtype).removeprefix("torch.")
        self.kernel = f"native {' + '.join(formats)}" if self.decoder.native else f"{' + '.join(formats)} {dtype}"
        self._step = None
        if kernel == "compiled":
            self.kernel = f"compiled {dtype}"
            self.static_cache = True
            self._step = CompiledStep(self.decoder, self.embed, self.head, [self.embedding, self._head_rows, bias])
        self.nbytes = self.decoder.nbytes + self.head.nbytes + self.embedding.nbytes

    @property
    def step_seconds(self) -> dict[int, float]:
        """Measured once per model shape, kernel, number of threads and machine."""
        gpu = torch.cuda.get_device_name(self.embedding.device) if self.embedding.is_cuda else ""
        facts = [self.config.to_diff_dict(), self.kernel + gpu, torch.get_num_threads(), torch.__version__, native.fingerprint()]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = hub.cache_dir() / f"seconds-{key}.json"
        try:
            return {int(count): seconds for count, seconds in json.loads(path.read_text()).items()}
        except (OSError, ValueError):
            cache, table = self.new_cache(1, 256), {}
        for count in (1, 2, 4, 8, 16, 32):
            shape = torch.ones(1, count, **INTS), chain(count)[None], torch.tensor([count], **INTS)
            step = partial(self.forward, cache, [0], *shape, ())
            times = timeit.repeat(lambda step=step: float(step()[0][0, 0, 0]), number=1, repeat=6)  # type: ignore[misc]  # waits
            table[count] = median(times[1:])
        with suppress(OSError):  # a cache that cannot be written costs this measurement again, no more
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(table).encode())
        return table

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether this decoder computes what the Hugging Face model does: plain SiLU blocks, full attention, static rotary."""
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        plain = getattr(config, "hidden_act", None) == "silu" and not kinds
        static = rope.get("rope_type", "default") in ROPE_TYPES and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
        windowed = config.model_type == "mistral" and getattr(config, "sliding_window", None)
        return config.model_type in FAMILIES and plain and static and not windowed

    @undisturbed
    @torch.inference_mode()
    def forward(
        self, cache: SlotCache, slots: Indices, tokens: Tensor, parents: Tensor, sizes: Tensor, layers: Indices
    ) -> Output:
        if self._step is None:
            return super().forward(cache, slots, tokens, parents, sizes, layers)
        tree = ancestors(parents)
        return self._step(cache, slots, tokens, (tree, tree.sum(-1) - 1, sizes), layers)

    def _read(self, cache: SlotCache, slots: Indices, tokens: Tensor, parents: Tensor, sizes: Tensor, layers: Indices) -> Output:
        tree = ancestors(parents)
        return self.decoder(cache, slots, self.embed(tokens), (tree, tree.sum(-1) - 1, sizes), layers)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens.to(self.embedding.device), self.embedding)

    def lm_head(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.reshape(-1, self.hidden_size)).view(*hidden.shape[:-1], self.vocab_size)

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


def fastest(model: Any) -> str:
    """The exact kernel with the quickest steps of 1 and 8 tokens for a model that fits; measured once per machine."""
    if not native.usable(model.lm_head.weight):
        return "torch"
    compact, plain = (LeanTarget(model, "", kernel=kernel) for kernel in ("compact", "torch"))
    return min(compact, plain, key=lambda target: target.step_seconds[1] + target.step_seconds[8]).kernel_name
