"""A tiny llama as a GGUF file, written key by key, and an empty cache folder for what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flashdraft.errors import FlashDraftError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "he", "ll", "hell", "hello", "12"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]
FACTS = {"block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96}
HEADS, KV_HEADS = 4, 2


def empty_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a cache that holds nothing, ours and the hub client's; nothing is fetched."""
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder / "cache"


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    """A random llama whose embedding is exact in Q8_0."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    q8 = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(embedding.numpy(), q8), q8)))
    return model


def paired(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama GGUF files hold them: rotary pairs side by side, spelt out row by row."""
    size = weight.shape[0] // heads
    rows = [
        head * size + half * size // 2 + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return np.ascontiguousarray(weight[rows])


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    permute: bool = True,
    pre: str = "smollm",
    leave_out: str = "",
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in FACTS.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    edit(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        target, weight = names.get_name(name, try_suffixes=(".weight",)), tensor.numpy()
        assert target is not None
        if target == leave_out or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if permute and ("q_proj" in name or "k_proj" in name):
            weight = paired(weight, HEADS if "q_proj" in name else KV_HEADS)
        quantised = name == "model.embed_tokens.weight"
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            target,
            gguf.quantize(weight, q8) if quantised else weight,
            raw_dtype=q8 if quantised else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(40).view(2, 20)).logits)


def built(cache: Path) -> list[str]:
    """What lies in the cache, the lock aside."""
    return (
        sorted(path.name for path in cache.glob("*") if path.name != ".flashdraft.lock")
        if cache.exists()
        else []
    )


def check_error(error: FlashDraftError, *words: str) -> None:
    message, hint = str(error.args[0]), error.hint
    assert "\n" not in message
    assert hint
    assert "\n" not in hint
    for word in words:
        assert word in str(error)
