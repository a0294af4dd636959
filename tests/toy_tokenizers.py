"""Small tokenizers of the two common kinds: GPT-2's, of bytes, and sentencepiece's, of characters
with bytes for the rest.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<|im_end|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, from id 3 on, and a few for two of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "i"), ("\u0120", "h"), ("\u00c3", "\u00a9")]  # the last two: " h" and "\u00e9"
    names = [*SPECIALS, *letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _fast(made)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A token for a few characters and words, and one for every byte; a text gets a space in front
    and <s> before it.
    """
    pieces = ["\u2581", *"abchi\u00e9", "\u2581h", "\u2581hi"]
    merges = [("\u2581", "h"), ("\u2581h", "i")]
    names = [*SPECIALS, *pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(made)


def _fast(made: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
