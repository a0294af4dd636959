"""What a call cost, as sums over its answers. Knows Chunks and Stats, and no text."""

from dataclasses import dataclass, field

from flashdraft.files import Json
from flashdraft.types import Chunk, Stats

__all__ = ["Speculation", "Usage"]


@dataclass
class Usage:
    """Tokens of one call: a prompt counts once, however many answers it has."""

    num_prompt: int = 0
    num_cached: int = 0  # of the prompts
    num_new: int = 0
    num_accepted: int = 0  # drafted tokens in the texts
    num_drafted: int = 0

    def add_prompt(self, stats: Stats) -> None:
        self.num_prompt += stats.num_prompt_tokens
        self.num_cached += stats.num_cached

    def add_answer(self, stats: Stats) -> None:
        self.num_new += stats.num_tokens
        self.num_accepted += stats.num_accepted
        self.num_drafted += stats.num_drafted

    def sums(self) -> Json:
        """In OpenAI's shape, without the details."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_new,
            "total_tokens": self.num_prompt + self.num_new,
        }

    def body(self) -> Json:
        """In OpenAI's shape. Rejected drafts are told, but are no part of a sum."""
        return {
            **self.sums(),
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.num_accepted,
                "rejected_prediction_tokens": self.num_drafted - self.num_accepted,
            },
        }


@dataclass
class Speculation:
    """What drafting did for one call, step by step. Steps without a draft do not count."""

    num_drafted: int = 0
    accepted: list[int] = field(default_factory=list)  # of every step with drafts
    most: int = 0  # drafts of one step

    def add(self, chunk: Chunk) -> None:
        """Count one step of one answer."""
        num_accepted = sum(piece.drafted for piece in chunk.pieces)
        num_drafted = num_accepted + len(chunk.rejected)
        if num_drafted:
            self.num_drafted += num_drafted
            self.accepted.append(num_accepted)
            self.most = max(self.most, num_drafted)

    def body(self) -> Json:
        """In the shape of vLLM's `metrics.speculative_decoding`.

        A step's bonus token counts for its length, as there.
        """
        num_steps = len(self.accepted)
        num_accepted = sum(self.accepted)
        histogram = [0] * (self.most + 1)  # steps by their number of accepted drafts
        for count in self.accepted:
            histogram[count] += 1
        return {
            "num_spec_steps": num_steps,
            "num_spec_tokens": self.most,
            "num_draft_tokens": self.num_drafted,
            "num_accepted_draft_tokens": num_accepted,
            "mean_acceptance_length": 1 + num_accepted / max(num_steps, 1),
            "draft_acceptance_rate": num_accepted / max(self.num_drafted, 1),
            "acceptance_histogram": histogram,
        }
