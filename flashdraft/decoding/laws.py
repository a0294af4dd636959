"""The laws of a proposal's nodes: what each row's parameters make of the target's logits.

Knows proposals, parameters, and what a row's parameters remember of its text. Does not know
targets, caches or drafters. Every node has a history of its own: the row's committed tokens, its
ancestors and itself. Nothing is read again for that: counts of the committed tokens are kept and
the node's few are added, and a hook with a memory has one state a node, made from its parent's.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from flashdraft.decoding.sampling import Context, Counts, adjusted, precision
from flashdraft.types import Proposal, SamplingParams, Steered, Steering

__all__ = ["Reading", "adjusted_nodes"]


class Reading:
    """What one row's parameters remember of its text, from step to step; each token enters once.

    eos: the tokens that end a text of this model, also where the parameters go on behind them.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], eos: frozenset[int]) -> None:
        self.params = params
        self.ends = frozenset() if params.ignore_eos else eos
        self.num_prompt = len(prompt)
        self.counts: Counts | None = None
        hook = params.logits_processor
        # Behind the tokens before the anchor. States remember those that follow, so that what was
        # walked as a draft is found when it is committed; the rejected ones go with their parent.
        self.steering = hook.begin(eos) if isinstance(hook, Steered) else None
        self._num_read = self.num_prompt

    def first(self, logits: Tensor, prompt: Sequence[int]) -> Tensor:
        """The adjusted logits [vocab] behind the prompt."""
        return adjusted(logits, self.params, prompt, self.num_prompt, self.steering)

    def behind(self, history: Sequence[int]) -> Steering | None:
        """The hook's state behind the anchor, the last token of the history; None: it keeps none.

        The history begins with what it was at the last call.
        """
        if self.steering is None:
            return None
        *fresh, anchor = history[self._num_read :]
        for token in fresh:
            self.steering = self.steering.then(token)
        self._num_read = len(history) - 1
        return self.steering.then(anchor)

    def context(self, history: list[int], vocab_size: int) -> Context:
        """The tokens before the anchor."""
        if self.counts is None:
            self.counts = Counts(vocab_size, self.num_prompt)
        self.counts.add(history[self.counts.num_counted : len(history) - 1])
        return Context(history, self.counts)


def adjusted_nodes(
    proposal: Proposal,
    logits: Tensor,
    histories: Sequence[list[int]],
    readings: Sequence[Reading | None],
    errors: dict[int, Exception],
) -> Tensor:
    """`adjusted` at every node of the rows that have a reading: [rows, nodes, vocab], a new tensor.

    histories: of each row, prompt and committed tokens; the last one is the anchor. errors: takes
    by row what a hook raises; the others go on.
    """
    wanted = logits.to(precision(logits), copy=True)
    sizes = proposal.sizes.tolist()
    for row, reading in enumerate(readings):
        if reading is not None:
            nodes = slice(sizes[row])
            tokens = proposal.tokens[row, nodes].tolist()
            parents = proposal.parents[row, nodes].tolist()
            try:
                _adjust(wanted[row, nodes], tokens, parents, histories[row], reading)
            except Exception as error:
                errors[row] = error
    return wanted


def _adjust(
    logits: Tensor,
    tokens: Sequence[int],
    parents: Sequence[int],
    history: list[int],
    reading: Reading,
) -> None:
    """One row's nodes, in place: logits [nodes, vocab].

    Nodes that no text can reach (behind a token without mass, or an end of text) keep their logits;
    no hook sees them.
    """
    before = reading.context(history, logits.shape[-1])
    paths = {0: before.then(tokens[0])}
    states = {0: reading.behind(history)}
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if node > 0:
            if parent not in paths or token in reading.ends:
                continue
            is_allowed = bool(logits[parent, token] > -math.inf)
            if not is_allowed:
                continue
            above = states[parent]
            paths[node] = paths[parent].then(token)
            states[node] = None if above is None else above.then(token)

        logits[node] = adjusted(
            logits[node], reading.params, paths[node], reading.num_prompt, states[node]
        )
