"""What a sequential head does to a step's losses; the tokens before labels are the answer's own.

Ours (swiglu) corrects states and DSpark's Markov head logits: the loss is that of the corrected
law, as DSpark's. DFlash 2's selector chooses among the likeliest tokens of each row, and its
authors have not published how it is trained. Here, as in the speculators library, a row has two
losses of one weight: the lm_head's over all columns, so that the label is among the candidates, and
the selector's over the candidates. A label that is not among them takes the place of the last one.
Ours is that D-PACE weighs both losses by the selector's law.
Knows the heads' tensors. Does not know losses, weights of positions or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.network import DraftNetwork, top
from flashdraft.models.heads import CandidateSelector, MarkovHead, SwigluHead

__all__ = ["Chosen", "StepHead", "step_head"]

Embed = Callable[[Tensor], Tensor]  # the target's embedding


class Chosen(NamedTuple):
    """By what the drafts of n rows are chosen."""

    logits: Tensor  # [n, m]
    labels: Tensor  # [n]: which of the m a row's label is
    columns: Tensor | None = None  # [n, m]: which of the step's columns they are; None: all
    is_there: Tensor | None = None  # [n]: whether decoding has the label among them; None: it has


class StepHead:
    """The head of one step's labelled rows, and what none does: the lm_head alone chooses."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []  # that the methods read: of tables, the rows in use

    def states(self, states: Tensor, chunk: slice) -> Tensor:
        """What the lm_head reads for the rows of a chunk: [n, hidden] -> [n, hidden]."""
        return states

    def chosen(self, states: Tensor, logits: Tensor, labels: Tensor, chunk: slice) -> Chosen:
        """states [n, hidden] and the lm_head's logits [n, columns] of the rows of a chunk."""
        return Chosen(logits, labels)


class _Swiglu(StepHead):
    def __init__(self, head: SwigluHead, embed: Embed, previous: Tensor) -> None:
        super().__init__()
        self.head = head
        self.embed = embed
        self.previous = previous
        self.parameters = list(head.parameters())

    def states(self, states: Tensor, chunk: slice) -> Tensor:
        corrected: Tensor = self.head(states, self.embed(self.previous[chunk]))
        return corrected


class _Markov(StepHead):
    def __init__(
        self, head: MarkovHead, vocabulary: Tensor, previous: Tensor, columns: Tensor
    ) -> None:
        super().__init__()
        used, self.rows = previous.unique(return_inverse=True)
        self.before = head.markov_w1(used)  # [used, rank]

        # A column that is not drafted has no row in W2.
        drafts = torch.searchsorted(vocabulary, columns).clamp(max=len(vocabulary) - 1)
        is_drafted = vocabulary[drafts] == columns
        self.behind = head.markov_w2(drafts) * is_drafted[:, None]  # [columns, rank]
        self.parameters = [self.before, self.behind]

    def chosen(self, states: Tensor, logits: Tensor, labels: Tensor, chunk: slice) -> Chosen:
        bias = self.before[self.rows[chunk]] @ self.behind.mT
        return Chosen(logits + bias.float(), labels)


class _Selector(StepHead):
    def __init__(
        self, head: CandidateSelector, num_choices: int, previous: Tensor, columns: Tensor
    ) -> None:
        super().__init__()
        self.num_choices = num_choices
        used, self.rows = previous.unique(return_inverse=True)
        self.before = F.embedding(used, head.predecessor_codebook)  # [used, rank]
        self.behind = F.embedding(columns, head.successor_codebook)  # [columns, rank]
        self.projection = head.hidden_projection.weight
        self.parameters = [self.before, self.behind, self.projection]

    def chosen(self, states: Tensor, logits: Tensor, labels: Tensor, chunk: slice) -> Chosen:
        columns = top(logits.detach(), self.num_choices).indices
        is_there = (columns == labels[:, None]).any(1)
        columns[:, -1] = torch.where(is_there, columns[:, -1], labels)
        places = (columns == labels[:, None]).int().argmax(1)

        projected = F.linear(states, self.projection)
        rows = self.before[self.rows[chunk]] * projected
        behind = F.embedding(columns, self.behind)  # [n, choices, rank]
        pairs = torch.bmm(behind, rows[:, :, None])[:, :, 0]
        scores = logits.gather(1, columns) + pairs.float()
        return Chosen(scores, places, columns, is_there)


def step_head(
    model: DraftNetwork, embed: Embed, vocabulary: Tensor, previous: Tensor, columns: Tensor
) -> StepHead:
    """What a network's head does to rows with these tokens before their labels, `previous` [n].

    vocabulary: the drafted tokens, columns: those of the step's softmax, both ascending.
    """
    if not isinstance(model, DFlashDraftModel):
        return StepHead()
    if model.sequential_head is not None:
        return _Swiglu(model.sequential_head, embed, previous)
    if model.markov_head is not None:
        return _Markov(model.markov_head, vocabulary, previous, columns)
    if model.candidate_selector is not None:
        choices = model.config.head_choices
        return _Selector(model.candidate_selector, choices, previous, columns)
    return StepHead()
