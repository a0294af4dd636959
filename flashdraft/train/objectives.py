"""The losses of a draft network, and only here: functions of tensors, and `Loss`, which knows the target's lm_head.

Does not know optimizers, files or the order of the steps.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.methods.network import DraftNetwork
from flashdraft.models.target import Target
from flashdraft.process import INTS
from flashdraft.train.batch import Batch
from flashdraft.train.features import Data

__all__ = ["Loss", "accuracy", "chunked_loss", "common_tokens", "position_weights", "row_loss"]

_CHUNK = 1024  # rows whose logits are alive at a time
Figures = dict[str, Tensor]


def position_weights(
    kind: str, log_q: Tensor, offsets: Tensor, blocks: Tensor, *, gamma: float
) -> Tensor:
    """Weight of every row: `decay` exp(-(k - 1) / gamma) at offset k (2602.06036, section 4), or `dpace` (2605.18810).

    D-PACE: with q_i the probability of the label at offset i, softened to (1 + q_i) / 2, w_j is the sum over m >= j of the
    product of the first m: what position j adds to the expected accepted length.
    log_q: [n] of the labels, detached; offsets: [n], 1 at the first masked position; blocks: [n] which block, ascending.
    """
    if kind == "decay":
        return torch.exp(-(offsets.to(log_q.dtype) - 1) / gamma)
    _, at = blocks.unique_consecutive(return_inverse=True)
    grid = log_q.new_full(
        (int(at[-1]) + 1 if len(at) else 0, int(offsets.max()) if len(at) else 0), -torch.inf
    )
    grid[at, offsets - 1] = log_q
    survival = (0.5 + 0.5 * grid.exp()).cumprod(1) * (grid > -torch.inf)
    return survival.flip(1).cumsum(1).flip(1)[at, offsets - 1]


def row_loss(kind: str, logits: Tensor, labels: Tensor, target_logits: Tensor | None) -> Tensor:
    """[n]: `ce` against the label, or `kl` and `tv` (total variation) between the target's law over these columns and ours."""
    if kind == "ce":
        return F.cross_entropy(logits, labels, reduction="none")
    assert target_logits is not None
    law = target_logits.softmax(-1)
    if kind == "kl":
        return F.kl_div(logits.log_softmax(-1), law, reduction="none").sum(-1)
    return 0.5 * (logits.softmax(-1) - law).abs().sum(-1)


def chunked_loss(
    states: Tensor,
    parameters: Sequence[Tensor],
    chunks: Sequence[slice],
    part: Callable[[Tensor, slice], tuple[Tensor, Figures]],
) -> tuple[Tensor, float, Figures]:
    """The sum of part(states[chunk], chunk) with the logits of one chunk alive at a time.

    Each chunk's gradient with respect to its states [n, hidden] and to `parameters` (a head's) is taken at once. Returns a
    scalar whose gradients are those of the sum, the sum itself, and the parts' figures, joined along their first dimension.
    """
    grads = [torch.zeros_like(x) for x in (states, *parameters)]
    total, figures = 0.0, []
    for chunk in chunks:
        leaf = states[chunk].detach().requires_grad_()
        with torch.enable_grad():
            loss, figure = part(leaf, chunk)
        grads[0][chunk], *others = torch.autograd.grad(
            loss, (leaf, *parameters), materialize_grads=True
        )
        for sum_, grad in zip(grads[1:], others, strict=True):
            sum_ += grad
        total += float(loss.detach())
        figures.append(figure)
    surrogate: Any = sum(
        (x * grad).sum() for x, grad in zip((states, *parameters), grads, strict=True)
    )
    joined = {
        name: torch.cat([f[name] for f in figures]) for name in (figures[0] if figures else {})
    }
    return surrogate, total, joined


