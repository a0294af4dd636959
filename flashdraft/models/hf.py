"""A Hugging Face causal LM as a target: its own forward gives logits and features for a proposal.

The model's code is used as it is: it gets a 4-D mask, explicit positions and a cache view that
writes into our slots; layers with a running state are walked (`states`). The tables below list what
is known of families; a model outside them must first show, by a measurement, that neither a
rejected draft nor one that was kept in part leaves a trace in it.

Knows caches, masks and positions. Does not know drafters, verification or text.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashdraft.decoding.tree import ancestors, chain, depths
from flashdraft.errors import UnsupportedTarget
from flashdraft.models.cache import SlotCache, StateCache
from flashdraft.models.states import MERGED, Walk, mixers_of, walked
from flashdraft.models.target import HFConfig, HFModel, Indices, Output, Target, context_of
from flashdraft.process import INTS, new_lock

__all__ = ["HFTarget"]

# Families whose stock forward was checked against plain forwards after rejected drafts
# (tests/test_target.py, tests/test_hybrid.py).
CHECKED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "gemma4_text",
    "phi3",
    "gpt_oss",
    "glm4",
)
RUNNING = (  # those with running states
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "kimi_linear",
    "granitemoehybrid",
    "falcon_h1",
    "bamba",
    "olmo_hybrid",
    "lfm2",
    "lfm2_moe",
)
_STATELESS_LAYERS = {"full_attention", "sliding_attention"}
_STATE_LAYERS = {"linear_attention", "conv", "hybrid"}  # whose mixers are walked
_CLAMPS = (
    "transformers reads several of its tokens with time steps of at least time_step_min, and one "
    "token without that bound: its text would depend on what is drafted"
)
_FORGETS = (
    "transformers reads several tokens of a Mamba-1 layer as if nothing were before them, so a "
    "draft behind a text would be misread"
)
_REFUSED = {
    "nemotron_h": _CLAMPS,
    "zamba2": _CLAMPS,
    "mamba": _FORGETS,
    "falcon_mamba": _FORGETS,
    "jamba": _FORGETS,
    "zamba": _FORGETS,
}
_CLOSE = 1e-2  # normalised logits that differ by less count as the same
_CLOSE_IN_HALVES = 0.1  # in bfloat16 and float16, where sums of other orders differ by hundredths

AdditiveMasks = Tensor | dict[str, Tensor | None]  # one, or one by kind of layer


class HFTarget(Target):
    """Any transformers causal LM whose state is a cache of keys and values, and running states that
    stock mixers keep.

    Raises UnsupportedTarget for the others.
    """

    merged_tokens = MERGED

    def __init__(self, model: HFModel, name: str) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self.name = name
        self.kernel_name = "transformers"
        self.kernel = f"transformers {str(model.dtype).removeprefix('torch.')}"
        self.row_exact = False
        self._decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        names = inspect.signature(type(self._decoder).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # from 5.24 on
        self._mixers = mixers_of(self._decoder)
        reason = _why_unsupported(model, self.config, bool(self._mixers))
        if reason is not None:
            raise _unsupported(self, reason)

        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.hidden_size = int(self.config.hidden_size)
        self.num_layers = int(self.config.num_hidden_layers)
        self.context_length = context_of(self.config)
        self.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._lock = new_lock()
        check_family(self)

    def new_cache(self, rows: int, slots: int) -> SlotCache:
        if self._mixers:
            return StateCache(self.num_layers, rows, slots, most_waiting=self.merged_tokens)
        return super().new_cache(rows, slots)

    @torch.no_grad()  # the target is never trained
    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(tokens.to(self.model.device))
        return embedded

    def embedding_rows(self, tokens: Tensor) -> Tensor:
        weight: Tensor = self.model.get_input_embeddings().weight.detach()
        return weight[tokens.to(self.model.device)]

    def lm_head(self, hidden: Tensor) -> Tensor:
        logits = self.uncapped_logits(hidden)
        cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        if cap is None:
            return logits
        return torch.tanh(logits / cap) * cap

    def uncapped_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return self._scaled(logits)

    def head_weight(self, tokens: Tensor) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight.detach()
        return self._scaled(weight[tokens])

    def _scaled(self, logits: Tensor) -> Tensor:
        """As the family scales logits, or the lm_head's rows that they are made by."""
        divisor = getattr(self.config, "logits_scaling", None)  # Granite
        if divisor is not None:
            logits = logits / divisor
        factor = getattr(self.config, "lm_head_multiplier", None)  # Falcon-H1
        return logits if factor is None else logits * factor

    def _read(
        self,
        cache: SlotCache,
        slots: Indices,
        tokens: Tensor,
        parents: Tensor,
        sizes: Tensor,
        layers: Indices,
    ) -> Output:
        device = self.model.device
        lengths = torch.tensor([cache.lengths[slot] for slot in slots], **INTS)
        width = tokens.shape[1]
        num_slots = int(lengths.max()) + width
        real = torch.arange(width, **INTS) < sizes[:, None]
        # Padding may reach beyond the context, its position may not.
        positions = lengths[:, None] + depths(parents) * real

        seen, held = _slots_seen(lengths, positions, ancestors(parents), num_slots)
        view = _CacheView(cache, slots, num_slots)
        if isinstance(cache, StateCache):
            view.walk = Walk(cache, slots, parents, sizes, self.merged_tokens)
        inputs = {
            "input_ids": tokens.to(device),
            "position_ids": positions.to(device),
            "attention_mask": self._masks(seen.to(device), positions, held),
            self._cache_name: view,
        }
        outputs = self._outputs_by_layer(inputs, layers)

        features = torch.cat([outputs[i] for i in layers], dim=-1) if layers else None
        return outputs[self.num_layers], features

    def _masks(self, seen: Tensor, positions: Tensor, held: Tensor) -> AdditiveMasks:
        """4-D masks, as the family's forward takes them.

        seen: bool [rows, nodes, slots]; positions: of the nodes [rows, nodes]; held: the positions
        that lie in the slots [rows, slots].
        """
        lowest = torch.finfo(self.model.dtype).min
        zeros = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
        full = zeros.masked_fill_(~seen, lowest)[:, None]

        near = full
        window = getattr(self.config, "sliding_window", None)
        if window:
            too_far = positions[:, :, None] - held[:, None] >= window
            near = full.masked_fill(too_far[:, None].to(seen.device), lowest)

        if getattr(self.config, "layer_types", None) is None and not self._mixers:
            return near
        by_kind = {"full_attention": full, "sliding_attention": near, "hybrid": full}
        return by_kind | dict.fromkeys(("linear_attention", "conv"))

    def _outputs_by_layer(self, inputs: Mapping[str, object], layers: Indices) -> dict[int, Tensor]:
        """One forward: what the wanted layers give, and behind them the final normed state."""
        blocks = self._blocks()
        outputs: dict[int, Tensor] = {}
        # Another thread's pass would call our hooks too. A hook's handle takes it away again.
        with self._lock, ExitStack() as hooks:
            for index in set(layers) - {self.num_layers}:
                capture = partial(_capture, outputs, index)
                hooks.enter_context(blocks[index].register_forward_hook(capture))
            if self._mixers:
                hooks.enter_context(walked(self._mixers))
            final = self._decoder(**inputs, use_cache=True)
        outputs[self.num_layers] = final.last_hidden_state
        return outputs

    def _blocks(self) -> nn.ModuleList:
        """`h` in gpt2 and its like."""
        name = "layers" if hasattr(self._decoder, "layers") else "h"
        blocks: nn.ModuleList = getattr(self._decoder, name)
        return blocks


