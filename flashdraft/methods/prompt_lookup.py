"""Prompt lookup: what followed the same words last time. No weights.

The last n tokens (n from `max_ngram` down to 1) are looked up in the row's own history; the tokens after their most
recent earlier occurrence are the draft (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Sequence
from dataclasses import replace

from flashdraft.tree import planted
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["PromptLookup", "lookup"]


class PromptLookup(Drafter):
    name = "prompt_lookup"

    def __init__(self, *, max_ngram: int = 3, block_size: int = 8) -> None:
        self.max_ngram, self.block_size = max_ngram, block_size

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        count = min(self.block_size, max_nodes) - 1
        drafts = [lookup(history, self.max_ngram, count) for history in rows.histories]
        chains = [(draft, list(range(len(draft))), [0.0] * len(draft)) for draft in drafts]
        return replace(planted(rows.anchors, chains), scores=None)  # how sure they are is not known


def lookup(history: Sequence[int], max_ngram: int, count: int) -> list[int]:
    """At most `count` tokens that followed the latest earlier occurrence of the history's longest known ending."""
    last = history[-1]
    for size in range(min(max_ngram, len(history) - 1), 0, -1):
        ending = history[-size:]
        for end in range(len(history) - 1, size - 1, -1):  # history[end - size : end] ends before the ending's last token
            if history[end - 1] == last and history[end - size : end] == ending:
                return list(history[end : end + count])
    return []
