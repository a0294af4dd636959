"""Where the engine ends a text: at every offset of a block, with an end-of-text token, a stop
string or the limit, and at the end of the context. Leaks are planted and must be seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import VOCAB, admit, requests_of, tiny_drafter, tiny_model
from toy_engine import (
    BLOCKS,
    GREEDY,
    LONG,
    NEW,
    PROMPT,
    PROMPTS,
    Recording,
    Tree,
    cheat,
    letters,
    made,
    plain,
    run,
)
from transformers import GPT2Config

from flashdraft.engine import Engine, Request
from flashdraft.errors import ContextLengthError, InvalidPrompt
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.models.hf import HFTarget
from flashdraft.models.target import Target
from flashdraft.types import Chunk, Proposal, Rows, SamplingParams


def offset(k: int, block: int) -> int:
    """Where in its block the new token `k` stands, if all drafts are right; the first one comes
    with the prompt.
    """
    return (k - 1) % block


def check_eos_at_every_offset(block: int) -> None:
    text, offsets = plain("llama", PROMPT, LONG), set()
    absent = next(token for token in range(VOCAB) if token not in text)
    for k in range(1, len(text) - block):
        if text[k] in text[:k]:
            continue
        result = cheat(block, LONG, eos=[text[k], absent])
        assert result.tokens == text[: k + 1], k
        assert result.text == letters(text[:k])
        assert result.finish_reason == "stop"
        assert result.stats.num_accepted == k - 1 - (k - 1) // block + (
            offset(k, block) < block - 1
        ), k
        offsets.add(offset(k, block))
    assert offsets == set(range(block))


def check_stop_at_every_offset(block: int) -> None:
    text, offsets = plain("llama", PROMPT, LONG), set()
    for length in (1, 3):
        for k in range(length, len(text)):
            stop = letters(text[k - length + 1 : k + 1])
            if len(stop) < length or stop in letters(text[:k]):
                continue
            result = cheat(block, replace(LONG, stop=(stop, "not in the text")))
            assert result.tokens == text[: k + 1], (k, stop)
            assert result.text == letters(text[: k - length + 1])
            assert result.finish_reason == "stop"
            offsets.add((length, offset(k, block)))
    assert offsets == {(length, place) for length in (1, 3) for place in range(block)}


def check_every_limit(block: int) -> None:
    text = plain("llama", PROMPT, LONG)
    for limit in range(1, 13):
        result = cheat(block, replace(GREEDY, max_new_tokens=limit))
        assert result.tokens == text[:limit]
        assert result.text == letters(text[:limit])
        assert result.finish_reason == "length"
        assert result.stats.target_passes == -(-(limit - 1) // block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "check", [check_eos_at_every_offset, check_stop_at_every_offset, check_every_limit]
)
def test_a_text_ends_where_it_must_at_every_offset_of_a_block(
    check: Callable[[int], None], block: int
) -> None:
    check(block)


def whole_block(
    self: Request, tokens: Sequence[int], num_drafted: int, *others: Sequence[Any]
) -> Chunk:
    """Looks for the end after the block, not in it."""
    chunks = [commit(self, [token], int(i < num_drafted)) for i, token in enumerate(tokens)]
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    ended = next((chunk.result for chunk in chunks if chunk.result is not None), None)
    result = (
        None
        if ended is None
        else replace(ended, tokens=tuple(self.history[len(self.prompt) :]), text=self.decoder.text)
    )
    return Chunk(self.index, pieces, tuple(tokens), result)


commit = Request.commit


def pushes_eos(
    self: Request, tokens: Sequence[int], num_drafted: int, *others: Sequence[Any]
) -> Chunk:
    """The end-of-text token's own text leaks."""
    chunk = commit(self, tokens, num_drafted)
    if chunk.result is None or chunk.tokens[-1] not in self.eos:
        return chunk
    self.decoder.push(chunk.tokens[-1])
    return replace(chunk, result=replace(chunk.result, text=self.decoder.text))


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (whole_block, check_eos_at_every_offset),
        (whole_block, check_stop_at_every_offset),
        (pushes_eos, check_eos_at_every_offset),
    ],
)
def test_a_leak_at_the_end_is_caught(
    faulty: Any, check: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "commit", faulty)
    with pytest.raises(AssertionError):
        check(4)


def test_one_token_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    left = Request.num_left
    monkeypatch.setattr(Request, "num_left", property(lambda self: left.fget(self) + 1))
    with pytest.raises(AssertionError):
        check_every_limit(4)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stop_string_that_had_only_begun_is_text(reason: str) -> None:
    text = plain("llama", PROMPT)
    k = next(k for k in range(5, NEW) if text[k] not in text[:k])
    params = replace(
        GREEDY,
        stop=(letters(text[k - 1 : k]) + "!",),
        max_new_tokens=k if reason == "length" else NEW,
    )
    result = cheat(7, params, eos=text[k : k + 1])
    assert result.text == letters(text[:k])
    assert result.finish_reason == reason


