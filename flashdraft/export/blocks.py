"""What the exports of block drafters share: a network without what no engine has, its config.json,
and what is told of it.

Knows kinds of drafters. Does not know any engine's limits.
"""

from dataclasses import replace

import torch
from torch import Tensor

from flashdraft.export.order import Order, kind_of, refused
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.parse import Fields
from flashdraft.formats.weights import MASK_ROW

__all__ = ["SWIGLU_LOSS", "head_losses", "lifted", "network_of", "refuse_parts", "refuse_scales"]

SWIGLU_LOSS = (
    "its sequential head (swiglu), which no other engine has: drafts are those of the plain "
    "network (the built-in drafter falls from 2.48 to 2.02 tokens a pass by it)"
)
_TITLES = {
    "medusa": "a Medusa drafter",
    "draft_model": "a draft_model, cut from its target",
    "eagle3": "an EAGLE-3 drafter",
    "dflash2": "a DFlash 2 drafter",
    "dspark": "a DSpark drafter, or its anchor's row predicts as DSpark's does",
    "domino": "a Domino drafter",
    "mixed": "its convolutions, its selector and its layout are together in no published kind",
}
_ELSEWHERE = {  # who has it
    "eagle3": "vllm and sglang have it",
    "dflash2": "zlab, vllm, sglang and llamacpp have it",
    "dspark": "vllm, sglang and llamacpp have it",
    "domino": "sglang has it",
}
_HEAD_KEYS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)
_READS = ("mask_token_id", "target_layer_ids")


def refuse_parts(order: Order, engine: str, known: tuple[str, ...]) -> None:
    """Raises CheckpointError for a kind of drafter that is not `known`, or whose layers turn their
    heads in two ways, which no engine has."""
    kind = kind_of(order.config)
    if kind not in known:
        hint = f"{_ELSEWHERE.get(kind, 'FlashDraft runs it')}; {engine} has {', '.join(known)}"
        raise refused(order, engine, _TITLES.get(kind, kind), hint=hint)
    if MASK_ROW in order.tensors:
        why = "its mask token has an embedding of its own"
        raise refused(order, engine, why, hint="FlashDraft runs it, and its publisher's engine")
    if len(order.config.ropes) > 1:
        why = "its kinds of layers have rotary positions of their own"
        raise refused(order, engine, why, hint="FlashDraft runs it; engines have one for all")


def refuse_scales(order: Order, engine: str, names: tuple[str, ...]) -> None:
    """Raises CheckpointError where a drafter has one of these fields that change its drafts."""
    usual = {"input_embedding_scale": 1.0, "output_multiplier": 1.0}
    for name in names:
        value = getattr(order.config, name)
        if value != usual.get(name):
            why = f"its {name} is {value}, which that engine does not apply to this kind"
            raise refused(order, engine, why, hint="FlashDraft runs it; `--to zlab` keeps it")


def head_losses(order: Order) -> tuple[str, ...]:
    return (SWIGLU_LOSS,) if order.config.sequential_head == "swiglu" else ()


def network_of(order: Order) -> tuple[DraftConfig, dict[str, Tensor]]:
    """The drafter over the whole vocabulary, without a swiglu head, and its tensors.

    An anchor-first one without a Markov head (DeepSpec's plain DFlash) gets one that adds nothing:
    engines know the layout by the head.
    """
    config = replace(order.config, draft_vocab_size=None, raw_tables=False)
    if config.sequential_head == "swiglu":
        config = replace(config, sequential_head=None, head_rank=64)
    is_headless = kind_of(config) == "dspark" and config.sequential_head is None
    if is_headless:
        config = replace(config, sequential_head="markov", head_rank=1)

    tensors: dict[str, Tensor] = {}
    for name, shape in config.shapes().items():
        if name in order.tensors:
            tensors[name] = order.tensors[name]
        else:
            tensors[name] = torch.zeros(shape, dtype=order.tensors["fc.weight"].dtype, device="cpu")
    if config.num_target_layers == 0 and order.target is not None:
        config = replace(config, num_target_layers=order.target.num_layers)
    return config, tensors


def lifted(config: Fields) -> Fields:
    """DSpark's config.json as both vLLM and SGLang read it: the head's keys at the top, where one
    of them looks alone, and the layers in `dflash_config`, where the other looks first."""
    lifted = {**config, "architectures": ["Qwen3DSparkModel"]}
    special = dict(lifted.pop("dflash_config", {}))
    special.pop("projector_type", None)
    for name in _HEAD_KEYS:
        if name in special:
            lifted[name] = special.pop(name)
    for name in _READS:
        if name in lifted:
            special[name] = lifted.pop(name)
    lifted["dflash_config"] = special
    return lifted
