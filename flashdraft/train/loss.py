"""From the states of a batch's blocks to the loss that is minimised: the draft softmax, soft labels, a sequential head.

Knows the target's lm_head and which tokens are drafted; does not know optimizers, steps' order or files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.target import Target
from flashdraft.train.batch import Batch
from flashdraft.train.features import Data
from flashdraft.train.objectives import chunked_loss, position_weights, row_loss

__all__ = ["Loss", "accuracy", "common_tokens"]

_CHUNK = 1024  # rows whose logits are alive at a time


class Loss:
    """A network's loss against one target. `vocabulary`: the drafted tokens [n], ascending."""

    def __init__(self, model: DFlashDraftModel, target: Target, vocabulary: Tensor, config: Any, device: torch.device) -> None:
        self.model, self.target, self.config = model, target, config
        self.vocabulary = vocabulary.to(device)
        self.head = target.head_weight(torch.arange(target.vocab_size)).to(device)

    def weight(self, batch: Batch) -> float:
        """What the loss of a micro-batch is divided by: known before the pass, so that micro-batches join exactly."""
        offsets = batch.offsets[batch.labels >= 0]
        if self.config.weights == "dpace":
            return float(len(offsets))
        return float(torch.exp(-(offsets.double() - 1) / self.config.gamma).sum())

    def __call__(self, states: Tensor, batch: Batch, step: int) -> tuple[Tensor, float, dict[str, Tensor]]:
        """The weighted sum over a micro-batch: a scalar to go back from, its value, and `hit`, `loss`, `row` of labelled rows."""
        c, size = self.config, self.model.config.block_size
        wanted = (batch.labels >= 0).nonzero()[:, 0]
        blocks = wanted // size
        candidates, labels, drafted = self._candidates(batch.labels[wanted], step)
        weight, sequential = self.head[candidates].to(states.dtype), self.model.sequential_head
        shares, final = {"ce": 1.0 - c.kl - c.tv, "kl": c.kl, "tv": c.tv}, batch.final if c.kl + c.tv else None

        def part(rows: Tensor, chunk: slice) -> tuple[Tensor, dict[str, Tensor]]:
            bias = None
            if sequential is not None:
                before = batch.previous[wanted[chunk]]
                rows, bias = sequential.correct(rows, self.target.embed(before)), sequential.bias(before)
            logits = F.linear(rows, weight).float()
            logits = logits if bias is None else logits.index_add(1, drafted, bias.float())
            theirs = None if final is None else F.linear(final[wanted[chunk]].to(weight.dtype), weight).float()
            losses: Any = sum(s * row_loss(kind, logits, labels[chunk], theirs) for kind, s in shares.items() if s)
            log_q = -F.cross_entropy(logits.detach(), labels[chunk], reduction="none")
            weights = position_weights(c.weights, log_q, batch.offsets[wanted[chunk]], blocks[chunk], gamma=c.gamma)
            hit = (logits.detach().argmax(-1) == labels[chunk]).float()
            return (losses * weights).sum(), {"hit": hit, "loss": losses.detach(), "row": wanted[chunk]}

        edges = torch.arange(0, int(blocks[-1]) + 1, max(1, _CHUNK // size), device=blocks.device)
        starts = [*torch.searchsorted(blocks, edges).tolist(), len(wanted)]
        chunks = [slice(a, b) for a, b in itertools.pairwise(starts) if a < b]
        parameters = [] if sequential is None else list(sequential.parameters())
        return chunked_loss(states[wanted], parameters, chunks, part)

    def _candidates(self, labels: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids in this step's softmax, labels as indices into them (a rare one is always among them), and the drafted ones'."""
        vocabulary = self.vocabulary
        if len(vocabulary) == self.target.vocab_size:
            return vocabulary, labels, vocabulary
        generator = torch.Generator().manual_seed(self.config.seed * 104_729 + step)
        others = torch.randint(self.target.vocab_size, (self.config.negatives,), generator=generator).to(labels.device)
        candidates = torch.cat((vocabulary, others, labels)).unique()
        return candidates, torch.searchsorted(candidates, labels), torch.searchsorted(candidates, vocabulary)


def common_tokens(data: Data, count: int) -> tuple[Tensor, float]:
    """The commonest tokens of all answers, ascending, and the share of the answers that they cover."""
    counts = Counter(t for i in range(len(data)) for t in data.answer_tokens(i))
    common = sorted(token for token, _ in counts.most_common(count))
    return torch.tensor(common), sum(counts[token] for token in common) / max(1, sum(counts.values()))


def accuracy(hits: Tensor, size: int) -> dict[str, Any]:
    """hits: [n, 2], hit and offset of the labelled rows, blocks in order -> accuracy by offset, expected accepted length."""
    hit, offset = hits[:, 0], hits[:, 1].long()
    block = (offset == 1).cumsum(0) - 1
    grid = hits.new_zeros(int(block[-1]) + 1, size - 1)
    grid[block, offset - 1] = hit
    here = (hit[offset == k] for k in range(1, size))
    accuracy = [round(float(h.mean()), 4) if len(h) else None for h in here]  # JSON has no NaN
    return {"accuracy": accuracy, "accepted": round(float(grid.cumprod(1).sum(1).mean()) + 1, 4)}
