"""What published drafters' folders are made of, at toy size: each publisher's keys where they put
them, and tensors under their names. Nothing here is made by the code that reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from conftest import MASK, VOCAB
from torch import Tensor
from toy_folders import HIDDEN, ZLAB, zlab_tensors

RANK = 6
STATES = 10
GROUP_SIZE = 8
KEPT = (3, 9, 20, 41, 59)  # tokens of reduced vocabularies

Config = dict[str, Any]
Tensors = dict[str, Tensor]


# --- Tensors, written out by hand


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.3).bfloat16()


def convolutions() -> Tensors:
    groups = HIDDEN // GROUP_SIZE
    tensors = {}
    for i in range(2):
        for name in ("attention_conv", "mlp_conv"):
            place = f"layers.{i}.{name}"
            tensors[f"{place}.base_kernel"] = noise((2, 2, HIDDEN), 10 + i)
            tensors[f"{place}.kernel_projection.weight"] = noise((2 * 2 * groups, HIDDEN), 20 + i)
    return tensors


def selector(*, suffix: str = "") -> Tensors:
    return {
        f"candidate_selector.predecessor_codebook{suffix}": noise((VOCAB, RANK), 30),
        f"candidate_selector.successor_codebook{suffix}": noise((VOCAB, RANK), 31),
        "candidate_selector.hidden_projection.weight": noise((RANK, HIDDEN), 32),
    }


def markov(kind: str = "vanilla", *, num_drafts: int = VOCAB) -> Tensors:
    tensors = {
        "markov_head.markov_w1.weight": noise((VOCAB, RANK), 40),
        "markov_head.markov_w2.weight": noise((num_drafts, RANK), 41),
    }
    if kind == "gated":
        tensors["markov_head.gate_proj.weight"] = noise((RANK, HIDDEN + RANK), 42)
        tensors["markov_head.gate_proj.bias"] = noise((RANK,), 43)
    if kind == "rnn":
        tensors["markov_head.joint_proj.weight"] = noise((3 * RANK, 2 * RANK + HIDDEN), 44)
        tensors["markov_head.joint_proj.bias"] = noise((3 * RANK,), 45)
    return tensors


def confidence(*, with_markov: bool = True) -> Tensors:
    width = HIDDEN + RANK if with_markov else HIDDEN
    return {
        "confidence_head.proj.weight": noise((1, width), 50),
        "confidence_head.proj.bias": noise((1,), 51),
    }


def gru() -> Tensors:
    return {
        "prefix_gru.weight_ih_l0": noise((3 * STATES, HIDDEN), 60),
        "prefix_gru.weight_hh_l0": noise((3 * STATES, STATES), 61),
        "embed_proj.0.weight": noise((RANK, HIDDEN + STATES), 62),
        "embed_proj.2.weight": noise((VOCAB, RANK), 63),
    }


def vocabulary() -> Tensors:
    kept = torch.tensor(KEPT)
    return {
        "d2t": kept - torch.arange(len(KEPT)),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True),
        "lm_head.weight": noise((len(KEPT), HIDDEN), 70),
    }


def copies() -> Tensors:
    return {
        "embed_tokens.weight": noise((VOCAB, HIDDEN), 71),
        "lm_head.weight": noise((VOCAB, HIDDEN), 72),
    }


V1 = zlab_tensors()
BIASES = {}
for _i in range(2):
    for _name, _rows in (("q", 64), ("k", 32), ("v", 32), ("o", HIDDEN)):
        BIASES[f"layers.{_i}.self_attn.{_name}_proj.bias"] = noise((_rows,), 80 + _i)


# --- Configs


def config(**changes: Any) -> Config:
    """z-lab's, with changes at the top; `...` takes a key away."""
    return {name: value for name, value in {**ZLAB, **changes}.items() if value is not ...}


def nested(**changes: Any) -> Config:
    """The same, with changes in dflash_config."""
    return config(dflash_config={**ZLAB["dflash_config"], **changes})


DFLASH2 = {
    "conv_kernel_size": 2,
    "conv_group_size": GROUP_SIZE,
    "selector_rank": RANK,
    "selector_top_k": 5,
}
TWO_KINDS = ["sliding_attention", "full_attention"]


def dflash2(architecture: str = "DFlash2DraftModel", **changes: Any) -> Config:
    """z-lab's DFlash 2: block_size is nested, theta in rope_parameters."""
    return config(
        architectures=[architecture],
        block_size=...,
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        dflash_config={**ZLAB["dflash_config"], "block_size": 4, **DFLASH2},
        **changes,
    )


def deepspec(**changes: Any) -> Config:
    """DeepSpec's: a copy of the target's config with all keys at the top."""
    given = {
        "architectures": ["Qwen3DSparkModel"],
        "auto_map": ...,
        "dflash_config": ...,
        "block_size": 3,
        "mask_token_id": MASK,
        "target_layer_ids": [1, 2],
        "num_anchors": 512,
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "max_window_layers": 28,
    }
    return config(**{**given, **changes})


def specforge(architecture: str = "DSparkDraftModel", **changes: Any) -> Config:
    """SpecForge's DSpark: everything in dflash_config."""
    special = {
        **ZLAB["dflash_config"],
        "projector_type": "dspark",
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "attention_mode": "gqa",
    }
    changed = {**special, **changes.pop("dflash_config", {})}
    return config(architectures=[architecture], block_size=3, dflash_config=changed, **changes)


def domino(architecture: str = "DFlashDraftModel", **changes: Any) -> Config:
    special = {
        "projector_type": "domino",
        "shift_label": True,
        "pure_draft_prefix_len": 1,
        "gru_hidden_dim": STATES,
        "emb_dim": RANK,
        **changes,
    }
    return nested(**special) | {"architectures": [architecture], "emb_dim": RANK}


LAYERS: Config = {  # a transformer_layer_config, as far as it differs from Qwen3Config's defaults
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
}


def speculators(
    kind: str = "dflash", *, tokens: int = 3, layers: Config | None = None, **changes: Any
) -> Config:
    """The wrapper; `...` takes a key away."""
    class_name = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel"}
    shape = {**LAYERS, **(layers or {})}
    given: Config = {
        "architectures": [class_name.get(kind, "DSparkDraftModel")],
        "auto_map": {"": "config.SpeculatorConfig"},
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": {n: v for n, v in shape.items() if v is not ...},
        "draft_vocab_size": VOCAB,
        "block_size": 4,
        "mask_token_id": MASK,
        "aux_hidden_state_layer_ids": [2, 3],
        "sliding_window_non_causal": False,
        "sample_from_anchor": False,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **changes,
    }
    return {name: value for name, value in given.items() if value is not ...}


DSPARK = {
    "markov_rank": RANK,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}


def renamed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


MASK_ROW = noise((HIDDEN,), 90)
FULL_MARKOV = V1 | markov() | confidence()
FULL_DFLASH2 = V1 | convolutions() | selector()
