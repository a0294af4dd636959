"""Llama-shaped targets on our own decoder: fused and packed weights, few operations.

Equal to the Hugging Face model to 1e-4. Does not know drafters, verification or text.
"""

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.decoding.tree import ancestors, chain
from flashdraft.models import native
from flashdraft.models.blocks import Block, PackedBlock
from flashdraft.models.cache import SlotCache
from flashdraft.models.compiled import CompiledStep
from flashdraft.models.decoder import Decoder, Layout
from flashdraft.models.layers import ROPE_TYPES, Linear, Rotary, pack_as
from flashdraft.models.target import HFConfig, HFModel, Indices, Output, Target, context_of
from flashdraft.models.timing import StepTimes, best_of
from flashdraft.process import INTS, undisturbed

__all__ = ["FAMILIES", "LeanTarget", "fastest", "unfit"]

# By model type, what the names of a family's classes begin with.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList)

_LONG = 256  # slots; the table of step times is measured behind an empty cache
# Bytes of blocks that no cache holds, so that steps of them read memory as steps of all do.
_BEYOND_CACHES = 64 * 2**20


class LeanTarget(Target):
    """llama, mistral, qwen2 or qwen3 behind the Target contract (target.py).

    kernel: compact, float32, int8, torch, compiled.
    """

    def __init__(
        self, model: HFModel, name: str, *, kernel: str = "compact", consume: bool = False
    ) -> None:
        """With `consume`, the model's blocks lose their weights as these are packed.

        Otherwise both are held at once.
        """
        config = model.config
        self.name = name
        self.config = config
        self.vocab_size = int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.num_layers = int(config.num_hidden_layers)
        self.context_length = context_of(config)
        self._tables: dict[int, StepTimes] = {}  # by number of threads

        self.embedding: Tensor = model.model.embed_tokens.weight.detach()
        self.decoder = _packed_decoder(model, kernel, consume=consume)
        self.kernel_name = self.decoder.kernel
        self.blocked_keys = self.decoder.native

        # The embedding itself where the two are tied.
        self._head_rows: Tensor = model.lm_head.weight.detach()
        bias: Tensor | None = model.lm_head.bias
        if bias is not None:
            bias = bias.detach()
        head: Linear | None = getattr(model.lm_head, "packed", None)
        if head is None:
            head = pack_as(self.decoder.kernel, self._head_rows, bias)
        self.head = head
        self.row_exact = self.decoder.row_exact and self.head.row_exact
        self.nbytes = self.decoder.nbytes + self.head.nbytes + self.embedding.nbytes
        self.kernel = self._kernel_in_words()

        self._step: CompiledStep | None = None
        if kernel == "compiled":
            self.static_cache = True
            weights = (self.embedding, self._head_rows, bias)
            self._step = CompiledStep(
                self.decoder, self.embed, self.head, weights, num_positions=self.context_length
            )

    def _kernel_in_words(self) -> str:
        dtype = str(self.embedding.dtype).removeprefix("torch.")
        if self.kernel_name == "compiled":
            return f"compiled {dtype}"

        formats = " + ".join(sorted({*self.decoder.formats, self.head.format}))
        return f"native {formats}" if self.decoder.native else f"{formats} {dtype}"

    @staticmethod
    def fits(config: HFConfig) -> bool:
        """Whether this decoder computes what the Hugging Face model does.

        Its blocks are plain SiLU ones, with full attention and static rotary angles.
        """
        if config.model_type not in FAMILIES:
            return False
        if getattr(config, "hidden_act", None) != "silu":
            return False
        return _attends_to_everything(config) and _rotates_statically(config)

    # ---- a pass ----------------------------------------------------------------------------------

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
        if self._step is not None:
            return self._step(cache, slots, tokens, _layout(parents, sizes), layers)

        started = time.perf_counter()
        output = super().forward(cache, slots, tokens, parents, sizes, layers)
        if len(slots) == 1 and self.embedding.device.type == "cpu":
            seconds = time.perf_counter() - started
            reads_long_text = cache.lengths[slots[0]] > _LONG
            self._times.check(tokens.shape[1], seconds, long=reads_long_text)
        return output

    def _read(
        self,
        cache: SlotCache,
        slots: Indices,
        tokens: Tensor,
        parents: Tensor,
        sizes: Tensor,
        layers: Indices,
    ) -> Output:
        return self.decoder(cache, slots, self.embed(tokens), _layout(parents, sizes), layers)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens.to(self.embedding.device), self.embedding)

    def lm_head(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden.reshape(-1, self.hidden_size))
        return logits.view(*hidden.shape[:-1], self.vocab_size)

    def head_weight(self, tokens: Tensor) -> Tensor:
        return self._head_rows[tokens]

    # ---- what steps take -------------------------------------------------------------------------

    @property
    def step_seconds(self) -> dict[int, float]:
        """Measured once per model shape, kernel, number of threads and machine.

        Measured again where steps that really ran contradict it.
        """
        return self._times.measured(self._timed_step())

    def measure_again(self) -> dict[int, float]:
        """`step_seconds`, whatever was known."""
        return self._times.measure(self._timed_step())

    @property
    def _times(self) -> StepTimes:
        threads = torch.get_num_threads()
        if threads not in self._tables:
            runs_on = self.kernel
            if self.embedding.is_cuda:
                runs_on += torch.cuda.get_device_name(self.embedding.device)
            facts = [
                self.config.to_diff_dict(),
                runs_on,
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
            tokens = torch.ones(1, count, **INTS)
            sizes = torch.tensor([count], **INTS)
            parents = chain(count)[None]
            logits, _ = self.forward(cache, [0], tokens, parents, sizes, ())
            return float(logits[0, 0, 0])

        return step


def _packed_decoder(model: HFModel, kernel: str, *, consume: bool) -> Decoder:
    """The model's blocks and last norm, packed."""
    decoder = model.model
    embedding = decoder.embed_tokens.weight.detach()
    rope = decoder.rotary_emb
    rotary = Rotary(rope.inv_freq, rope.attention_scaling, embedding)
    blocks = []
    for block in decoder.layers:
        is_packed = isinstance(block, PackedBlock)
        blocks.append(block if is_packed else Block(block, embedding))
    norm = decoder.norm.weight.detach()
    eps = float(model.config.rms_norm_eps)
    return Decoder(blocks, norm, rotary=rotary, eps=eps, kernel=kernel, consume=consume)


def _layout(parents: Tensor, sizes: Tensor) -> Layout:
    """parents: [rows, nodes]; a node lies as deep as it has ancestors."""
    tree = ancestors(parents)
    return Layout(seen=tree, depths=tree.sum(-1) - 1, sizes=sizes)


def _attends_to_everything(config: HFConfig) -> bool:
    """Whether no layer has a window or another kind of attention."""
    layer_types = getattr(config, "layer_types", None) or ()
    if set(layer_types) - {"full_attention"}:
        return False
    if config.model_type != "mistral":  # elsewhere `layer_types` says which layers use a window
        return True
    return not getattr(config, "sliding_window", None)


def _rotates_statically(config: HFConfig) -> bool:
    """Whether one table of angles serves every layer and every length of text."""
    rope = getattr(config, "rope_parameters", None) or {}
    for value in rope.values():
        if isinstance(value, Mapping):  # parameters by kinds of layers: one table is not enough
            return False
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        return False
    return float(rope.get("partial_rotary_factor", 1.0)) == 1.0


def unfit(model: HFModel) -> str | None:
    """Why LeanTarget would not compute what this model does, in words, or None.

    By its config and by every part's class. A quantised linear, an adapter's, a patched forward:
    whatever is no plain part of its family would be read as a plain weight.
    """
    if not LeanTarget.fits(model.config):
        return f"a {model.config.model_type} model of this config is not llama-shaped"

    known = _plain_classes(str(model.config.model_type))
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


def _plain_classes(family: str) -> set[type]:
    """What a model of this family is made of when nobody has changed it."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    activations = import_module("transformers.activations")  # late: it takes a second
    known: set[type] = {*_PLAIN, type(activations.ACT2FN["silu"])}
    for part in _PARTS:
        known.add(getattr(module, FAMILIES[family] + part))
    return known


# ---- our kernels or torch's ----------------------------------------------------------------------


def fastest(model: HFModel, name: str = "", *, consume: bool = False) -> LeanTarget | None:
    """The target by our kernels in the exact format of fewest bytes; None where torch is quicker.

    By steps of 1 and 8 tokens. What torch would take is measured once a machine, on as few blocks
    as show it; before torch is preferred the kernels are measured again, because the machine may
    have been busy. consume: as LeanTarget's.
    """
    if not native.usable(model.lm_head.weight):
        return None

    rival = _torch_seconds(model)
    made = LeanTarget(model, name, kernel="compact", consume=consume)
    if not made.decoder.native:
        return None
    return made if quicker_than(rival, made) else None


def quicker_than(rival: float, made: LeanTarget) -> bool:
    """Whether its steps of 1 and 8 tokens take no longer than so many seconds.

    They are measured again before torch is preferred.
    """
    if _together(made.step_seconds) <= rival:
        return True
    return _together(made.measure_again()) <= rival


def known_torch_seconds(config: HFConfig) -> float | None:
    """What steps of 1 and 8 tokens take by torch's operations, if that was measured before."""
    known = _torch_times(config).read()
    return None if known is None else _together(known)


def _torch_times(config: HFConfig) -> StepTimes:
    facts = [
        "torch, by some blocks",
        config.to_diff_dict(),
        torch.get_num_threads(),
        torch.__version__,
        native.fingerprint(),
    ]
    return StepTimes(facts, counts=(1, 8))


def _together(seconds: Mapping[int, float]) -> float:
    return seconds[1] + seconds[8]


def _torch_seconds(model: HFModel) -> float:
    """What steps of 1 and 8 tokens would take by torch's operations."""
    known = known_torch_seconds(model.config)
    if known is not None:
        return known

    times = _torch_times(model.config)
    num_layers = len(model.model.layers)
    block_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
    few = min(num_layers, 1 + _BEYOND_CACHES // block_bytes)
    target = LeanTarget(_first_blocks(model, few), "", kernel="torch")
    steps = best_of(target._timed_step(), times.counts)
    heads = best_of(lambda count: target.lm_head(target.embedding[:count]), times.counts)

    whole = {}
    for count in times.counts:
        few_blocks = max(steps[count] - heads[count], 0.0)
        whole[count] = heads[count] + few_blocks * num_layers / few
    times.keep(whole)
    return _together(whole)


def _first_blocks(model: HFModel, count: int) -> SimpleNamespace:
    """As much of the model as LeanTarget reads, with its first blocks only."""
    inner = SimpleNamespace(
        layers=model.model.layers[:count],
        embed_tokens=model.model.embed_tokens,
        norm=model.model.norm,
        rotary_emb=model.model.rotary_emb,
    )
    return SimpleNamespace(config=model.config, lm_head=model.lm_head, model=inner)
