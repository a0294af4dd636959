"""Any family trains: the drafter overfits eight samples of a toy target and is accepted on them
when it decodes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import EOS, FAMILIES, MASK, tiny_target
from toy_folders import letter_tokenizer

from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDrafter, PackedDraft
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import FeatureSet, write_features
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.train.regenerate import regenerate
from flashdraft.train.trainer import Trainer
from flashdraft.types import SamplingParams

PROMPTS = (
    "hello there",
    "a",
    "what is it?",
    "zebra",
    "Quick brown fox",
    "numbers",
    "no",
    "Why not?",
)
ANSWER = SamplingParams(max_new_tokens=24, ignore_eos=True)
SETTINGS = TrainConfig(
    steps=90, sequences=8, anchors=24, lr=1e-2, weight_decay=0.0, vocab=0, precision="fp32"
)
BLOCK = 4


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral-sliding"])
def test_drafter_of_this_family_overfits_and_is_accepted(tmp_path: Path, family: str) -> None:
    target = tiny_target(family, dtype=torch.float32)
    lm = Model(target, letter_tokenizer(), Autoregressive, eos=frozenset({EOS}), max_rows=8)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"source": "toy", "row": n, "prompt": p}) + "\n"
            for n, p in enumerate(PROMPTS)
        )
    )
    assert regenerate(lm, prompts, tmp_path / "answers.jsonl", params=ANSWER, quiet=True) == 8
    config = draft_config(
        target, num_layers=2, block_size=BLOCK, num_features=1, mask_token_id=MASK
    )
    write_features(
        lm,
        [tmp_path / "answers.jsonl"],
        tmp_path / "features",
        layers=config.target_layer_ids,
        max_length=64,
        quiet=True,
    )
    trainer = Trainer(
        random_weights(config, 0), lm, FeatureSet(tmp_path / "features"), tmp_path / "run", SETTINGS
    )

    def tau() -> float:
        network = PackedDraft(trainer.model.eval(), target)
        drafting = Model(
            target, lm.tokenizer, lambda: DFlashDrafter(network), eos=lm.eos, max_rows=8
        )
        plain, drafted = (
            lm.generate(list(PROMPTS), ANSWER),
            drafting.generate(list(PROMPTS), ANSWER),
        )
        assert [result.tokens for result in drafted] == [result.tokens for result in plain]
        return float(sum(result.stats.tau for result in drafted) / len(drafted))

    untrained = tau()
    trainer.model.train()
    for _ in range(SETTINGS.steps):
        trainer.train_step()
    assert untrained < BLOCK / 2 < tau()
