"""Prompt lookup: what followed the same words last time. No weights.

The last n tokens (n from `max_ngram` down to 1) are looked up in the row's own history; the tokens
after their most recent earlier occurrence are the draft
(Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). How far the two places agree
backwards says how likely the draft is: a text that has copied eight tokens copies the ninth, too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from flashdraft.decoding.tree import Nodes, planted
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["NgramIndex", "PromptLookup"]

Ngram = tuple[int, ...]

# How often the next token was the one that followed the same 1, 2, ... tokens last time, in answers
# of SmolLM2-135M-Instruct to questions, instructions, documents and talks (docs/log.md).
_USUAL = (0.23, 0.58, 0.66, 0.75, 0.77, 0.85, 0.85, 0.95)
_WEIGHT = 8.0  # tokens of the text itself that count as much as what is usual
_MOST_SURE = 0.98


class Match(NamedTuple):
    """An earlier place that looks like the end of the text."""

    end: int  # the tokens that may come next begin here
    size: int  # so many tokens before it are the text's last ones; `len(_USUAL)` at most


class NgramIndex:
    """Where each n-gram of one text ended last, for n up to `max_ngram`, and how often what
    followed there came again; every token of the text is read once."""

    def __init__(self, max_ngram: int, num_prompt: int = 0) -> None:
        """num_prompt: what these first tokens repeat says nothing of what the model repeats."""
        self.max_ngram = max_ngram
        self._num_prompt = num_prompt
        self._num_read = 0  # n-grams that end within so many first tokens are known
        self._ends: dict[Ngram, int] = {}
        self._right = [_WEIGHT * usual for usual in _USUAL]  # by size of the match
        self._seen = [_WEIGHT] * len(_USUAL)

    def draft(self, history: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that followed the latest earlier occurrence of the history's
        longest known ending.

        history: the text so far, which begins with what it was at the last call.
        """
        match = self.match(history)
        if match is None:
            return []
        return list(history[match.end : match.end + count])

    def match(self, history: Sequence[int]) -> Match | None:
        """The place whose next tokens `draft` gives; None where no ending is known."""
        self._read(history)
        return self._match(history, len(history))

    def chance(self, size: int) -> float:
        """Of the token behind a match of so many tokens to come again."""
        place = min(size, len(_USUAL)) - 1
        return min(self._right[place] / self._seen[place], _MOST_SURE)

    def _match(self, history: Sequence[int], length: int) -> Match | None:
        """Of the first `length` tokens, whose own ending is not known yet."""
        longest = min(self.max_ngram, length)
        for size in range(longest, 0, -1):
            ending = tuple(history[length - size : length])
            end = self._ends.get(ending)
            if end is not None:
                return Match(end, _agreement(history, end, length))
        return None

    def _read(self, history: Sequence[int]) -> None:
        """All n-grams but those that end with the last token: that is the ending which is looked
        up."""
        for end in range(self._num_read + 1, len(history)):
            if end >= self._num_prompt:
                self._judge(history, end)
            longest = min(self.max_ngram, end)
            for size in range(1, longest + 1):
                ngram = tuple(history[end - size : end])
                self._ends[ngram] = end
        self._num_read = max(self._num_read, len(history) - 1)

    def _judge(self, history: Sequence[int], end: int) -> None:
        """Whether the token at `end` is what the match before it would have drafted."""
        match = self._match(history, end)
        if match is not None:
            self._seen[match.size - 1] += 1
            self._right[match.size - 1] += history[match.end] == history[end]


def _agreement(history: Sequence[int], end: int, length: int) -> int:
    """How many tokens before `end` are those before `length`."""
    longest = min(end, len(_USUAL))
    there = history[end - longest : end]
    here = history[length - longest : length]
    size = 0
    for then, now in zip(reversed(there), reversed(here), strict=True):
        if then != now:
            break
        size += 1
    return size


class PromptLookup(Drafter):
    name = "prompt_lookup"
    is_free = True

    def __init__(self, *, max_ngram: int = 3, block_size: int = 8) -> None:
        self.max_ngram = max_ngram
        self.block_size = block_size
        self._indices: dict[int, NgramIndex] = {}  # by slot

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        count = min(self.block_size, max_nodes) - 1
        chains: list[Nodes] = []
        for slot, history, num_prompt in zip(
            rows.slots, rows.histories, rows.num_prompts, strict=True
        ):
            if slot not in self._indices:
                self._indices[slot] = NgramIndex(self.max_ngram, num_prompt)
            chains.append(_chain(self._indices[slot], history, count))
        return planted(rows.anchors, chains)

    def resume(self, source: int, slot: int, count: int) -> int:
        self._indices.pop(slot, None)  # the new text is read from its history
        return count

    def end(self, rows: Rows) -> None:
        for slot in rows.slots:
            self._indices.pop(slot, None)


def _chain(index: NgramIndex, history: Sequence[int], count: int) -> Nodes:
    """At most `count` drafts behind the history; every one that is right makes the match longer."""
    match = index.match(history)
    if match is None:
        return Nodes([], [], [])
    tokens = list(history[match.end : match.end + count])
    scores = [math.log(index.chance(match.size + depth)) for depth in range(len(tokens))]
    return Nodes(tokens, list(range(len(tokens))), scores)
