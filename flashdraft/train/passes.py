"""One training pass a method over the same blocks, labels and losses, and a count of its FLOPs: so methods can be compared.

A block is an anchor and the positions behind it; a pass gives a state for every block row, which the lm_head turns into a guess
of the row's own token. What stands in a block's first row, the anchor's, is never looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.draft_model import CutDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.network import DraftNetwork
from flashdraft.train.batch import Batch

__all__ = ["FlopCount", "Pass"]

Embed = Callable[[Tensor], Tensor]  # the target's embedding
_compiled = functools.cache(functools.partial(torch.compile, dynamic=True))


class Pass(nn.Module):
    """A draft network's pass over a batch, all blocks of all sequences at once: what is trained."""

    def __init__(self, model: DraftNetwork, embed: Embed) -> None:
        super().__init__()
        self.model, self.embed = model, embed

    def forward(self, batch: Batch) -> Tensor:
        """States of every block row [rows, hidden], normed where the network has a last norm."""
        return _PASSES[self.model.method](self.model, self.embed, batch)


def _dflash(model: DFlashDraftModel, embed: Embed, batch: Batch) -> Tensor:
    context = model.context(batch.features.to(model.norm.weight.dtype))
    return model(context, embed(batch.block_tokens), batch.positions, functools.partial(_attend, batch))  # type: ignore[no-any-return]


def _medusa(model: MedusaDraftModel, _embed: Embed, batch: Batch) -> Tensor:
    """Every head reads the target's last state before the anchor."""
    states = batch.features[_before_anchors(batch, model.config.block_size)[0]].float()
    return torch.cat((states[:, None], model(states)), dim=1).flatten(0, 1)


def _eagle3(model: Eagle3DraftModel, embed: Embed, batch: Batch) -> Tensor:
    """Training-time test (2503.01840, section 3.2): behind every anchor the layer reads its own outputs, step by step.

    Of the sampled tokens only the states are the layer's own; the tokens are the answer's.
    """
    size = model.config.block_size
    places, before = _before_anchors(batch, size)
    fused = model.fc(batch.features.to(model.norm.weight.dtype))
    _, *context = model.project(embed(batch.next_tokens), fused, batch.positions[0])
    states, tokens = fused[places], batch.previous.view(-1, size)
    own: list[tuple[Tensor, ...]] = []  # by step: keys and values of every block [blocks, kv_heads, head_dim]
    outputs = [states]
    for step in range(1, size):
        q, *kv = model.project(embed(tokens[:, step]), states, before + step - 1)
        own.append(tuple(kv))
        attended = []
        for c0, c1, r0, r1 in batch.spans:  # each block's query over the pairs before its first own one, and its own
            blocks = slice(r0 // size, r1 // size)
            past = torch.arange(c1 - c0, device=before.device) < before[blocks, None]
            mask = torch.cat((past, torch.eye(len(past), dtype=torch.bool, device=before.device).repeat(1, step)), dim=1)
            sides: Any = zip(context, *own, strict=True)
            keys, values = (torch.cat((old[c0:c1], *(new[blocks] for new in news))) for old, *news in sides)
            attended.append(_attention(q[blocks], keys, values, mask))
        states = model.finish(states, torch.cat(attended))
        outputs.append(model.norm(states))
    return torch.stack(outputs, dim=1).flatten(0, 1)


def _draft_model(model: CutDraftModel, embed: Embed, batch: Batch) -> Tensor:
    """A causal LM over whole texts; a block's one row behind the anchor is guessed by the state at the anchor."""
    outputs, anchors = [], batch.positions[1][::2]
    for c0, c1, r0, r1 in batch.spans:
        text = torch.cat((batch.tokens[c0:c1], batch.next_tokens[c1 - 1 : c1]))  # up to the last anchor
        outputs.append(model(embed(text))[anchors[r0 // 2 : r1 // 2]].repeat_interleave(2, 0))
    return torch.cat(outputs)


_PASSES: dict[str, Callable[[Any, Embed, Batch], Tensor]] = {
    "dflash": _dflash,
    "eagle3": _eagle3,
    "medusa": _medusa,
    "draft_model": _draft_model,
}


def _before_anchors(batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """Of every block: the row of batch.features before its anchor, and that row's position."""
    before = batch.positions[1][::size] - 1
    firsts = [torch.full(((r1 - r0) // size,), c0) for c0, _, r0, r1 in batch.spans]
    return before + torch.cat(firsts).to(before.device), before


def _attend(batch: Batch, _layer: int, q: Tensor, context_kv: tuple[Tensor, ...], block_kv: tuple[Tensor, ...]) -> Tensor:
    pairs = list(zip(context_kv, block_kv, strict=True))  # of keys, of values
    if batch.flex is not None:
        return _attention(q, torch.cat(pairs[0]), torch.cat(pairs[1]), batch.flex)
    outputs = []
    for (c0, c1, r0, r1), mask in zip(batch.spans, batch.masks, strict=True):
        keys, values = (torch.cat((context[c0:c1], block[r0:r1])) for context, block in pairs)
        outputs.append(_attention(q[r0:r1], keys, values, mask))
    return torch.cat(outputs)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
    """[n, heads, head_dim] over [m, kv_heads, head_dim] -> [n, heads * head_dim]; mask: bool [n, m], or FlexAttention's."""
    q, k, v = (x.transpose(0, 1)[None].to(queries.dtype) for x in (queries, keys, values))
    if isinstance(mask, Tensor):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
        out = attend(q, k, v, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


class FlopCount(TorchDispatchMode):
    """`total` grows while this mode is entered: FLOPs of matrix products and attention, forward and backward.

    By torch's own formulas; elementwise work is left out. torch's FlopCounterMode cannot be used: it follows modules, which
    fails inside `torch.autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := _FORMULAS.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _cpu_attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> float:
    """Two products: of queries and keys, of weights and values. q: [b, heads, n, d], k: [b, any heads, m, d]"""
    return 4.0 * q.shape[:3].numel() * k.shape[2] * q.shape[3]


_FORMULAS: dict[Any, Callable[..., float]] = flop_registry | {  # torch's table, and two that it lacks
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:  # the scores once more, and four products for two
    lambda _, q, k, *rest, **options: 2.5 * _cpu_attention(q, k),
}
