"""The losses of a draft network, and only here.

They are functions of tensors, and `Loss`, which knows the target's lm_head. Does not know
optimizers, files or the order of the steps.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.methods.network import DraftNetwork
from flashdraft.models.target import Target
from flashdraft.process import INTS
from flashdraft.train.batch import Batch
from flashdraft.train.config import TrainConfig
from flashdraft.train.features import Data
from flashdraft.train.heads import Chosen, step_head

__all__ = [
    "Accuracy",
    "CommonTokens",
    "Loss",
    "LossSum",
    "accuracy",
    "chunked_loss",
    "common_tokens",
    "position_weights",
    "row_loss",
]

_CHUNK = 1024  # rows whose logits are alive at a time
Figures = dict[str, Tensor]  # what is told of every labelled row


class LossSum(NamedTuple):
    """A loss over many rows."""

    surrogate: Tensor  # a scalar with the gradients of the sum; its own value means nothing
    total: float  # the sum
    figures: Figures


class Accuracy(TypedDict):
    """How often a step's batch was guessed right."""

    accuracy: list[float | None]  # by offset from the anchor, from 1 on; None: no label there
    accepted: float  # expected accepted length


def position_weights(
    kind: str, log_q: Tensor, offsets: Tensor, blocks: Tensor, *, gamma: float
) -> Tensor:
    """Weight of every row: `decay` (2602.06036, section 4) or `dpace` (2605.18810).

    Decay: exp(-(k - 1) / gamma) at offset k.
    D-PACE: with q_i the probability of the label at offset i, softened to (1 + q_i) / 2, w_j is
    the sum over m >= j of the product of the first m: what position j adds to the expected
    accepted length.
    log_q: [n] of the labels, detached; offsets: [n], 1 at the first masked position; blocks: [n]
    which block, ascending.
    """
    if kind == "decay":
        return torch.exp(-(offsets.to(log_q.dtype) - 1) / gamma)
    if len(offsets) == 0:
        return log_q

    _, row = blocks.unique_consecutive(return_inverse=True)
    column = offsets - 1
    num_blocks = int(row[-1]) + 1
    grid = log_q.new_full((num_blocks, int(offsets.max())), -torch.inf)
    grid[row, column] = log_q

    has_label = grid > -torch.inf
    softened = 0.5 + 0.5 * grid.exp()
    survival = softened.cumprod(1) * has_label
    sum_from_here_on = survival.flip(1).cumsum(1).flip(1)
    return sum_from_here_on[row, column]


def row_loss(kind: str, logits: Tensor, labels: Tensor, target_logits: Tensor | None) -> Tensor:
    """The loss of every row [n].

    `ce`: against the label. `kl` and `tv` (total variation): between the target's law over these
    columns and ours.
    """
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
) -> LossSum:
    """The sum of part(states[chunk], chunk) with the logits of one chunk alive at a time.

    Each chunk's gradient with respect to its states [n, hidden] and to `parameters` (a head's) is
    taken at once; these gradients are the factors of a surrogate that is linear in both. The parts'
    figures are joined along their first dimension.
    """
    states_grad = torch.zeros_like(states)
    parameter_grads = [torch.zeros_like(parameter) for parameter in parameters]
    total = 0.0
    figures = []
    for chunk in chunks:
        leaf = states[chunk].detach().requires_grad_()
        with torch.enable_grad():
            loss, figure = part(leaf, chunk)
        states_grad[chunk], *grads = torch.autograd.grad(
            loss, (leaf, *parameters), materialize_grads=True
        )
        for sum_of_chunks, grad in zip(parameter_grads, grads, strict=True):
            sum_of_chunks += grad
        total += float(loss.detach())
        figures.append(figure)

    surrogate = (states * states_grad).sum()
    for parameter, grad in zip(parameters, parameter_grads, strict=True):
        surrogate = surrogate + (parameter * grad).sum()
    return LossSum(surrogate, total, _joined(figures))


def _joined(figures: Sequence[Figures]) -> Figures:
    if not figures:
        return {}
    joined = {}
    for name in figures[0]:
        joined[name] = torch.cat([figure[name] for figure in figures])
    return joined


