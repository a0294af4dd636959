"""The pipeline at toy size, a function a stage: prompts, the target's own answers, features; and
the shape of the drafter that learns from them.
"""

from __future__ import annotations

from pathlib import Path

from conftest import MASK, VOCAB
from toy_training import BLOCK, HIDDEN, LAYERS, language_model, write_lines

from flashdraft.formats.config import DraftConfig
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.regenerate import regenerate
from flashdraft.types import SamplingParams

PROMPTS = (
    "hello there",
    "what is it",
    "a b c",
    "zebra",
    "Quick fox",
    "sing a song",
    "why?",
    "tell me",
)
ANSWER = SamplingParams(max_new_tokens=24, ignore_eos=True)
CONFIG = DraftConfig(
    hidden_size=HIDDEN,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    block_size=BLOCK,
    mask_token_id=MASK,
    target_layer_ids=LAYERS,
    num_target_layers=4,
    max_position_embeddings=256,
)


def written_prompts(folder: Path) -> Path:
    rows = [{"source": "toy", "row": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    return write_lines(folder / "prompts.jsonl", rows)


def written_answers(folder: Path, prompts: Path) -> Path:
    out = folder / "answers.jsonl"
    assert regenerate(language_model(), prompts, out, params=ANSWER, quiet=True) == len(PROMPTS)
    return out


def written_features(folder: Path, answers: Path) -> FeatureSet:
    write_features(language_model(), [answers], folder, layers=LAYERS, max_length=128, quiet=True)
    return FeatureSet(folder)
