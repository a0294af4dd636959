"""What the tests of training share: a toy target as a language model, a drafter's shape, random
networks and samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, MASK, VOCAB, tiny_target
from toy_folders import letter_tokenizer

from flashdraft.errors import FlashDraftError
from flashdraft.formats.config import DraftConfig
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.train.features import Sample

LAYERS, BLOCK, HIDDEN = (1, 2), 4, 32
CONFIG = DraftConfig(
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCAB,
    block_size=BLOCK,
    mask_token_id=MASK,
    target_layer_ids=LAYERS,
    num_target_layers=4,
    max_position_embeddings=256,
    layer_types=("full_attention",) * 2,
    dtype="float32",
)


def one_line_and_hint(error: pytest.ExceptionInfo[FlashDraftError]) -> str:
    """The message, after checking its form."""
    message, *hint = str(error.value).split("\n")
    assert len(hint) == 1
    assert hint[0].startswith("hint: ")
    assert len(hint[0]) > len("hint: ")
    return message


def language_model(dtype: torch.dtype = torch.float32) -> Model:
    target = tiny_target("llama", lean=True, dtype=dtype)
    return Model(target, letter_tokenizer(), Autoregressive, eos=frozenset({EOS}), max_rows=8)


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def network(seed: int = 0, **changes: Any) -> DFlashDraftModel:
    """A network of random weights that are large enough for everything to matter; `changes` are
    fields of its config.
    """
    torch.manual_seed(seed)
    model = DFlashDraftModel(replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model


def toy_sample(length: int, num_prompt: int, seed: int, *, final: bool = False) -> Sample:
    """Random tokens and features of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, MASK, (length,), generator=generator)
    features = torch.randn(length, 2 * HIDDEN, generator=generator)
    return Sample(
        tokens,
        features,
        num_prompt,
        torch.randn(length, HIDDEN, generator=generator) if final else None,
    )