class Loss:
    """A network's loss against one target. `vocabulary`: the drafted tokens [n], ascending."""

    def __init__(
        self,
        model: DraftNetwork,
        target: Target,
        vocabulary: Tensor,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.model = model
        self.target = target
        self.config = config
        self.vocabulary = vocabulary.to(device)
        self.head = target.head_weight(torch.arange(target.vocab_size, **INTS)).to(device)
        self.target_cap: float | None = getattr(target.config, "final_logit_softcapping", None)
        self.cap = model.config.final_logit_softcapping or self.target_cap
        if model.method == "draft_model":  # a llama by itself, with the target's tables
            self.cap = None

    def weight(self, batch: Batch) -> float:
        """What the loss of a micro-batch is divided by.

        It is known before the pass, so that micro-batches join exactly.
        """
        offsets = batch.offsets[batch.labels >= 0]
        if self.config.weights == "dpace":
            return float(len(offsets))
        weights = torch.exp(-(offsets.double() - 1) / self.config.gamma)
        return float(weights.sum())

    def __call__(self, states: Tensor, batch: Batch, step: int) -> LossSum:
        """The weighted sum over a micro-batch, and `hit`, `loss`, `row` of its labelled rows."""
        config = self.config
        labelled = (batch.labels >= 0).nonzero()[:, 0]
        num_rows = self.model.config.block_rows
        blocks = labelled // num_rows
        candidates, labels = self._candidates(batch.labels[labelled], step)
        lm_head = self.head[candidates].to(states.dtype)
        final = batch.final if config.kl + config.tv else None
        previous = batch.previous[labelled]
        head = step_head(self.model, self.target.embed, self.vocabulary, previous, candidates)

        def part(hidden: Tensor, chunk: slice) -> tuple[Tensor, Figures]:
            rows = labelled[chunk]
            wanted = labels[chunk]
            hidden = head.states(hidden, chunk)
            logits = _logits(hidden, lm_head, self.cap)
            target_logits = None
            if final is not None:
                target_logits = _logits(final[rows].to(lm_head.dtype), lm_head, self.target_cap)

            chosen = head.chosen(hidden, logits, wanted, chunk)
            losses = self._head_losses(chosen, target_logits)
            if chosen.columns is not None:  # that the label is among them is learned, too
                losses = losses + self._row_losses(logits, wanted, target_logits)

            law = chosen.logits.detach()
            log_q = -F.cross_entropy(law, chosen.labels, reduction="none")
            weights = position_weights(
                config.weights, log_q, batch.offsets[rows], blocks[chunk], gamma=config.gamma
            )
            hit = law.argmax(-1) == chosen.labels
            if chosen.is_there is not None:
                hit = hit & chosen.is_there
            figures = {"hit": hit.float(), "loss": losses.detach(), "row": rows}
            return (losses * weights).sum(), figures

        chunks = _chunks(blocks, num_rows)
        return chunked_loss(states[labelled], head.parameters, chunks, part)

    def _head_losses(self, chosen: Chosen, target_logits: Tensor | None) -> Tensor:
        """[n]: of the law by which drafts are chosen; the target's law over the same columns."""
        if target_logits is not None and chosen.columns is not None:
            target_logits = target_logits.gather(1, chosen.columns)
        return self._row_losses(chosen.logits, chosen.labels, target_logits)

    def _row_losses(self, logits: Tensor, labels: Tensor, target_logits: Tensor | None) -> Tensor:
        """[n]: cross-entropy, KL and total variation, each by its share."""
        kl = self.config.kl
        tv = self.config.tv
        shares = {"ce": 1.0 - kl - tv, "kl": kl, "tv": tv}
        terms = []
        for kind, share in shares.items():
            if share:
                terms.append(share * row_loss(kind, logits, labels, target_logits))
        return sum(terms[1:], start=terms[0])

    def _candidates(self, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Ids in this step's softmax, and labels as indices into them.

        A label that is not in the draft vocabulary is among them, too.
        """
        vocab_size = self.target.vocab_size
        if len(self.vocabulary) == vocab_size:
            return self.vocabulary, labels

        seed = (self.config.seed * 104_729 + step) % 2**64
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (self.config.negatives,)
        negatives = torch.randint(vocab_size, shape, generator=generator, **INTS)
        candidates = torch.cat((self.vocabulary, negatives.to(labels.device), labels)).unique()
        return candidates, torch.searchsorted(candidates, labels)


def _logits(states: Tensor, lm_head: Tensor, cap: float | None) -> Tensor:
    """As in decoding: capped, if at all, before a head adds to them."""
    logits = F.linear(states, lm_head).float()
    return torch.tanh(logits / cap) * cap if cap else logits


def _chunks(blocks: Tensor, num_rows: int) -> list[slice]:
    """Slices of rows: whole blocks, as many as _CHUNK rows hold, or one.

    blocks: [n] which block a row belongs to, ascending. num_rows: of a block.
    """
    blocks_a_chunk = max(1, _CHUNK // num_rows)
    end = int(blocks[-1]) + 1
    firsts = torch.arange(0, end, blocks_a_chunk, dtype=torch.int64, device=blocks.device)
    starts = torch.searchsorted(blocks, firsts).tolist()
    chunks = []
    for first, last in itertools.pairwise([*starts, len(blocks)]):
        if first < last:  # empty where none of these blocks has a label
            chunks.append(slice(first, last))
    return chunks


class CommonTokens(NamedTuple):
    """A draft vocabulary."""

    tokens: Tensor  # [count] int64, ascending
    covered: float  # share of the answers' tokens that are among them
    covered_by_file: dict[str, float]  # the same of every file of answers


def common_tokens(data: Data, count: int) -> CommonTokens:
    """The commonest tokens of all answers."""
    by_file: dict[str, Counter[int]] = {}
    for i in range(len(data)):
        counts = by_file.setdefault(data.file_of(i), Counter())
        counts.update(data.answer_tokens(i))
    total: Counter[int] = Counter()
    for counts in by_file.values():
        total.update(counts)

    common = sorted(token for token, _ in total.most_common(count))
    shares = {file: _covered(counts, common) for file, counts in by_file.items()}
    return CommonTokens(torch.tensor(common, **INTS), _covered(total, common), shares)


def _covered(counts: Counter[int], tokens: Sequence[int]) -> float:
    """The share of all that was counted."""
    num_covered = sum(counts[token] for token in tokens)
    return num_covered / max(1, counts.total())


def accuracy(hits: Tensor, size: int) -> Accuracy:
    """hits: [n, 2], hit and offset of the labelled rows, blocks of `size` nodes in order."""
    hit = hits[:, 0]
    offset = hits[:, 1].long()
    block = (offset == 1).cumsum(0) - 1
    grid = hits.new_zeros(int(block[-1]) + 1, size - 1)
    grid[block, offset - 1] = hit
    num_accepted = float(grid.cumprod(1).sum(1).mean())

    shares: list[float | None] = []
    for k in range(1, size):
        hits_there = hit[offset == k]
        share = round(float(hits_there.mean()), 4) if len(hits_there) else None  # JSON has no NaN
        shares.append(share)
    return {"accuracy": shares, "accepted": round(num_accepted + 1, 4)}
