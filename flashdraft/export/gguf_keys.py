"""A drafter under llama.cpp's names: keys and tensors of its architecture `dflash`.

As src/models/dflash.cpp and common/speculative.cpp read them (0c1e570, October 2026). Knows shapes
and names; does not know files, nor which drafters llama.cpp cannot run (`llamacpp`).
"""

import math
import re
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from flashdraft.formats.config import DraftConfig
from flashdraft.methods.network import network_shape
from flashdraft.models.modules import rotary_frequencies
from flashdraft.process import FLOATS

__all__ = ["Key", "Keys", "keys_of", "rope_of", "tensor_name"]

Key: TypeAlias = bool | int | float | str | list[int] | list[bool]
Keys: TypeAlias = dict[str, Key]

_NAMES = {  # what stands before .weight or .bias, if anything does
    "fc": "fc",
    "hidden_norm": "enc.output_norm",
    "norm": "output_norm",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "d2t": "d2t",
    "rope_freqs": "rope_freqs",  # no published name: divisors of the frequencies
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
    "candidate_selector.hidden_projection": "selector_hidden",
    "markov_head.markov_w1": "markov_w1",
    "markov_head.markov_w2": "markov_w2",
    "confidence_head.proj": "conf_proj",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attention_conv.base_kernel": "attn_conv_base",
    "attention_conv.kernel_projection": "attn_conv_proj",
    "mlp_conv.base_kernel": "ffn_conv_base",
    "mlp_conv.kernel_projection": "ffn_conv_proj",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_SUFFIX = re.compile(r"\.(weight|bias)$")
_PLAIN_YARN = {  # what llama.cpp has a key or the same constant for
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
}


def tensor_name(name: str) -> str:
    """Published name -> llama.cpp's. Raises KeyError for a tensor that it has no place for."""
    suffix = _SUFFIX.search(name)
    ending = suffix[0] if suffix else ""
    bare = name.removesuffix(ending)
    layer = _LAYER.fullmatch(bare)
    if layer is None:
        return _NAMES[bare] + ending
    index, part = layer.groups()
    return f"blk.{index}.{_LAYER_NAMES[part]}{ending}"


def keys_of(config: DraftConfig) -> Keys:
    """Everything but rotary positions (`rope_of`) and what depends on the target, without the
    prefix `dflash.`"""
    keys: Keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "block_size": config.block_rows,
        "target_layers": [layer + 1 for layer in config.target_layer_ids],  # layers' inputs
    }
    windows = [mask.window for mask in config.masks]
    if any(windows):
        keys["attention.sliding_window"] = max(window or 0 for window in windows)
        keys["attention.sliding_window_pattern"] = [window is not None for window in windows]
    if all(mask.causal for mask in config.masks):  # else it reads blocks in both directions
        keys["attention.causal"] = True

    if config.sequential_head == "selector":
        keys["conv_kernel_size"] = config.conv_kernel_size
        keys["conv_group_size"] = config.conv_group_size
        keys["selector_rank"] = config.head_rank
        keys["selector_top_k"] = config.head_choices
    if config.sequential_head == "markov" or config.anchor_first:
        keys["sample_from_anchor"] = config.anchor_first
        keys["has_confidence_head"] = config.confidence_head
    return keys


def rope_of(config: DraftConfig, *, by_sections: bool) -> tuple[Keys, Tensor | None]:
    """Rotary positions of a drafter that has one kind of them: keys, and the divisors
    [head_dim / 2] of its frequencies where no key says them.

    by_sections: its target's positions have several axes (M-RoPE); the draft turns by the first,
    and divisors are not read then.
    """
    rope = config.rope_parameters
    kind = str(rope["rope_type"])
    keys: Keys = {"rope.freq_base": float(rope["rope_theta"])}
    if by_sections:
        keys["rope.dimension_sections"] = [config.head_dim // 2, 0, 0, 0]
    if kind == "default":
        return keys, None

    factor = float(rope["factor"])
    scaled = rotary_frequencies(network_shape(config, rope))
    if kind == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = factor
        return keys, None

    gain = scaled.scaling
    divisors = None
    if kind == "yarn" and _is_plain_yarn(rope):
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = factor
        keys["rope.scaling.original_context_length"] = int(original)
        gain /= 1 + 0.1 * math.log(factor)  # which it multiplies by itself
    else:
        keys["rope.scaling.type"] = "none"
        exponents = torch.arange(0, config.head_dim, 2, **FLOATS) / config.head_dim
        divisors = 1 / (float(rope["rope_theta"]) ** exponents) / scaled.inv_freq
    if abs(gain - 1) > 1e-6:
        keys["rope.scaling.attn_factor"] = gain
    return keys, divisors


def _is_plain_yarn(rope: Mapping[str, object]) -> bool:
    """Whether it is said by what llama.cpp reads; its betas are 32 and 1 and bounds are rounded."""
    known = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    for name, value in rope.items():
        if name not in _PLAIN_YARN and known.get(name) != value:
            return False
    return float(str(rope["factor"])) > 1
