"""Prompt lookup: what followed the same words last time. No weights.

The last n tokens (n from `max_ngram` down to 1) are looked up in the row's own history; the tokens
after their most recent earlier occurrence are the draft
(Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Sequence
from dataclasses import replace

from flashdraft.decoding.tree import Nodes, planted
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["NgramIndex", "PromptLookup"]

Ngram = tuple[int, ...]


class NgramIndex:
    """Where each n-gram of one text ended last, for n up to `max_ngram`; every token of the text is
    read once."""

    def __init__(self, max_ngram: int) -> None:
        self.max_ngram = max_ngram
        self._num_read = 0  # n-grams that end within so many first tokens are known
        self._ends: dict[Ngram, int] = {}

    def draft(self, history: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that followed the latest earlier occurrence of the history's
        longest known ending.

        history: the text so far, which begins with what it was at the last call.
        """
        self._read(history)
        longest = min(self.max_ngram, len(history))
        for size in range(longest, 0, -1):
            ending = tuple(history[-size:])
            end = self._ends.get(ending)
            if end is not None:
                return list(history[end : end + count])
        return []

    def _read(self, history: Sequence[int]) -> None:
        """All n-grams but those that end with the last token: that is the ending which is looked
        up."""
        for end in range(self._num_read + 1, len(history)):
            longest = min(self.max_ngram, end)
            for size in range(1, longest + 1):
                ngram = tuple(history[end - size : end])
                self._ends[ngram] = end
        self._num_read = max(self._num_read, len(history) - 1)


class PromptLookup(Drafter):
    name = "prompt_lookup"

    def __init__(self, *, max_ngram: int = 3, block_size: int = 8) -> None:
        self.max_ngram = max_ngram
        self.block_size = block_size
        self._indices: dict[int, NgramIndex] = {}  # by slot

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        count = min(self.block_size, max_nodes) - 1
        chains: list[Nodes] = []
        for slot, history in zip(rows.slots, rows.histories, strict=True):
            index = self._indices.setdefault(slot, NgramIndex(self.max_ngram))
            draft = index.draft(history, count)
            num_drafts = len(draft)
            chains.append(Nodes(draft, list(range(num_drafts)), [0.0] * num_drafts))
        proposal = planted(rows.anchors, chains)
        return replace(proposal, scores=None)  # how sure they are is not known

    def resume(self, source: int, slot: int, count: int) -> int:
        self._indices.pop(slot, None)  # the new text is read from its history
        return count

    def end(self, rows: Rows) -> None:
        for slot in rows.slots:
            self._indices.pop(slot, None)
