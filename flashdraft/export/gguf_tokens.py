"""A target's tokenizer -> the keys under which a GGUF file has it.

A drafter's file needs them for the number of tokens and for the mask token: llama.cpp writes and
reads texts by the target's own file. Knows tokenizers and GGUF's keys; does not know drafters.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from gguf import GGUFWriter, TokenType

from flashdraft.errors import CheckpointError
from flashdraft.export.order import TargetShape
from flashdraft.pretrained import Source, read_tokenizer

__all__ = ["Tokens", "read_tokens"]

_BYTE_LEVEL = "gpt2"  # llama.cpp's names of kinds of tokenizers
_SENTENCEPIECE = "llama"
_KINDS = ("BPE", "Unigram")
_HINT = "give a target whose tokenizer is of BPE or SentencePiece"


class Tokens(NamedTuple):
    """What a GGUF file says of a tokenizer."""

    kind: str
    texts: list[str]  # as many as the target has embeddings
    types: list[int]
    merges: list[str]
    special: dict[str, int]  # ids by the key's name
    adds_bos: bool

    def write(self, writer: GGUFWriter, mask_token_id: int) -> None:
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.texts)
        writer.add_token_types(self.types)
        if self.kind == _SENTENCEPIECE:
            scores = [-float(place) for place in range(len(self.texts))]
            writer.add_token_scores(scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_mask_token_id(mask_token_id)


def read_tokens(target: TargetShape) -> Tokens:
    """Raises CheckpointError for a tokenizer that llama.cpp has no name for."""
    tokenizer: Any = read_tokenizer(Source(target.name, target.folder))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = json.loads(backend.to_str()) if backend is not None else {}
    model = written.get("model") or {}
    if model.get("type") not in _KINDS:
        got = f"the tokenizer of `{target.name}` is of {model.get('type')}"
        raise CheckpointError(f"{got}, which llama.cpp does not know", hint=_HINT)

    pieces = (written.get("pre_tokenizer"), written.get("decoder"))
    is_byte_level = "ByteLevel" in json.dumps(pieces)
    special = {}
    for name, attribute in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = getattr(tokenizer, f"{attribute}_token_id", None)
        if token is not None:
            special[name] = int(token)

    texts, types = _texts(tokenizer, target.vocab_size)
    bos = special.get("bos")
    return Tokens(
        kind=_BYTE_LEVEL if is_byte_level else _SENTENCEPIECE,
        texts=texts,
        types=types,
        merges=_merges(model.get("merges") or []) if is_byte_level else [],
        special=special,
        adds_bos=bos is not None and bos in tokenizer.encode(""),
    )


def _texts(tokenizer: Any, count: int) -> tuple[list[str], list[int]]:
    """Of every id: its text and GGUF's type of token. Ids without a text are named by their
    number."""
    texts = [f"[PAD{token}]" for token in range(count)]
    types = [int(TokenType.UNUSED)] * count
    added = tokenizer.added_tokens_decoder
    for text, token in tokenizer.get_vocab().items():
        if token >= count:  # nobody embedded it
            continue
        texts[token] = text
        if token in added:
            types[token] = int(
                TokenType.CONTROL if added[token].special else TokenType.USER_DEFINED
            )
        elif len(text) == 6 and text.startswith("<0x"):
            types[token] = int(TokenType.BYTE)
        else:
            types[token] = int(TokenType.NORMAL)
    return texts, types


def _merges(pairs: Sequence[Any]) -> list[str]:
    """Two pieces and a space between them, by which GGUF tells them apart: spaces inside are
    written as the byte-level alphabet writes them."""
    merges = []
    for pair in pairs:
        if isinstance(pair, str):
            merges.append(pair)
            continue
        first, second = pair
        merges.append(f"{first.replace(' ', 'Ġ')} {second.replace(' ', 'Ġ')}")
    return merges