class Loss:
    """A network's loss against one target. `vocabulary`: the drafted tokens [n], ascending."""

    def __init__(
        self,
        model: DraftNetwork,
        target: Target,
        vocabulary: Tensor,
        config: Any,
        device: torch.device,
    ) -> None:
        self.model, self.target, self.config = model, target, config
        self.vocabulary = vocabulary.to(device)
        self.head = target.head_weight(torch.arange(target.vocab_size, **INTS)).to(device)

    def weight(self, batch: Batch) -> float:
        """What the loss of a micro-batch is divided by: known before the pass, so that micro-batches join exactly."""
        offsets = batch.offsets[batch.labels >= 0]
        if self.config.weights == "dpace":
            return float(len(offsets))
        return float(torch.exp(-(offsets.double() - 1) / self.config.gamma).sum())

    def __call__(self, states: Tensor, batch: Batch, step: int) -> tuple[Tensor, float, Figures]:
        """The weighted sum over a micro-batch: a scalar to go back from, its value, and `hit`, `loss`, `row` of labelled rows."""
        c, size = self.config, self.model.config.block_size
        wanted = (batch.labels >= 0).nonzero()[:, 0]
        blocks = wanted // size
        candidates, labels = self._candidates(batch.labels[wanted], step)
        weight, sequential = self.head[candidates].to(states.dtype), self.model.sequential_head
        shares, final = (
            {"ce": 1.0 - c.kl - c.tv, "kl": c.kl, "tv": c.tv},
            batch.final if c.kl + c.tv else None,
        )

        def part(rows: Tensor, chunk: slice) -> tuple[Tensor, Figures]:
            if sequential is not None:
                rows = sequential(rows, self.target.embed(batch.previous[wanted[chunk]]))
            logits = F.linear(rows, weight).float()
            theirs = (
                None
                if final is None
                else F.linear(final[wanted[chunk]].to(weight.dtype), weight).float()
            )
            losses: Any = sum(
                s * row_loss(kind, logits, labels[chunk], theirs) for kind, s in shares.items() if s
            )
            log_q = -F.cross_entropy(logits.detach(), labels[chunk], reduction="none")
            weights = position_weights(
                c.weights, log_q, batch.offsets[wanted[chunk]], blocks[chunk], gamma=c.gamma
            )
            hit = (logits.detach().argmax(-1) == labels[chunk]).float()
            return (losses * weights).sum(), {
                "hit": hit,
                "loss": losses.detach(),
                "row": wanted[chunk],
            }

        edges = torch.arange(
            0, int(blocks[-1]) + 1, max(1, _CHUNK // size), dtype=torch.int64, device=blocks.device
        )
        starts = [*torch.searchsorted(blocks, edges).tolist(), len(wanted)]
        chunks = [slice(a, b) for a, b in itertools.pairwise(starts) if a < b]
        parameters = [] if sequential is None else list(sequential.parameters())
        return chunked_loss(states[wanted], parameters, chunks, part)

    def _candidates(self, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Ids in this step's softmax, and labels as indices into them; a rare one is always among them."""
        vocabulary = self.vocabulary
        if len(vocabulary) == self.target.vocab_size:
            return vocabulary, labels
        generator = torch.Generator("cpu").manual_seed((self.config.seed * 104_729 + step) % 2**64)
        others = torch.randint(
            self.target.vocab_size, (self.config.negatives,), generator=generator, **INTS
        ).to(labels.device)
        candidates = torch.cat((vocabulary, others, labels)).unique()
        return candidates, torch.searchsorted(candidates, labels)


def common_tokens(data: Data, count: int) -> tuple[Tensor, float]:
    """The commonest tokens of all answers, ascending, and the share of the answers that they cover."""
    counts = Counter(t for i in range(len(data)) for t in data.answer_tokens(i))
    common = sorted(token for token, _ in counts.most_common(count))
    return torch.tensor(common, **INTS), sum(counts[token] for token in common) / max(
        1, sum(counts.values())
    )


def accuracy(hits: Tensor, size: int) -> dict[str, Any]:
    """hits: [n, 2], hit and offset of the labelled rows, blocks in order -> accuracy by offset, expected accepted length."""
    hit, offset = hits[:, 0], hits[:, 1].long()
    block = (offset == 1).cumsum(0) - 1
    grid = hits.new_zeros(int(block[-1]) + 1, size - 1)
    grid[block, offset - 1] = hit
    here = (hit[offset == k] for k in range(1, size))
    accuracy = [round(float(h.mean()), 4) if len(h) else None for h in here]  # JSON has no NaN
    return {"accuracy": accuracy, "accepted": round(float(grid.cumprod(1).sum(1).mean()) + 1, 4)}