def test_an_end_of_text_token_may_be_ignored() -> None:
    text = plain("llama", PROMPT, LONG)
    result = cheat(4, replace(LONG, ignore_eos=True), eos=[text[3]])
    assert (result.tokens, result.finish_reason) == (text, "length")


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, max_new_tokens=1)])
def test_a_text_may_end_with_its_first_token(params: SamplingParams) -> None:
    text = plain("llama", PROMPT)
    result = cheat(4, params, eos=text[:1] if params is GREEDY else ())
    assert result.tokens == text[:1]
    assert result.finish_reason == ("stop" if params is GREEDY else "length")
    assert (result.stats.target_passes, result.stats.tau) == (0, 1.0)


def test_nothing_accepted_is_plain_decoding() -> None:
    result = cheat(4, right=0)
    assert result.tokens == plain("llama", PROMPT)
    assert (result.stats.num_accepted, result.stats.tau) == (0, 1.0)
    assert result.stats.accepted_lengths == [1] * (NEW - 1)


def test_tau_counts_committed_tokens_per_pass_and_nothing_that_was_cut() -> None:
    result = cheat(
        7, replace(GREEDY, max_new_tokens=10)
    )  # 1 with the prompt, 7 in the first pass, 2 left
    assert result.stats.accepted_lengths == [7, 2]
    assert result.stats.tau == 4.5
    assert result.stats.num_accepted == 6 + 1
    text = plain("llama", PROMPT)
    k = next(k for k in range(3, 7) if text[k] not in text[:k])
    result = cheat(7, eos=[text[k]])  # the rest of the block was right, too, but does not count
    assert result.stats.accepted_lengths == [k]
    assert (result.stats.tau, result.stats.num_accepted, result.stats.num_drafted) == (k, k, 6)
    assert result.to_dict() == {
        "text": letters(text[:k]),
        "tokens": list(text[: k + 1]),
        "finish_reason": "stop",
        "tau": k,
    }


# Refusals and limits.


def test_an_empty_prompt_is_refused() -> None:
    engine = Engine(made("llama"), Autoregressive())
    with pytest.raises(InvalidPrompt, match="the prompt is empty"):
        admit(engine, requests_of([()], [GREEDY])[0])
    assert engine.num_free == 1


@pytest.mark.parametrize(("length", "asked"), [(256, 1), (250, 7), (400, 1)])
def test_a_text_beyond_the_context_is_refused(length: int, asked: int) -> None:
    engine = Engine(made("llama"), Autoregressive())
    with pytest.raises(
        ContextLengthError, match=f"{length} tokens and {asked} new .* holds 256"
    ) as raised:
        admit(engine, requests_of([(5,) * length], [replace(GREEDY, max_new_tokens=asked)])[0])
    room = 256 - length
    assert (f"at most {room} new" if room > 0 else f"by {1 - room} tokens") in str(
        raised.value.hint
    )
    assert engine.num_free == 1


@functools.cache
def gpt2() -> HFTarget:
    """Learned positions: one beyond the last is an error, not a number."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return HFTarget(tiny_model("", config=config), "gpt2")


@pytest.mark.parametrize("target", [lambda: made("llama"), lambda: made("lean llama"), gpt2])
def test_a_text_may_fill_the_context_to_its_last_position(target: Callable[[], Target]) -> None:
    """Beside a row that goes on, so that the full one is padded."""
    model, texts = target(), []
    prompts = [tuple(3 + i * i % 50 for i in range(model.context_length - NEW)), PROMPTS[0]]
    params = [GREEDY, replace(GREEDY, max_new_tokens=40)]
    for drafter in (
        Autoregressive(),
        tiny_drafter(model, block_size=7, max_position_embeddings=512),
    ):
        results = run(Engine(model, drafter, max_rows=2), requests_of(prompts, params))
        texts.append([result.tokens for result in results])
    assert texts[0] == texts[1]
    assert [len(tokens) for tokens in texts[0]] == [NEW, 40]


def test_a_draft_with_fewer_positions_than_its_target_drafts_on_and_the_texts_stay() -> None:
    drafter = Recording(tiny_drafter(made("llama"), block_size=4, max_position_embeddings=16))
    results = run(Engine(made("llama"), drafter, max_rows=3), requests_of(PROMPTS, (GREEDY,) * 3))
    assert [result.tokens for result in results] == [plain("llama", prompt) for prompt in PROMPTS]
    assert all(
        result.stats.num_drafted > 0 for result in results
    )  # the last prompt alone has more positions


def test_a_faulty_proposal_is_an_error_and_not_a_text() -> None:
    class TwoRoots(Tree):
        def propose(self, rows: Rows, max_nodes: int) -> Proposal:
            tokens = torch.tensor([[rows.anchors[0], 5, 6]])
            return Proposal(tokens, torch.tensor([[-1, 0, -1]]), torch.tensor([3]))

    engine = Engine(made("llama"), TwoRoots([]))
    admit(engine, requests_of([PROMPT], [GREEDY])[0])
    with pytest.raises(AssertionError, match="a second root"):
        engine.step()
