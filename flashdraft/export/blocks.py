"""What the exports of block drafters share: a network without what no engine has, its config.json,
and what is told of it.

Knows kinds of drafters. Does not know any engine's limits.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flashdraft import hub
from flashdraft.export.order import Order, TargetShape, kind_of, refused
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.foreign import Json
from flashdraft.formats.parse import Fields
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.formats.weights import MASK_ROW

__all__ = [
    "SWIGLU_LOSS",
    "head_losses",
    "lifted",
    "network_of",
    "refuse_logits",
    "refuse_normed",
    "refuse_parts",
    "refuse_raw",
    "refuse_scales",
    "target_cap",
    "target_scale",
    "text_config",
]

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
_EMBEDDING = "embed_tokens.weight"
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


def target_scale(order: Order) -> float:
    """By what the target's family (Gemma) multiplies the embedding that a drafter has from it."""
    target = order.target
    if target is None or _EMBEDDING in order.tensors:
        return 1.0
    family = str(text_config(target).get("model_type"))
    return math.sqrt(target.hidden_size) if family.startswith("gemma") else 1.0


def refuse_raw(order: Order, engine: str) -> None:
    """Raises CheckpointError where a drafter reads bare rows of an embedding that its target
    scales, for engines that give it what the target reads."""
    if order.config.raw_tables and target_scale(order) != 1:
        why = "it reads bare rows of its target's embedding, which that engine scales"
        raise refused(order, engine, why, hint="`--to vllm` has bare rows")


def refuse_normed(order: Order, engine: str) -> None:
    """Raises CheckpointError where a feature is the last layer's output, for engines that take
    transformers' hidden_states[-1] for it, which is that behind the final norm."""
    if order.reads_last_layer:
        why = "it reads the last layer's output, which that engine hands out normed"
        raise refused(order, engine, why, hint="`--to vllm` hands it out as it is")


def refuse_logits(order: Order, engine: str) -> None:
    """Raises CheckpointError where a head adds to logits that the target's family has changed
    before, which no engine does for a drafter."""
    if order.target is None or order.config.sequential_head in (None, "swiglu"):
        return
    family = text_config(order.target)
    for name in ("logits_scaling", "lm_head_multiplier"):
        if family.get(name) not in (None, 1):
            why = f"its target scales logits ({name}), and its head adds to them"
            raise refused(order, engine, why, hint="FlashDraft runs it")
    if kind_of(order.config) != "dflash2" and target_cap(order) is not None:
        why = "its target caps logits, and its head adds to them"
        raise refused(order, engine, why, hint="FlashDraft runs it")


def target_cap(order: Order) -> float | None:
    """The cap of the target's logits, where the drafter has it, too."""
    if order.target is None or order.config.raw_tables:
        return None
    cap = text_config(order.target).get("final_logit_softcapping")
    return float(cap) if cap else None


def text_config(target: TargetShape) -> Json:
    """A target's config.json, of a multimodal wrapper the part of its language model."""
    written = hub.read_config(target.folder)
    text = written.get("text_config")
    return text if isinstance(text, Mapping) else written


def head_losses(order: Order) -> tuple[str, ...]:
    return (SWIGLU_LOSS,) if order.config.sequential_head == "swiglu" else ()


def network_of(order: Order) -> tuple[DraftConfig, dict[str, Tensor]]:
    """The drafter over the whole vocabulary, without a swiglu head, and its tensors.

    An anchor-first one without a Markov head (DeepSpec's plain DFlash) gets one that adds nothing:
    engines know the layout by the head.
    """
    config = replace(order.config, draft_vocab_size=None, raw_tables=False)
    if kind_of(config) == "dflash2" and config.final_logit_softcapping is None:
        config = replace(config, final_logit_softcapping=target_cap(order))
    if config.sequential_head == "swiglu":
        config = replace(config, sequential_head=None, head_rank=64)
    is_headless = kind_of(config) == "dspark" and config.sequential_head is None
    if is_headless:
        config = replace(config, sequential_head="markov", head_rank=1)

    tensors: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config).items():
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
