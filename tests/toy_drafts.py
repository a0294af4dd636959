"""What the tests of drafters' folders share: configs and tensors with changes, a reduced
vocabulary, and everything that a drafter proposes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB
from safetensors import safe_open
from torch import Tensor
from toy_folders import HIDDEN, ZLAB, zlab_tensors

import flashdraft
from flashdraft import DFlashDraftModel
from flashdraft.methods.dflash import DFlashDrafter, PackedDraft
from flashdraft.models.lean import LeanTarget
from flashdraft.types import Rows, SamplingParams

# A reduced vocabulary: draft id i is the target's token i + d2t[i].
KEPT = (3, 9, 20, 41, 59)


def config(**changes: Any) -> dict[str, Any]:
    """The published config.json with changes; a value of `...` removes the key."""
    return {name: value for name, value in {**ZLAB, **changes}.items() if value is not ...}


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


def reduced(*, own_head: bool) -> dict[str, Tensor]:
    kept = torch.tensor(KEPT)
    extra = {
        "d2t": kept - torch.arange(len(KEPT)),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True),
    }
    if own_head:
        extra["lm_head.weight"] = torch.randn(
            len(KEPT), HIDDEN, generator=torch.Generator().manual_seed(5)
        ).bfloat16()
    return {**zlab_tensors(), **extra}


def target_of(folder: Path) -> LeanTarget:
    target = flashdraft.load(folder, draft="autoregressive", dtype="float64").target
    assert isinstance(target, LeanTarget)
    return target


def proposals(model: DFlashDraftModel, target: LeanTarget) -> list[int]:
    """Everything drafted behind 40 anchors, one after the other, with random features."""
    drafter = DFlashDrafter(PackedDraft(model, target))
    generator = torch.Generator().manual_seed(2)
    history, drafted = [1], []
    for token in torch.randint(3, 60, (40,), generator=generator).tolist():
        features = torch.randn(1, 2 * HIDDEN, generator=generator, dtype=torch.float64)
        drafter.observe(
            Rows([0], [history], [SamplingParams()], [1]), [torch.tensor(history[-1:])], [features]
        )
        history.append(token)
        drafted += (
            drafter.propose(Rows([0], [history], [SamplingParams()], [1]), 8).tokens[0, 1:].tolist()
        )
    return drafted
