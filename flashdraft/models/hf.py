"""A Hugging Face causal LM as a target: its own forward gives logits and features for a proposal.

The model's code is used as it is: it gets a 4-D mask, explicit positions and a cache view that
writes into our slots. The one table below lists what is known of families; a model outside it must
first show, by a measurement, that a rejected draft leaves no trace in it.

Knows caches, masks and positions. Does not know drafters, verification or text.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashdraft.decoding.tree import ancestors, chain, depths
from flashdraft.errors import UnsupportedTarget
from flashdraft.models.cache import SlotCache
from flashdraft.models.target import HFConfig, HFModel, Indices, Output, Target, context_of
from flashdraft.process import INTS, new_lock

__all__ = ["HFTarget"]

# Families whose stock forward was checked against plain forwards after rejected drafts
# (tests/test_target.py).
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
_STATELESS_LAYERS = {"full_attention", "sliding_attention"}
_CLOSE = 1e-2  # normalised logits that differ by less count as the same

AdditiveMasks = Tensor | dict[str, Tensor]  # one, or one by kind of attention layer


class HFTarget(Target):
    """Any transformers causal LM whose state is a cache of keys and values.

    Raises UnsupportedTarget for the others.
    """

    def __init__(self, model: HFModel, name: str) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self.name = name
        self.kernel_name = "transformers"
        self.kernel = f"transformers {str(model.dtype).removeprefix('torch.')}"
        self.row_exact = False
        reason = _why_unsupported(model, self.config)
        if reason is not None:
            raise _unsupported(self, reason)

        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.hidden_size = int(self.config.hidden_size)
        self.num_layers = int(self.config.num_hidden_layers)
        self.context_length = context_of(self.config)
        self.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._lock = new_lock()
        self._decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        check_family(self)

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
        return logits

    def head_weight(self, tokens: Tensor) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight.detach()
        return weight[tokens]

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
        inputs = {
            "input_ids": tokens.to(device),
            "position_ids": positions.to(device),
            "attention_mask": self._masks(seen.to(device), positions, held),
            "past_key_values": _CacheView(cache, slots, num_slots),
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

        if getattr(self.config, "layer_types", None) is None:
            return near
        return {"full_attention": full, "sliding_attention": near}

    def _outputs_by_layer(self, inputs: Mapping[str, object], layers: Indices) -> dict[int, Tensor]:
        """One forward: what the wanted layers give, and behind them the final normed state."""
        blocks = self._blocks()
        outputs: dict[int, Tensor] = {}
        # Another thread's pass would call our hooks too. A hook's handle takes it away again.
        with self._lock, ExitStack() as hooks:
            for index in set(layers) - {self.num_layers}:
                capture = partial(_capture, outputs, index)
                hooks.enter_context(blocks[index].register_forward_hook(capture))
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
        self.cache = cache
        self.rows = list(slots)
        self.num_slots = num_slots

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        for i, row in enumerate(self.rows):
            self.cache.write(layer_idx, row, keys[i], values[i])
        all_keys, all_values = self.cache.layer(layer_idx, keys)
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
    known = ", ".join(CHECKED)
    hint = f"families known to work, with keys and values as their only state: {known}"
    return UnsupportedTarget(message, hint=hint)


def _why_unsupported(model: HFModel, config: HFConfig) -> str | None:
    """What the model's class and config already show, in words, or None."""
    stateful_layers = set(getattr(config, "layer_types", None) or ()) - _STATELESS_LAYERS
    if getattr(model, "_is_stateful", False) or stateful_layers:
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
    if target.config.model_type in CHECKED:
        return
    try:
        differences = _differences(target)
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise _unsupported(
            target, f"its forward does not take our cache: {type(error).__name__}: {error}"
        ) from error

    plain = differences.plain
    if not plain < _CLOSE:
        raise _unsupported(target, f"our pass does not give its own logits (off by {plain:.2g})")
    rejected = differences.after_rejected
    if not rejected < _CLOSE:
        raise _unsupported(
            target, f"a rejected draft left a trace in its state (logits off by {rejected:.2g})"
        )


class _Differences(NamedTuple):
    """The largest differences of normalised logits."""

    plain: float  # between our pass and the model's own
    after_rejected: float  # between our pass behind a rejected draft and our pass without one


@torch.inference_mode()
def _differences(target: HFTarget) -> _Differences:
    """Measured on eight tokens: four as a prompt, four as a proposal behind it."""
    tokens = torch.arange(8, **INTS) % target.vocab_size
    prompt = tokens[:4]
    proposal = tokens[None, 4:]
    rejected_draft = tokens[4:].flip(0)[None]
    parents = chain(4)[None]
    sizes = torch.tensor([4], **INTS)

    clean = target.new_cache(1, 16)
    cut_back = target.new_cache(1, 16)
    target.prefill(clean, 0, prompt, (0,))
    target.prefill(cut_back, 0, prompt, (0,))
    target.forward(cut_back, [0], rejected_draft, parents, sizes, ())
    expected, _ = target.forward(clean, [0], proposal, parents, sizes, ())
    got, _ = target.forward(cut_back, [0], proposal, parents, sizes, ())

    inputs = tokens[None].to(target.model.device)
    own = target.model(input_ids=inputs, use_cache=False).logits[:, 4:]
    scale = float(own.std()) or 1.0
    plain = float((own - expected).abs().max()) / scale
    after_rejected = float((expected - got).abs().max()) / scale
    return _Differences(plain, after_rejected)
