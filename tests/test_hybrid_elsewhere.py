"""Layers with a running state on a device that is not the CPU: what a read sends there, and that it
waits for no answer.
"""

from __future__ import annotations

from typing import Any

import elsewhere
import pytest
import torch
from conftest import tiny_model
from elsewhere import Elsewhere, moved
from torch import Tensor

from flashdraft.models import states
from flashdraft.models.hf import HFTarget

TEXT = torch.arange(20, 33)
PARENTS = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]])
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def read_twice(target: HFTarget) -> tuple[Tensor, Any]:
    """Two rows' drafts, with a chain kept between them."""
    cache = target.new_cache(2, 128)
    for row in (0, 1):
        target.prefill(cache, row, TEXT + row, ())
    for _ in range(2):
        sizes = torch.tensor([4, 4])
        logits, _ = target.forward(cache, [0, 1], TOKENS, PARENTS, sizes, ())
        for row in (0, 1):
            cache.keep(row, [0, 1])
    return logits, cache


def test_a_read_elsewhere_sends_its_indices_once_and_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted, _ = read_twice(HFTarget(tiny_model("lfm2"), "lfm2"))
    sent: list[str] = []
    asked: list[str] = []
    run, mix, keep = elsewhere.run, states.Walk.mix, states.Running.keep
    watched = []

    def watching(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = run(func, args, kwargs)
        name = str(func)
        if watched:
            leaves = elsewhere.tree_leaves((args, kwargs))
            from_there = any(isinstance(leaf, elsewhere._There) for leaf in leaves)
            if from_there and ("item" in name or "nonzero" in name):
                asked.append(name)
            if not from_there and name.startswith(elsewhere.COPIES):
                sent.append(name)
        return out

    def inside(method: Any) -> Any:
        def called(*given: Any) -> Any:
            watched.append(method)
            try:
                return method(*given)
            finally:
                watched.pop()

        return called

    with Elsewhere():
        target = HFTarget(moved(tiny_model("lfm2")), "lfm2")
        assert len(target._mixers) == 3
        monkeypatch.setattr(elsewhere, "run", watching)
        monkeypatch.setattr(states.Walk, "mix", inside(mix))
        monkeypatch.setattr(states.Running, "keep", inside(keep))
        logits, _ = read_twice(target)
        found = logits.cpu()
    reads = 4  # two prompts, and two of both rows
    assert len(sent) == reads * 2  # the inputs' and the outputs' places, for all three layers
    assert asked == []
    assert torch.allclose(found, wanted)
