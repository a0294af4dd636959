"""Which tensors a drafter's files hold, by name, with their shapes.

Knows published names. Does not know files, nor what the tensors are for.
"""

from collections.abc import Mapping

from flashdraft.formats.config import DraftConfig
from flashdraft.formats.eagle3 import eagle3_shapes
from flashdraft.formats.weights import Shape

__all__ = ["tensor_shapes"]


def tensor_shapes(config: DraftConfig) -> dict[str, Shape]:
    """Every tensor that the file must hold, with its shape."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {}
    if config.method == "medusa":
        for head in range(config.block_size - 1):
            shapes[f"heads.{head}.weight"] = (hidden, hidden)
            shapes[f"heads.{head}.bias"] = (hidden,)
        return shapes

    if config.method == "eagle3":
        return eagle3_shapes(config)

    layer = _layer_shapes(config)
    for index in range(config.num_hidden_layers):
        for name, shape in layer.items():
            shapes[f"layers.{index}.{name}"] = shape
    shapes["norm.weight"] = (hidden,)
    if config.method == "draft_model":
        return shapes

    shapes["fc.weight"] = (hidden, config.num_features * hidden)
    shapes["hidden_norm.weight"] = (hidden,)
    shapes |= _convolution_shapes(config)
    shapes |= _head_shapes(config)
    return shapes


def _convolution_shapes(config: DraftConfig) -> dict[str, Shape]:
    """DFlash 2's, two a layer: around the attention and around the MLP."""
    taps = config.conv_kernel_size
    if not taps:
        return {}

    groups = config.hidden_size // config.conv_group_size
    shapes: dict[str, Shape] = {}
    for index in range(config.num_hidden_layers):
        for name in ("attention_conv", "mlp_conv"):
            place = f"layers.{index}.{name}"
            shapes[f"{place}.base_kernel"] = (2, taps, config.hidden_size)
            shapes[f"{place}.kernel_projection.weight"] = (2 * taps * groups, config.hidden_size)
    return shapes


def _head_shapes(config: DraftConfig) -> dict[str, Shape]:
    """The sequential head's under the names of its format, and the confidence head's."""
    kind = config.sequential_head
    hidden = config.hidden_size
    rank = config.head_rank
    vocab_size = config.vocab_size
    shapes: dict[str, Shape] = {}
    if kind == "swiglu":
        shapes["sequential_head.gate_up.weight"] = (2 * rank, 2 * hidden)
        shapes["sequential_head.down.weight"] = (hidden, rank)
    elif kind == "selector":
        shapes["candidate_selector.predecessor_codebook"] = (vocab_size, rank)
        shapes["candidate_selector.successor_codebook"] = (vocab_size, rank)
        shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
    elif kind in ("markov", "markov_gated", "markov_rnn"):
        shapes["markov_head.markov_w1.weight"] = (vocab_size, rank)
        shapes["markov_head.markov_w2.weight"] = (config.draft_vocab_size or vocab_size, rank)
    elif kind == "domino":
        states = config.head_states
        shapes["prefix_gru.weight_ih_l0"] = (3 * states, hidden)
        shapes["prefix_gru.weight_hh_l0"] = (3 * states, states)
        shapes["embed_proj.0.weight"] = (rank, hidden + states)
        shapes["embed_proj.2.weight"] = (vocab_size, rank)
    if kind == "markov_gated":
        shapes["markov_head.gate_proj.weight"] = (rank, hidden + rank)
        shapes["markov_head.gate_proj.bias"] = (rank,)
    if kind == "markov_rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + hidden)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if config.confidence_head:
        width = hidden + rank if config.confidence_with_markov else hidden
        shapes["confidence_head.proj.weight"] = (1, width)
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes


def _layer_shapes(config: DraftConfig) -> Mapping[str, Shape]:
    """The tensors of one decoder layer."""
    hidden = config.hidden_size
    inner = config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim

    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if config.attention_bias:
        shapes["self_attn.q_proj.bias"] = (queries,)
        shapes["self_attn.k_proj.bias"] = (keys,)
        shapes["self_attn.v_proj.bias"] = (keys,)
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = (inner, hidden)
    shapes["mlp.up_proj.weight"] = (inner, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    shapes["input_layernorm.weight"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if config.method == "dflash":
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes
