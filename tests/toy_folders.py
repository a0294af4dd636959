"""Tiny models as folders on disk, as a user would hand them over: a llama with its tokenizer, and a
drafter in z-lab's format.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from conftest import EOS, MASK, VOCAB, tiny_model
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

LETTERS = string.ascii_letters + " .,?!"  # one token each, from id 3 on
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
NUM_TARGET_LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 4, 32, 48, 4, 2, 16
ZLAB: dict[str, Any] = {  # a published drafter's config.json, at toy size
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 4,
    "bos_token_id": 1,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [1, 2]},
    "dtype": "bfloat16",
    "eos_token_id": EOS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "num_key_value_heads": KV_HEADS,
    "num_target_layers": NUM_TARGET_LAYERS,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}


def letter_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One letter a token; ids 0 to 2 and the last one are special."""
    vocabulary = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", *LETTERS, "<mask>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )
    fast.chat_template = CHAT if chat else None
    return fast


def save_target(
    folder: Path, *, chat: bool = True, dtype: torch.dtype = torch.float32, model: Any = None
) -> Path:
    """A random llama and the letters' tokenizer."""
    (model or tiny_model("llama", dtype=dtype)).save_pretrained(folder)
    letter_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def zlab_tensors(*, num_layers: int = 2, num_features: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a published drafter by its name, written out by hand; bfloat16."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (q, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, q),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }
    shapes = {
        "fc.weight": (HIDDEN, num_features * HIDDEN),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
    }
    shapes |= {
        f"layers.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()
    }
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return {name: (1 + t if t.ndim == 1 else t).bfloat16() for name, t in noise.items()}


def save_zlab(
    folder: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> Path:
    """A drafter's folder, not written by our code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ZLAB if config is None else config))
    save_file(
        zlab_tensors() if tensors is None else tensors,
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
