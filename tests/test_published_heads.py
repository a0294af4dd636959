"""Published sequential heads and block layouts: what they draft, against slow definitions of their
own, and that no text of the target changes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import CONFIG, network

from flashdraft.methods.dflash import DFlashDraftModel

RANK = 5
HEADS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "selector": {"head_choices": 6},
    "markov": {},
    "markov_gated": {},
    "markov_rnn": {},
    "domino": {"head_states": 7},
}


def model_with(kind: str, *, seed: int = 0, **changes: Any) -> DFlashDraftModel:
    """A random network whose head has weights that matter."""
    fields = {"sequential_head": kind, "head_rank": RANK, **HEADS[kind], **changes}
    return network(seed, **fields)


# Modules and files.


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("confidence", [(False, False), (True, False), (True, True)])
def test_modules_are_those_of_the_config(kind: str, confidence: tuple[bool, bool]) -> None:
    head, markov = confidence
    model = model_with(kind, confidence_head=head, confidence_with_markov=markov)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == model.config.shapes()


@pytest.mark.parametrize("kind", HEADS)
def test_published_heads_survive_saving(tmp_path: Path, kind: str) -> None:
    model = model_with(
        kind, anchor_first=True, confidence_head=True, confidence_with_markov=kind != "swiglu"
    )
    model.save_pretrained(tmp_path)
    read = DFlashDraftModel.from_pretrained(tmp_path)
    assert read.config == model.config
    ours, theirs = model.state_dict(), read.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    model.save_pretrained(tmp_path / "plain", plain=True)
    plain = DFlashDraftModel.from_pretrained(tmp_path / "plain")
    assert plain.config == replace(CONFIG, anchor_first=True)
