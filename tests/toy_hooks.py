"""Hooks with a memory: what may follow depends on the sum and the length of the text so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from conftest import EOS, VOCAB, requests_of, run
from torch import Tensor
from toy_engine import PROMPTS, made

from flashdraft.engine import Engine
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.types import Result, SamplingParams, Steering

NEW = 14
RESIDUES = 5
NUM_FREE = 9  # so many tokens of the text until only an end is allowed
Allowed = Callable[[int, int, frozenset[int]], list[int]]


def by_residue(total: int, length: int, ends: frozenset[int]) -> list[int]:
    """Tokens of another residue than the sum of the text, then an end."""
    if length >= NUM_FREE:
        return sorted(ends)
    residue = total % RESIDUES
    others = [token for token in range(VOCAB) if token not in ends]
    return [token for token in others if token % RESIDUES != residue]


def by_script(total: int, length: int, ends: frozenset[int]) -> list[int]:
    """One free token, then two that follow from the sum, and so on."""
    free = by_residue(total, length, ends)
    if length >= NUM_FREE or length % 3 == 0:
        return free
    return [free[total % len(free)]]


def only(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    masked = torch.full_like(logits, -math.inf)
    masked[list(tokens)] = logits[list(tokens)]
    return masked


def without_memory(num_prompt: int, rule: Allowed) -> Callable[[Sequence[int], Tensor], Tensor]:
    """The rule as a function of all tokens."""

    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        text = tokens[num_prompt:]
        return only(logits, rule(sum(text), len(text), frozenset({EOS})))

    return hook


@dataclass
class Sum:
    """The state: the text's sum and length; `reads` is every token that any state of it read."""

    ends: frozenset[int]
    rule: Allowed
    total: int = 0
    length: int = 0
    reads: list[int] = field(default_factory=list)  # shared by all states of a text

    def then(self, token: int) -> Steering:
        self.reads.append(token)
        return replace(self, total=self.total + token, length=self.length + 1)

    def allowed(self) -> list[int]:
        return self.rule(self.total, self.length, self.ends)

    def masked(self, logits: Tensor) -> Tensor:
        return only(logits, self.allowed())

    def allows(self, token: int) -> bool:
        return token in self.allowed()

    def forced(self) -> Sequence[int]:
        """Until a token is free, or the text has ended."""
        total = self.total
        length = self.length
        tokens: list[int] = []
        while not tokens or tokens[-1] not in self.ends:
            allowed = self.rule(total, length, self.ends)
            if len(allowed) != 1:
                break
            tokens.append(allowed[0])
            total += allowed[0]
            length += 1
        return tokens


@dataclass
class Sums:
    """The hook with a memory."""

    rule: Allowed = by_residue
    state: type[Sum] = Sum
    begun: list[Sum] = field(default_factory=list)

    def begin(self, ends: frozenset[int]) -> Steering:
        self.begun.append(self.state(ends, self.rule))
        return self.begun[-1]


def steered(
    temperature: float, rule: Allowed = by_residue, state: type[Sum] = Sum
) -> list[SamplingParams]:
    """A ragged batch, one row of it without a hook."""
    common = SamplingParams(temperature=temperature, max_new_tokens=NEW, seed=3)
    first = replace(common, frequency_penalty=0.5, logits_processor=Sums(rule, state))
    last = replace(first, seed=5, top_k=20, logit_bias={8: 2.0})
    return [first, common, replace(last, logits_processor=Sums(rule, state))]


def plain(params: Sequence[SamplingParams]) -> list[Result]:
    """One row at a time, without drafts, by hooks that have no memory."""
    own = []
    for prompt, one in zip(PROMPTS, params, strict=True):
        hook = one.logits_processor
        if isinstance(hook, Sums):
            one = replace(one, logits_processor=without_memory(len(prompt), hook.rule))
        own.append(one)
    engine = Engine(made("llama"), Autoregressive(), max_rows=1)
    return run(engine, requests_of(PROMPTS, own, {EOS}))