class _CacheView:
    """Our slots in the shape of a transformers cache, for one forward."""

    is_compileable = False

    def __init__(self, cache: SlotCache, slots: Sequence[int], num_slots: int) -> None:
        self.walk: Walk | None = None
        self.cache = cache
        self.rows = list(slots)
        self.num_slots = num_slots

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        for i, row in enumerate(self.rows):
            self.cache.write(layer_idx, row, keys[i], values[i])
        all_keys, all_values = self.cache.layer(layer_idx, keys, values)
        read_keys = all_keys[self.rows, :, : self.num_slots]
        read_values = all_values[self.rows, :, : self.num_slots]
        return read_keys, read_values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.cache.lengths[row] for row in self.rows)


def _slots_seen(
    lengths: Tensor, positions: Tensor, trees: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Which slots a node sees, bool [rows, nodes, slots], and the position in each [rows, slots].

    A node sees what is committed, and behind it its own ancestors, which lie as deep as they are.
    positions: of the nodes [rows, nodes]; trees: who sees whom [rows, nodes, nodes].
    """
    num_rows, width = positions.shape
    slots = torch.arange(num_slots, **INTS)
    committed = slots < lengths[:, None]
    seen = committed[:, None].repeat(1, width, 1)
    held = slots.repeat(num_rows, 1)
    for row, start in enumerate(lengths.tolist()):
        here = slice(start, start + width)
        seen[row, :, here] = trees[row]
        held[row, here] = positions[row]
    return seen, held


def _capture(
    outputs: dict[int, Tensor],
    index: int,
    _module: nn.Module,
    _inputs: object,
    output: Tensor | tuple[Tensor, ...],
) -> None:
    outputs[index] = output[0] if isinstance(output, tuple) else output


# ---- which models are taken ----------------------------------------------------------------------


def _unsupported(target: HFTarget, reason: str) -> UnsupportedTarget:
    message = f"`{target.name}` is a `{target.config.model_type}` model: {reason}"
    known = ", ".join((*CHECKED, *RUNNING))
    hint = f"families known to work: {known}"
    return UnsupportedTarget(message, hint=hint)


def _why_unsupported(model: HFModel, config: HFConfig, has_mixers: bool) -> str | None:
    """What the model's class and config already show, in words, or None."""
    if config.model_type in _REFUSED:
        return _REFUSED[config.model_type]

    stateful_layers = set(getattr(config, "layer_types", None) or ()) - _STATELESS_LAYERS
    if has_mixers:
        stateful_layers -= _STATE_LAYERS
    is_told = getattr(config, "layer_types", None) is not None
    if stateful_layers or (getattr(model, "_is_stateful", False) and not (has_mixers or is_told)):
        kinds = ", ".join(sorted(stateful_layers)) or "recurrent"
        return (
            f"its layers keep a running state ({kinds}), "
            "which cannot be cut back after a rejected draft"
        )

    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        # Drafters read its rows.
        return f"its output layer is a {type(head).__name__}, no plain linear"

    if getattr(config, "max_position_embeddings", None) is None:
        return "its config has no max_position_embeddings"

    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its tokens see those behind them (use_bidirectional_attention)"

    shares_keys = getattr(config, "num_kv_shared_layers", 0)
    if shares_keys and not getattr(config, "hidden_size_per_layer_input", 1):
        return (
            "its layers share keys and values without inputs of their own, "
            "which transformers cannot run"
        )

    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = any(isinstance(own, Mapping) for own in rope.values())
    if "rope_type" in rope and by_kind:
        return (
            "its rope_parameters are told by kinds of layers, "
            "of which transformers reads none in this family"
        )
    return None


def check_family(target: HFTarget) -> None:
    """An unlisted family must pass a measurement.

    Our pass has to give the model's own logits, and a rejected draft must leave no trace in them.
    """
    if target.config.model_type in (*CHECKED, *RUNNING):
        return
    try:
        differences = _differences(target)
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise _unsupported(
            target, f"its forward does not take our cache: {type(error).__name__}: {error}"
        ) from error

    is_narrow = target.model.dtype.itemsize <= 2
    close = _CLOSE_IN_HALVES if is_narrow else _CLOSE
    if not differences.plain < close:
        off_by = f"off by {differences.plain:.2g}"
        raise _unsupported(target, f"our pass does not give its own logits ({off_by})")
    if not differences.behind_drafts < close:
        off_by = f"logits off by {differences.behind_drafts:.2g}"
        raise _unsupported(target, f"a rejected draft left a trace in its state ({off_by})")
    if not differences.one_by_one < close:
        off_by = f"logits off by {differences.one_by_one:.2g}"
        raise _unsupported(target, f"its tokens read one at a time give another text ({off_by})")


class _Differences(NamedTuple):
    """The largest differences of normalised logits from the model's own without a cache."""

    plain: float  # of our pass over a proposal
    behind_drafts: float  # behind drafts that were rejected, and kept in part
    one_by_one: float  # of a token a pass


@torch.inference_mode()
def _differences(target: HFTarget) -> _Differences:
    """Measured on twelve tokens: four as a prompt, and proposals of at most four behind it."""
    tokens = torch.arange(12, **INTS) % target.vocab_size
    wrong = tokens.flip(0)

    plain = _Trial(target, tokens)
    plain.read(tokens[4:8], 4)

    drafted = _Trial(target, tokens)
    drafted.read(wrong[:4], 0)
    drafted.read(torch.cat([tokens[4:6], wrong[:2]]), 2)
    drafted.read(torch.cat([tokens[6:7], wrong[:3]]), 1)
    drafted.read(tokens[7:11], 4)

    one_by_one = _Trial(target, tokens)
    for token in tokens[4:]:
        one_by_one.read(token[None], 1)
    return _Differences(plain.worst, drafted.worst, one_by_one.worst)


class _Trial:
    """Our passes over a text behind its first four tokens, held against the model's own."""

    def __init__(self, target: HFTarget, tokens: Tensor) -> None:
        inputs = tokens[None].to(target.model.device)
        self.own = target.model(input_ids=inputs, use_cache=False).logits[0]
        self.scale = float(self.own.std()) or 1.0
        self.target = target
        self.cache = target.new_cache(1, 16)
        self.worst = 0.0  # difference of normalised logits
        target.prefill(self.cache, 0, tokens[:4], ())

    def read(self, proposal: Tensor, num_right: int) -> None:
        """Read a chain whose first tokens are the text's; the others are rejected."""
        size = len(proposal)
        parents = chain(size)[None]
        sizes = torch.tensor([size], **INTS)
        logits, _ = self.target.forward(self.cache, [0], proposal[None], parents, sizes, ())
        if num_right == 0:
            return
        start = self.cache.lengths[0]
        off_by = (logits[0, :num_right] - self.own[start : start + num_right]).abs().max()
        difference = float(off_by) / self.scale
        if math.isnan(difference):  # which no maximum would show
            difference = math.inf
        self.worst = max(self.worst, difference)
        self.cache.keep(0, range(num_right))
