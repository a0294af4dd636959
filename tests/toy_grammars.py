"""A tokenizer of bytes with a few merges, and a tiny target for it, whose vocabulary is padded."""

from __future__ import annotations

import functools

from conftest import SHAPE, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flashdraft.models.hf import HFTarget
from flashdraft.models.target import Target

SPECIAL = ("<s>", "</s>", "<|end|>")
START, END, TURN_END = range(3)
MERGES = [("a", "g"), ("ag", "e"), ('"', ":"), ("t", "r"), ("tr", "u"), ("tru", "e"), ('"', ",")]
PADDED = 272  # the target's vocabulary: some ids more than the tokenizer has


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    names = [*SPECIAL, *bytes_to_unicode().values(), *["".join(pair) for pair in MERGES]]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|end|>"],
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def byte_target() -> Target:
    config = LlamaConfig(**{**SHAPE, "vocab_size": PADDED})
    return HFTarget(tiny_model("", config=config), "bytes")
