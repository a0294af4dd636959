"""A Hugging Face causal LM as a target: logits and features for a whole proposal, through its stock forward.

Knows caches, masks and positions. Does not know drafters, verification or text. The model's code is used as it is: it
gets a 4-D mask, explicit positions and a cache view that writes into our slots. The one table below lists what is known
of families; a model outside it must first show, by a measurement, that a rejected draft leaves no trace in it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashdraft.decoding.tree import ancestors, chain, depths
from flashdraft.errors import UnsupportedTarget
from flashdraft.models.cache import SlotCache
from flashdraft.models.target import Indices, Output, Target, context_of
from flashdraft.process import INTS, new_lock

__all__ = ["HFTarget"]

# Families whose stock forward was checked against plain forwards after rejected drafts (tests/test_target.py).
CHECKED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "glm4",
)


class _CacheView:
    """Our slots in the shape of a transformers cache, for one forward."""

    is_compileable = False

    def __init__(self, cache: SlotCache, slots: Sequence[int], num_slots: int) -> None:
        self.cache, self.rows, self.num_slots = cache, list(slots), num_slots

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        for i, row in enumerate(self.rows):
            self.cache.write(layer_idx, row, keys[i], values[i])
        all_keys, all_values = self.cache.layer(layer_idx, keys)
        return all_keys[self.rows, :, : self.num_slots], all_values[self.rows, :, : self.num_slots]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.cache.lengths[row] for row in self.rows)


class HFTarget(Target):
    """Any transformers causal LM whose state is a cache of keys and values. Raises UnsupportedTarget for the others."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.config, self.name = model.eval(), model.config.get_text_config(), name
        odd = set(getattr(self.config, "layer_types", None) or ()) - {
            "full_attention",
            "sliding_attention",
        }
        if getattr(model, "_is_stateful", False) or odd:
            state = f"its layers keep a running state ({', '.join(sorted(odd)) or 'recurrent'})"
            raise _unsupported(self, f"{state}, which cannot be cut back after a rejected draft")
        self.kernel_name, self.kernel = (
            "transformers",
            f"transformers {str(model.dtype).removeprefix('torch.')}",
        )
        self.row_exact = False
        head = model.get_output_embeddings()
        if (
            type(head) is not nn.Linear or not head.weight.is_floating_point()
        ):  # drafters read its rows
            raise _unsupported(
                self, f"its output layer is a {type(head).__name__}, no plain linear"
            )
        self.vocab_size = int(head.weight.shape[0])
        self.hidden_size, self.num_layers = (
            int(self.config.hidden_size),
            int(self.config.num_hidden_layers),
        )
        if getattr(self.config, "max_position_embeddings", None) is None:
            raise _unsupported(self, "its config has no max_position_embeddings")
        rope = getattr(self.config, "rope_parameters", None) or {}
        if "rope_type" in rope and any(isinstance(own, Mapping) for own in rope.values()):
            raise _unsupported(
                self,
                "its rope_parameters are told by kinds of layers, of which transformers reads none in this family",
            )
        self.context_length = context_of(self.config)
        self.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._lock = new_lock()
        self._decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        check_family(self)

    @torch.no_grad()  # the target is never trained
    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens.to(self.model.device))  # type: ignore[no-any-return]

    def embedding_rows(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings().weight.detach()[tokens.to(self.model.device)]  # type: ignore[no-any-return]

    def lm_head(self, hidden: Tensor) -> Tensor:
        logits = self.uncapped_logits(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def uncapped_logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)  # type: ignore[no-any-return]

    def head_weight(self, tokens: Tensor) -> Tensor:
        return self.model.get_output_embeddings().weight.detach()[tokens]  # type: ignore[no-any-return]

    def _read(
        self,
        cache: SlotCache,
        slots: Indices,
        tokens: Tensor,
        parents: Tensor,
        sizes: Tensor,
        layers: Indices,
    ) -> Output:
        device, lengths = (
            self.model.device,
            torch.tensor([cache.lengths[slot] for slot in slots], **INTS),
        )
        real = torch.arange(tokens.shape[1], **INTS) < sizes[:, None]
        positions = (
            lengths[:, None] + depths(parents) * real
        )  # padding may reach beyond the context, its position may not
        num_slots = int(lengths.max()) + tokens.shape[1]
        seen = (torch.arange(num_slots, **INTS) < lengths[:, None])[:, None].repeat(
            1, tokens.shape[1], 1
        )  # [rows, nodes, slots]
        held = torch.arange(num_slots, **INTS).repeat(
            len(slots), 1
        )  # [rows, slots] position of what is there
        for row, (start, tree) in enumerate(zip(lengths.tolist(), ancestors(parents), strict=True)):
            here = slice(
                start, start + len(tree)
            )  # behind what is committed: a node sees its own ancestors, as deep as they are
            seen[row, :, here], held[row, here] = tree, positions[row]
        inputs = {"input_ids": tokens.to(device), "position_ids": positions.to(device)}
        inputs |= {"attention_mask": self._masks(seen.to(device), positions, held)}
        captured = dict[int, Tensor]()
        blocks = (
            self._decoder.layers if hasattr(self._decoder, "layers") else self._decoder.h
        )  # h in gpt2 and its like
        with (
            self._lock,
            ExitStack() as hooks,
        ):  # a hook's handle takes it away again; it would see other threads' passes
            for i in {*layers} - {self.num_layers}:
                hooks.enter_context(blocks[i].register_forward_hook(partial(_capture, captured, i)))
            output = self._decoder(
                **inputs, past_key_values=_CacheView(cache, slots, num_slots), use_cache=True
            )
        captured[self.num_layers] = output.last_hidden_state
        features = torch.cat([captured[i] for i in layers], dim=-1) if layers else None
        return output.last_hidden_state, features

    def _masks(self, seen: Tensor, positions: Tensor, held: Tensor) -> Any:
        """The 4-D additive mask, or one for each kind of attention layer where the family takes a dict of them."""
        lowest = torch.finfo(self.model.dtype).min
        full = near = torch.zeros(
            seen.shape, dtype=self.model.dtype, device=seen.device
        ).masked_fill_(~seen, lowest)[:, None]
        if window := getattr(self.config, "sliding_window", None):
            far = positions[:, :, None] - held[:, None] >= window
            near = full.masked_fill(far[:, None].to(seen.device), lowest)
        return (
            near
            if getattr(self.config, "layer_types", None) is None
            else {"full_attention": full, "sliding_attention": near}
        )


def _capture(
    captured: dict[int, Tensor], index: int, _module: nn.Module, _inputs: Any, output: Any
) -> None:
    captured[index] = output[0] if isinstance(output, tuple) else output


def _unsupported(target: HFTarget, reason: str) -> UnsupportedTarget:
    hint = f"families known to work, with keys and values as their only state: {', '.join(CHECKED)}"
    return UnsupportedTarget(
        f"`{target.name}` is a `{target.config.model_type}` model: {reason}", hint=hint
    )


def check_family(target: HFTarget) -> None:
    """An unlisted family must pass a measurement: its own logits, and no trace of a rejected draft in them."""
    if target.config.model_type in CHECKED:
        return
    try:
        plain, rejected = _differences(target)
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise _unsupported(
            target, f"its forward does not take our cache: {type(error).__name__}: {error}"
        ) from error
    if not plain < 1e-2:
        raise _unsupported(target, f"our pass does not give its own logits (off by {plain:.2g})")
    if not rejected < 1e-2:
        raise _unsupported(
            target, f"a rejected draft left a trace in its state (logits off by {rejected:.2g})"
        )


@torch.inference_mode()
def _differences(target: HFTarget) -> tuple[float, float]:
    """The largest differences of normalised logits: between our pass and the model's own, and after a rejected draft."""
    tokens, shape = (
        torch.arange(8, **INTS) % target.vocab_size,
        (chain(4)[None], torch.tensor([4], **INTS)),
    )
    plain, cut = target.new_cache(1, 16), target.new_cache(1, 16)
    for cache in (plain, cut):
        target.prefill(cache, 0, tokens[:4], (0,))
    target.forward(cut, [0], tokens[4:].flip(0)[None], *shape, ())
    expected, _ = target.forward(plain, [0], tokens[None, 4:], *shape, ())
    got, _ = target.forward(cut, [0], tokens[None, 4:], *shape, ())
    own = target.model(input_ids=tokens[None].to(target.model.device), use_cache=False).logits[
        :, 4:
    ]
    scale = float(own.std()) or 1.0
    return float((own - expected).abs().max()) / scale, float((expected - got).abs().max()) / scale
