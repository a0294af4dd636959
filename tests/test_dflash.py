"""The DFlash drafter: its packed, cached decoding path against the definition, written out slowly
in float64.

The definition (2602.06036): C = RMSNorm(fc(features)) of the tokens strictly before the anchor; the
block is the anchor and masks; every layer's keys and values come from [C ; block] with the same
weights and k_norm; positions are absolute; each block row sees the whole context and the whole
block; row k predicts the token at anchor + k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from conftest import EOS, admit, requests_of, run, tiny_target
from torch import Tensor
from toy_folders import ZLAB, zlab_tensors

from flashdraft.decoding.tree import check
from flashdraft.engine import Engine, Request
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.written import config_of, json_of
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.dflash import DFlashDrafter, DFlashDraftModel, PackedDraft
from flashdraft.models.target import Target
from flashdraft.train.batch import make_batch
from flashdraft.train.features import Sample
from flashdraft.train.passes import Pass
from flashdraft.types import Proposal, Rows, SamplingParams

BLOCK = 4
FEATURES = (1, 2)
WINDOWED: dict[str, Any] = {
    "layer_types": ("sliding_attention", "full_attention"),
    "sliding_window": 8,
}
PROMPTS = ((5, 9, 31), tuple(range(3, 40)), (7, 7, 12, 50, 3, 22, 17, 8, 40, 41, 9), (33,))
GREEDY = SamplingParams(max_new_tokens=30, ignore_eos=True)


def the_target() -> Target:
    return tiny_target("llama", lean=True)


def the_model(seed: int = 0, **changes: Any) -> DFlashDraftModel:
    """A random network whose drafts depend on everything it reads; `changes` are fields of its
    DraftConfig.
    """
    config = replace(config_of(ZLAB, "here"), rope_parameters={"rope_theta": 1000.0}, **changes)
    model = DFlashDraftModel(config)
    model.load_state_dict({name: t.float() for name, t in zlab_tensors(seed=seed).items()})
    return model.eval()


def new_drafter(*, block_size: int | None = None, **changes: Any) -> DFlashDrafter:
    return DFlashDrafter(PackedDraft(the_model(**changes), the_target()), block_size=block_size)


# The definition. `fault` plants one of the mistakes that implementations make.

FAULTS = (
    "the context holds the anchor's own features",
    "the context lacks its last token",
    "the block stands one position late",
    "the block is causal",
    "each row sees only itself in the block",
    "the context's keys are not normed",
    "the context goes through input_layernorm",
    "the context is not normed",
)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, positions: Sequence[int], theta: float = 1000.0) -> Tensor:
    """Rotary positions one number at a time. x: [n, heads, head_dim]"""
    half, out = x.shape[-1] // 2, x.clone()
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position / theta ** (i / half)
            first, second = x[row, :, i], x[row, :, i + half]
            out[row, :, i] = first * math.cos(angle) - second * math.sin(angle)
            out[row, :, i + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def attended(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """q: [m, heads, d]; keys, values: [n, kv_heads, d]; seen: [m, n] -> [m, heads * d], head by
    head.
    """
    groups, outputs = q.shape[1] // keys.shape[1], []
    for head in range(q.shape[1]):
        scores = q[:, head] @ keys[:, head // groups].T / math.sqrt(q.shape[2])
        outputs.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ values[:, head // groups])
    return torch.cat(outputs, dim=1)


def what_is_seen(
    config: DraftConfig, layer: int, num_context: int, size: int, fault: str
) -> Tensor:
    """[block rows, context and block], position by position."""
    seen = torch.zeros(size, num_context + size, dtype=torch.bool)
    sliding = bool(config.layer_types) and config.layer_types[layer] == "sliding_attention"
    window = config.sliding_window if sliding else None
    causal = sliding if config.causal is None else config.causal
    for row in range(size):
        for key in range(num_context + size):
            inside = key >= num_context
            ok = window is None or abs(num_context + row - key) < window
            if causal:
                ok = ok and key <= num_context + row
            if fault == "the block is causal":
                ok = ok and key <= num_context + row
            if fault == "each row sees only itself in the block":
                ok = ok and not (inside and key != num_context + row)
            if fault == "sliding layers see everything":
                ok = True
            if fault == "the window is one wider" and sliding:
                assert window is not None
                ok = num_context + row - window <= key <= num_context + row
            if fault == "sliding layers see the whole block" and sliding:
                ok = ok or inside
            seen[row, key] = ok
    return seen


def reference(
    model: DFlashDraftModel,
    features: Tensor,
    anchor: int,
    size: int,
    fault: str = "",
    thetas: Sequence[float] = (1000.0,),
) -> Tensor:
    """Normed states [size - 1, hidden] of the masked rows. features: [n, F * hidden] of the tokens
    before the anchor, and of the anchor in the last row, which only one of the faults reads.
    """
    config, target = model.config, the_target()
    w = {name: t.double() for name, t in model.state_dict().items()}
    at = len(features) - 1  # the anchor's position
    features = {FAULTS[0]: features, FAULTS[1]: features[: at - 1]}.get(fault, features[:at])
    context = features @ w["fc.weight"].T
    context = context if fault == FAULTS[7] else rms(context, w["hidden_norm.weight"])
    block = list(range(at, at + size)) if fault != FAULTS[2] else list(range(at + 1, at + 1 + size))
    x = (
        target.embed(torch.tensor([anchor] + [config.mask_token_id] * (size - 1)))
        * config.input_embedding_scale
    )
    for n in range(config.num_hidden_layers):
        p, theta = f"layers.{n}.", thetas[n % len(thetas)]

        def heads(x: Tensor, name: str, p: str = p) -> Tensor:
            return (x @ w[f"{p}self_attn.{name}_proj.weight"].T).view(len(x), -1, config.head_dim)

        normed = rms(x, w[p + "input_layernorm.weight"])
        source = rms(context, w[p + "input_layernorm.weight"]) if fault == FAULTS[6] else context
        q = rotated(rms(heads(normed, "q"), w[p + "self_attn.q_norm.weight"]), block, theta)
        both = torch.cat((source, normed))
        keys = rms(heads(both, "k"), w[p + "self_attn.k_norm.weight"])
        if fault == FAULTS[5]:
            keys[: len(source)] = heads(source, "k")
        keys = rotated(keys, [*range(len(source)), *block], theta)
        seen = what_is_seen(config, n, len(source), size, fault)
        x = x + attended(q, keys, heads(both, "v"), seen) @ w[p + "self_attn.o_proj.weight"].T
        normed = rms(x, w[p + "post_attention_layernorm.weight"])
        gate, up = normed @ w[p + "mlp.gate_proj.weight"].T, normed @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return rms(x, w["norm.weight"])[1:]


def features_of(history: Sequence[int], layers: Sequence[int] = FEATURES) -> Tensor:
    """The target's features of every token, [n, F * hidden]."""
    target = the_target()
    _, features = target.prefill(
        target.new_cache(1, len(history)), 0, torch.tensor(history), layers
    )
    assert features is not None
    return features


def rows_of(histories: Sequence[Sequence[int]], slots: Sequence[int] | None = None) -> Rows:
    count = len(histories)
    return Rows(
        list(slots or range(count)),
        [list(h) for h in histories],
        [SamplingParams()] * count,
        [1] * count,
    )


def observed(
    drafter: DFlashDrafter, histories: Sequence[Sequence[int]], *, pieces: int = 3
) -> Rows:
    """Let the drafter observe every token before the anchors, in pieces of different sizes; returns
    the rows.
    """
    rows = rows_of(histories)
    features = [features_of(history) for history in histories]
    for piece in range(pieces):
        ends = (
            [(len(h) - 1) * piece // pieces for h in histories],
            [(len(h) - 1) * (piece + 1) // pieces for h in histories],
        )
        parts = [slice(first, last) for first, last in zip(*ends, strict=True)]
        tokens = [
            torch.tensor(h, dtype=torch.long)[part]
            for h, part in zip(histories, parts, strict=True)
        ]
        drafter.observe(rows, tokens, [f[part] for f, part in zip(features, parts, strict=True)])
    return rows


def states_and_tokens(
    drafter: DFlashDrafter, rows: Rows, max_nodes: int = 99
) -> tuple[Tensor, Proposal]:
    """What the packed path hands to the lm_head, [rows, size - 1, hidden], and what it proposes."""
    network, caught = drafter.network, []
    scored = network.scored
    network.scored = lambda hidden, *rest: (
        caught.append(hidden.flatten(0, 1)),
        scored(hidden, *rest),
    )[1]  # type: ignore[method-assign]
    proposal = drafter.propose(rows, max_nodes)
    network.scored = scored  # type: ignore[method-assign]
    return caught[0].view(len(rows), -1, caught[0].shape[-1]), proposal


def argmax(states: Tensor) -> list[int]:
    tokens: list[int] = the_target().lm_head(states).argmax(-1).tolist()
    return tokens


def far_from(got: Tensor, expected: Tensor) -> bool:
    """Off by more than rounding could ever make it: the bound of the equality tests is 1e-3."""
    return float((got - expected).abs().max()) > 0.1


def assert_same_states(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got, expected, rtol=0, atol=1e-3
    )  # the network's rotary table is made in float32


# (a) The definition.


def test_a_tree_holds_the_chain_and_every_smaller_tree() -> None:
    def proposed(tree_nodes: int | None, max_nodes: int = 999) -> Proposal:
        drafter = new_drafter(block_size=BLOCK)
        drafter.tree_nodes = tree_nodes
        return drafter.propose(observed(drafter, [[5, 6, 7, 8], [9, 10, 11]]), max_nodes)

    chained, whole = (
        proposed(None),
        proposed(1 + 8 + 8**2 + 8**3),
    )  # all of three positions of eight tokens
    check(whole)
    assert whole.sizes.tolist() == [585, 585]
    for row, (tokens, parents) in enumerate(
        zip(whole.tokens.tolist(), whole.parents.tolist(), strict=True)
    ):
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(tokens)):
            paths.append((*paths[parents[node]], tokens[node]))
        assert tuple(chained.tokens[row, 1:].tolist()) in paths
        assert len(set(paths)) == 585
    for small in (proposed(12), proposed(585, 12)):
        assert torch.equal(small.tokens, whole.tokens[:, :12])
        assert torch.equal(small.parents, whole.parents[:, :12])
        assert small.sizes.tolist() == [12, 12]


@pytest.mark.parametrize("block_size", [2, 3, BLOCK, 9])
def test_packed_path_equals_the_definition_in_a_ragged_batch(block_size: int) -> None:
    drafter, model = new_drafter(block_size=block_size), the_model()
    states, proposal = states_and_tokens(drafter, observed(drafter, PROMPTS))
    assert proposal.tokens.shape == (len(PROMPTS), block_size)
    for row, history in enumerate(PROMPTS):
        expected = reference(model, features_of(history), history[-1], block_size)
        assert_same_states(states[row], expected)
        assert proposal.tokens[row].tolist() == [history[-1], *argmax(expected)]
    assert proposal.parents.tolist() == [list(range(-1, block_size - 1))] * len(PROMPTS)
    assert proposal.sizes.tolist() == [block_size] * len(PROMPTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_changes_states_and_drafts(fault: str) -> None:
    drafter, model = new_drafter(), the_model()
    histories = [history for history in PROMPTS if len(history) > 2]
    states, proposal = states_and_tokens(drafter, observed(drafter, histories))
    wrong = [reference(model, features_of(h), h[-1], BLOCK, fault) for h in histories]
    assert all(far_from(states[row], expected) for row, expected in enumerate(wrong))
    assert [argmax(expected) for expected in wrong] != proposal.tokens[:, 1:].tolist()


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["full", "windowed"])
def test_plain_module_equals_the_definition(changes: dict[str, Any]) -> None:
    """The module that is trained: the same network, without packing and cache."""
    model = the_model(**changes)
    for history in PROMPTS[:3]:
        features, at = features_of(history), len(history) - 1
        double = the_model(**changes).double()

        def attend(
            layer: int, q: Tensor, context_kv: Any, block_kv: Any, num_context: int = at
        ) -> Tensor:
            keys, values = (torch.cat(pair) for pair in zip(context_kv, block_kv, strict=True))
            return attended(
                q, keys, values, what_is_seen(model.config, layer, num_context, BLOCK, "")
            )

        block = the_target().embed(
            torch.tensor([history[-1]] + [model.config.mask_token_id] * (BLOCK - 1))
        )
        positions = torch.arange(at), torch.arange(at, at + BLOCK)
        with torch.no_grad():
            states = double(double.context(features[:at]), block, positions, attend)
        assert_same_states(states[1:], reference(model, features, history[-1], BLOCK))


def test_context_at_the_first_positions_counts() -> None:
    """Absolute positions: the same tokens one place later give other features and other drafts."""
    first, second = [5, 9, 31, 8], [4, 5, 9, 31, 8]
    drafter = new_drafter()
    states, _ = states_and_tokens(drafter, observed(drafter, [first, second]))
    assert far_from(states[0], states[1])


# (d') Sliding-window layers: causal inside the block, and windowed.

WINDOW_FAULTS = (
    "sliding layers see everything",
    "the window is one wider",
    "sliding layers see the whole block",
)


def test_sliding_layers_equal_the_definition() -> None:
    drafter, model = new_drafter(**WINDOWED), the_model(**WINDOWED)
    states, proposal = states_and_tokens(drafter, observed(drafter, PROMPTS))
    for row, history in enumerate(PROMPTS):
        expected = reference(model, features_of(history), history[-1], BLOCK)
        assert_same_states(states[row], expected)
        assert proposal.tokens[row, 1:].tolist() == argmax(expected)


@pytest.mark.parametrize("fault", WINDOW_FAULTS)
def test_planted_window_fault_changes_states(fault: str) -> None:
    drafter, model, history = new_drafter(**WINDOWED), the_model(**WINDOWED), PROMPTS[1]
    states, _ = states_and_tokens(drafter, observed(drafter, [history]))
    wrong = reference(model, features_of(history), history[-1], BLOCK, fault)
    assert float((states[0] - wrong).abs().max()) > 0.02


def test_window_of_all_layers_forgets_what_is_older() -> None:
    changes = {"layer_types": ("sliding_attention",) * 2, "sliding_window": 8}
    history, proposals = PROMPTS[1], {}
    for changed in (
        None,
        0,
        len(history) - 3,
    ):  # nothing; a feature far outside the window; one inside it
        drafter, features = new_drafter(**changes), features_of(history).clone()
        if changed is not None:
            features[changed] += 10.0
        drafter.observe(rows_of([history]), [torch.tensor(history[:-1])], [features[:-1]])
        proposals[changed], _ = states_and_tokens(drafter, rows_of([history]))
    assert torch.equal(proposals[None], proposals[0])
    assert far_from(proposals[None], proposals[len(history) - 3])


# Running it: the engine, the true texts, and a drafter that is led to accept.


def requests(prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> list[Request]:
    return requests_of(prompts, [params] * len(prompts), {EOS})


@cache
def plain_texts(
    prompts: tuple[tuple[int, ...], ...], params: SamplingParams = GREEDY
) -> list[tuple[int, ...]]:
    return [
        result.tokens
        for result in run(
            Engine(the_target(), Autoregressive(), max_rows=1), requests(prompts, params)
        )
    ]


class Led(DFlashDrafter):
    """The real drafter, whose drafts are then replaced by 0, 1, 2, ... right ones and wrong ones
    behind them.
    """

    texts: tuple[tuple[int, ...], ...] = ()  # whole rows, prompt included
    only: int | None = None  # right drafts in every proposal; None: another number each time
    calls = 0

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        proposal = super().propose(rows, max_nodes)
        tokens = proposal.tokens.clone()
        for row, history in enumerate(rows.histories):
            text = next(text for text in self.texts if list(text[: len(history)]) == history)
            truth = list(text[len(history) : len(history) + proposal.num_nodes - 1])
            right = (self.calls * 2 + row) % proposal.num_nodes if self.only is None else self.only
            for k, token in enumerate(truth):
                tokens[row, 1 + k] = token if k < right else (token + 1) % 61
        self.calls += 1
        return replace(proposal, tokens=tokens)


class LedWithoutCutting(Led):
    """The planted fault: block rows stay in the draft's cache."""

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        proposal = super().propose(rows, max_nodes)
        for slot in rows.slots:
            self.cache.keep(slot, range(1))
        return proposal


def led(kind: type[Led] = Led, *, only: int | None = None, **changes: Any) -> Led:
    drafter = kind(PackedDraft(the_model(**changes), the_target()))
    drafter.texts = tuple((*p, *t) for p, t in zip(PROMPTS, plain_texts(PROMPTS), strict=True))
    drafter.only = only
    return drafter


def test_led_drafts_are_accepted_in_part() -> None:
    """What the tests below rest on: every number of accepted drafts occurs, and texts are the plain
    ones.
    """
    engine = Engine(the_target(), led(), max_rows=4)
    results = run(engine, requests(PROMPTS))
    assert [result.tokens for result in results] == plain_texts(PROMPTS)
    assert {n for result in results for n in result.stats.accepted_lengths} == {1, 2, 3, 4}


# (b) What is in the draft's cache.


def trace_of_rejected_drafts(engine: Engine, drafter: DFlashDrafter) -> float:
    """The largest difference between the draft's cache and one that saw the committed tokens alone;
    inf for wrong lengths.
    """
    worst = 0.0
    for slot, request in engine.running.items():
        fresh = new_drafter()
        observed(fresh, [request.history], pieces=1)
        n = len(request.history) - 1
        if drafter.cache.lengths[slot] != n or fresh.cache.lengths[0] != n:
            return math.inf
        for got, expected in zip(
            (*drafter.cache.keys, *drafter.cache.values),
            (*fresh.cache.keys, *fresh.cache.values),
            strict=True,
        ):
            assert got is not None
            assert expected is not None
            worst = max(worst, float((got[slot, :, :n] - expected[0, :, :n]).abs().max()))
    return worst


def traces(kind: type[Led]) -> Iterator[float]:
    drafter = led(kind)
    engine = Engine(the_target(), drafter, max_rows=4)
    for request in requests(PROMPTS):
        admit(engine, request)
    yield trace_of_rejected_drafts(engine, drafter)
    for _ in range(6):
        engine.step()
        yield trace_of_rejected_drafts(engine, drafter)


def test_rejected_drafts_leave_no_trace_in_the_draft_cache() -> None:
    assert max(traces(Led)) < 1e-9


def test_a_block_left_in_the_draft_cache_is_caught() -> None:
    assert max(traces(LedWithoutCutting)) > 0.1


def test_drafts_after_partial_acceptance_are_those_of_a_fresh_drafter() -> None:
    drafter = led()
    engine = Engine(the_target(), drafter, max_rows=4)
    for request in requests(PROMPTS):
        admit(engine, request)
    for _ in range(5):
        engine.step()
        histories = [request.history for request in engine.running.values()]
        rows = rows_of(histories, list(engine.running))
        fresh = new_drafter()
        again = observed(fresh, histories)
        states, expected = states_and_tokens(drafter, rows)[0], states_and_tokens(fresh, again)[0]
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-9)


# (c) Beyond the positions that it was trained on.


def test_row_beyond_the_trained_positions_is_drafted_by_the_definition(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limit = 20
    histories = [list(range(3, 3 + n)) for n in (limit - BLOCK, limit - BLOCK + 1, 57, 5)]
    drafter = new_drafter(max_position_embeddings=limit)
    rows = observed(drafter, histories)
    states, proposal = states_and_tokens(drafter, rows)
    assert proposal.sizes.tolist() == [BLOCK] * 4
    for row, history in enumerate(histories):
        assert_same_states(
            states[row], reference(the_model(), features_of(history), history[-1], BLOCK)
        )
    drafter.propose(rows, 8)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "the drafter was not trained from position 20 on: it drafts on, and may be accepted less"
    ]


def test_nothing_is_said_within_the_trained_positions(caplog: pytest.LogCaptureFixture) -> None:
    drafter = new_drafter(max_position_embeddings=20)
    drafter.propose(observed(drafter, [list(range(3, 3 + 20 - BLOCK))]), 8)
    assert not caplog.records


def test_tables_are_as_long_as_what_is_read() -> None:
    drafter = new_drafter(max_position_embeddings=100_000)
    (rotary,) = drafter.network.decoder.rotaries
    assert len(rotary.tables[0]) == 256
    features = torch.randn(
        700, 2 * 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    drafter.observe(rows_of([[5]]), [torch.arange(700) % 50], [features])
    assert 700 <= len(rotary.tables[0]) <= 1400


def test_positions_without_a_row_of_the_table_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a table that does not grow."""
    drafter = new_drafter()
    monkeypatch.setattr("flashdraft.models.layers.Rotary.reserve", lambda self, count: False)
    with pytest.raises(IndexError):
        drafter.observe(
            rows_of([[5]]),
            [torch.arange(700) % 50],
            [torch.zeros(700, 2 * 32, dtype=torch.float64)],
        )


@pytest.mark.parametrize("limit", [1, 20, 40])
def test_text_and_drafts_stay_equal_across_the_trained_positions(limit: int) -> None:
    texts, drafted = [], []
    for length in (limit, 256):
        results = run(
            Engine(the_target(), led(max_position_embeddings=length), max_rows=4), requests(PROMPTS)
        )
        texts.append([result.tokens for result in results])
        drafted.append([result.stats.accepted_lengths for result in results])
    assert texts == [plain_texts(PROMPTS)] * 2
    assert drafted[0] == drafted[1]


# (d) What a folder says of masks, rotary positions and scales. Without its keys every one of them
# gives other states.

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = [SLIDING, FULL]
MASKS: dict[str, tuple[dict[str, Any], list[tuple[int | None, bool]]]] = {
    "is_causal, full layers": ({"is_causal": True}, [(None, True)] * 2),
    "causal in dflash_config": ({"dflash_config": {"causal": True}}, [(None, True)] * 2),
    "is_causal in dflash_config": ({"dflash_config": {"is_causal": True}}, [(None, True)] * 2),
    "is_causal before causal": (
        {"is_causal": False, "layer_types": KINDS, "dflash_config": {"causal": True}},
        [(None, False)] * 2,
    ),
    "windows both ways": (
        {"layer_types": KINDS, "sliding_window": 8, "use_sliding_window": True, "is_causal": False},
        [(8, False), (None, False)],
    ),
    "windows, all causal": (
        {
            "layer_types": KINDS,
            "sliding_window": 8,
            "use_sliding_window": True,
            "dflash_config": {"causal": True},
        },
        [(8, True), (None, True)],
    ),
    "use_swa": ({"dflash_config": {"use_swa": True, "swa_window_size": 5}}, [(5, False)] * 2),
    "use_swa of sliding layers": (
        {"layer_types": [SLIDING] * 2, "dflash_config": {"use_swa": True, "swa_window_size": 5}},
        [(5, True)] * 2,
    ),
    "use_swa, causal": (
        {"dflash_config": {"use_swa": True, "swa_window_size": 5, "causal": True}},
        [(5, True)] * 2,
    ),
    "sliding layers without a window": (
        {"layer_types": KINDS, "sliding_window": 8},
        [(None, True), (None, False)],
    ),
    "windows not switched on": (
        {"layer_types": KINDS, "sliding_window": 8, "use_sliding_window": None},
        [(None, True), (None, False)],
    ),
    "windows from a layer on": (
        {
            "layer_types": None,
            "sliding_window": 8,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
        [(None, False), (8, True)],
    ),
}


def model_of(changes: dict[str, Any]) -> DFlashDraftModel:
    """The same random weights under a folder's config.json; those of dflash_config are changed key
    by key.
    """
    special = {**ZLAB["dflash_config"], **changes.get("dflash_config", {})}
    config = config_of({**ZLAB, "rope_theta": 1000.0, **changes, "dflash_config": special}, "here")
    model = DFlashDraftModel(config)
    model.load_state_dict({name: t.float() for name, t in zlab_tensors().items()})
    return model.eval()


def states_of(model: DFlashDraftModel, history: Sequence[int] = PROMPTS[1]) -> Tensor:
    drafter = DFlashDrafter(PackedDraft(model, the_target()))
    return states_and_tokens(drafter, observed(drafter, [history]))[0][0]


@pytest.mark.parametrize("case", MASKS)
def test_masks_are_those_that_the_folder_says(case: str) -> None:
    changes, masks = MASKS[case]
    model = model_of(changes)
    assert list(model.config.masks) == masks
    states, history = states_of(model), PROMPTS[1]
    assert_same_states(states, reference(model, features_of(history), history[-1], BLOCK))
    plain = states_of(model_of({"layer_types": KINDS} if case == "is_causal before causal" else {}))
    assert float((states - plain).abs().max()) > 0.02


@pytest.mark.parametrize(
    "case", ["is_causal, full layers", "windows both ways", "windows from a layer on"]
)
def test_trained_pass_has_the_masks_of_the_folder(case: str) -> None:
    """What is trained, and what `doctor` measures, is what is served."""
    model, tokens = model_of(MASKS[case][0]).double(), list(PROMPTS[1])
    features = features_of(tokens)
    batch = make_batch([(0, Sample(torch.tensor(tokens), features, 12))], model.config, 99, 0)
    with torch.no_grad():
        states = Pass(model, lambda ids: the_target().embed(ids))(batch).view(-1, BLOCK, 32)
        full = Pass(model_of({}).double(), lambda ids: the_target().embed(ids))(batch).view(
            -1, BLOCK, 32
        )
    at = batch.positions[1][::BLOCK].tolist().index(25)
    assert_same_states(states[at, 1:], reference(model, features[:26], tokens[25], BLOCK))
    assert float((states - full).abs().max()) > 0.02


def test_window_of_transformers_is_taken_where_none_is_given() -> None:
    written = {name: value for name, value in ZLAB.items() if name != "sliding_window"}
    config = config_of({**written, "use_sliding_window": True, "layer_types": KINDS}, "here")
    assert config.sliding_window == 4096


@torch.inference_mode()
def test_causal_blocks_run_in_the_kernels_and_windows_in_torch() -> None:
    """Float32: a causal block's rows do not depend on the rows behind them, whatever runs it."""
    target = tiny_target("llama", lean=True, dtype=torch.float32)
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))

    def states(size: int, changes: dict[str, Any]) -> tuple[Tensor, bool]:
        drafter = DFlashDrafter(PackedDraft(model_of(changes), target), block_size=size)
        drafter.observe(rows_of([[5]]), [torch.arange(40)], [features])
        return drafter._states([0], torch.tensor([7]))[0, :4], drafter.network.decoder.native

    for changes, depends in (({"is_causal": True}, False), ({}, True)):
        (short, native), (long, _) = states(4, changes), states(9, changes)
        assert native == target.decoder.native  # type: ignore[attr-defined]
        assert torch.allclose(short, long, atol=1e-4) != depends
    assert not states(4, MASKS["use_swa"][0])[1]


ROPES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "by kinds, all alike": (
        {"rope_theta": None, "rope_parameters": {k: {"rope_theta": 70.0} for k in KINDS}},
        [70.0],
    ),
    "by kinds, one of them there": (
        {"rope_parameters": {FULL: {"rope_theta": 70.0}, SLIDING: {"rope_theta": 9.0}}},
        [70.0],
    ),
    "by kinds, both there": (
        {
            "layer_types": KINDS,
            "rope_parameters": {FULL: {"rope_theta": 70.0}, SLIDING: {"rope_theta": 9.0}},
        },
        [9.0, 70.0],
    ),
    "by kinds, theta of one beside them": (
        {
            "layer_types": KINDS,
            "rope_theta": 30.0,
            "rope_parameters": {FULL: {"rope_theta": 70.0}, SLIDING: {"type": "default"}},
        },
        [30.0, 70.0],
    ),
    "theta as text": ({"rope_theta": "70.0"}, [70.0]),
    "no theta": ({"rope_theta": None}, [10000.0]),
}


@pytest.mark.parametrize("case", ROPES)
def test_rotary_positions_are_those_that_the_folder_says(case: str) -> None:
    changes, thetas = ROPES[case]
    model, history = model_of(changes), PROMPTS[1]
    states = states_of(model)
    assert_same_states(
        states, reference(model, features_of(history), history[-1], BLOCK, thetas=thetas)
    )
    assert far_from(
        states, states_of(model_of({"layer_types": changes.get("layer_types", [FULL] * 2)}))
    )
    written = json_of(model.config)
    assert config_of(written, "here") == model.config


def test_plain_module_has_the_rotary_positions_of_each_layer() -> None:
    model, history = model_of(ROPES["by kinds, both there"][0]).double(), PROMPTS[1]
    features, at = features_of(history), len(history) - 1

    def attend(layer: int, q: Tensor, context_kv: Any, block_kv: Any) -> Tensor:
        keys, values = (torch.cat(pair) for pair in zip(context_kv, block_kv, strict=True))
        return attended(q, keys, values, what_is_seen(model.config, layer, at, BLOCK, ""))

    block = the_target().embed(
        torch.tensor([history[-1]] + [model.config.mask_token_id] * (BLOCK - 1))
    )
    with torch.no_grad():
        states = model(
            model.context(features[:at]),
            block,
            (torch.arange(at), torch.arange(at, at + BLOCK)),
            attend,
        )
    assert_same_states(
        states[1:], reference(model, features, history[-1], BLOCK, thetas=(9.0, 70.0))
    )


@pytest.mark.parametrize("place", ["top", "dflash_config"])
def test_embedding_scale_is_applied(place: str) -> None:
    scale = {"input_embedding_scale": 3.0}
    model, history = model_of(scale if place == "top" else {"dflash_config": scale}), PROMPTS[1]
    states = states_of(model)
    assert_same_states(states, reference(model, features_of(history), history[-1], BLOCK))
    assert far_from(states, states_of(model_of({})))


@pytest.mark.parametrize(
    ("changes", "multiplier", "cap"),
    [
        ({"output_multiplier": 0.25}, 0.25, None),
        ({"logit_scale": 0.25}, 0.25, None),
        ({"output_multiplier": 2, "logit_scale": 0.5, "final_logit_softcapping": 2.0}, 1.0, 2.0),
        ({"output_multiplier": 0.5, "final_logit_softcapping": 3.0}, 0.5, 3.0),
        ({"final_logit_softcapping": 0.0}, 1.0, None),
    ],
)
@pytest.mark.parametrize("place", ["top", "dflash_config"])
@pytest.mark.parametrize("head", [False, True], ids=["the target's head", "a sequential head"])
def test_scores_are_those_of_the_scaled_and_capped_logits(
    changes: dict[str, Any], multiplier: float, cap: float | None, place: str, head: bool
) -> None:
    model = model_of(changes if place == "top" else {"dflash_config": changes})
    if head:
        model.add_head("swiglu", 4)  # a new one changes nothing
    network = PackedDraft(model, the_target())
    hidden = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = the_target().lm_head(hidden) * multiplier
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    _, scores = network.scored(hidden, torch.tensor([5]))
    if not head:
        assert torch.allclose(scores[..., 0], logits.log_softmax(-1).amax(-1), atol=1e-6)
    else:  # among the likely ones
        assert torch.allclose(
            scores[..., 0], logits.topk(61).values.log_softmax(-1)[..., 0], atol=1e-6
        )
    assert config_of(json_of(model.config), "here") == model.config


def test_second_request_is_drafted_like_a_first() -> None:
    engine = Engine(the_target(), new_drafter(), max_rows=1)
    several = [
        run(engine, requests([prompt]))[0]
        for prompt in (PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0])
    ]
    fresh = run(Engine(the_target(), new_drafter(), max_rows=1), requests([PROMPTS[0]]))[0]
    assert several[1].tokens == several[3].tokens == fresh.tokens
    assert (
        several[1].stats.accepted_lengths
        == several[3].stats.accepted_lengths
        == fresh.stats.accepted_lengths
    )


class Forgetful(Led):
    """The planted fault: a finished row is not forgotten."""

    def end(self, rows: Rows) -> None:
        pass


@pytest.mark.parametrize("kind", [Led, Forgetful])
def test_finished_rows_are_forgotten(kind: type[Led]) -> None:
    drafter = led(kind)
    engine = Engine(the_target(), drafter, max_rows=2)
    run(engine, requests(PROMPTS))
    assert (drafter.cache.lengths == [0, 0]) == (kind is Led)


@pytest.mark.parametrize("only", [0, BLOCK - 1], ids=["none-accepted", "all-accepted"])
def test_nothing_and_everything_accepted_give_the_plain_text(only: int) -> None:
    results = run(Engine(the_target(), led(only=only), max_rows=4), requests(PROMPTS))
    assert [result.tokens for result in results] == plain_texts(PROMPTS)
    for result in results:
        full, last = divmod(GREEDY.max_new_tokens - 1, only + 1)
        assert result.stats.accepted_lengths == [only + 1] * full + [last] * (last > 0)


@pytest.mark.parametrize("max_nodes", [1, 2, 3, BLOCK, 7])
def test_fewer_nodes_are_the_beginning_of_the_same_block(max_nodes: int) -> None:
    drafter = new_drafter()
    rows = observed(drafter, PROMPTS)
    whole = drafter.propose(rows, BLOCK)
    cut = drafter.propose(rows, max_nodes)
    width = min(max_nodes, BLOCK)
    assert cut.tokens.tolist() == whole.tokens[:, :width].tolist()
    assert cut.sizes.tolist() == [width] * len(PROMPTS)


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 30])
def test_every_block_size_gives_the_plain_text(block_size: int, max_new_tokens: int) -> None:
    params = replace(GREEDY, max_new_tokens=max_new_tokens)
    drafter = new_drafter(block_size=block_size)
    results = run(Engine(the_target(), drafter, max_rows=2), requests(PROMPTS, params))
    assert [result.tokens for result in results] == plain_texts(PROMPTS, params)
    drafted = max(result.stats.num_drafted for result in results)
    assert (drafted > 0) == (block_size > 1 and max_new_tokens > 2)


def test_sampled_text_equals_plain_sampled_text() -> None:
    params = replace(GREEDY, temperature=1.5, seed=7)
    results = run(Engine(the_target(), new_drafter(), max_rows=4), requests(PROMPTS, params))
    assert [result.tokens for result in results] == plain_texts(PROMPTS, params)
    assert plain_texts(PROMPTS, params) != plain_texts(PROMPTS)


# (f) Ragged batches: a row's drafts do not depend on its neighbours.


@dataclass
class Padded:
    """The planted fault: prompts are padded on the left to a common length, which shifts their
    positions.
    """

    drafter: DFlashDrafter

    def observe(self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor]) -> None:
        width = max(len(f) for f in features)
        padded = [torch.cat((f.new_zeros(width - len(f), f.shape[1]), f)) for f in features]
        self.drafter.observe(rows, tokens, padded)


def drafts_of(
    histories: Sequence[Sequence[int]], wrap: Callable[[DFlashDrafter], Any]
) -> list[list[int]]:
    drafter, rows = new_drafter(block_size=9), rows_of(histories)
    features = [features_of(history)[:-1] for history in histories]
    wrap(drafter).observe(rows, [torch.tensor(h[:-1]) for h in histories], features)
    proposed: list[list[int]] = drafter.propose(rows, 9).tokens.tolist()
    return proposed


def test_drafts_in_a_ragged_batch_are_those_of_each_row_alone() -> None:
    alone = [drafts_of([history], lambda drafter: drafter)[0] for history in PROMPTS]
    assert drafts_of(PROMPTS, lambda drafter: drafter) == alone


def test_left_padding_is_caught() -> None:
    alone = [drafts_of([history], Padded)[0] for history in PROMPTS]
    assert drafts_of(PROMPTS, Padded) != alone


def test_proposals_of_a_running_batch_are_those_of_each_request_alone() -> None:
    together = run(Engine(the_target(), new_drafter(), max_rows=3), requests(PROMPTS))
    for index, prompt in enumerate(PROMPTS):
        (alone,) = run(Engine(the_target(), new_drafter(), max_rows=1), requests([prompt]))
        assert alone.tokens == together[index].tokens
        assert alone.stats.accepted_lengths == together[index].stats.accepted_lengths


# (g) Memory.


def test_cache_bytes_include_the_draft_cache() -> None:
    target, drafter = the_target(), new_drafter()
    engine = Engine(target, drafter, max_rows=3)
    run(engine, requests(PROMPTS))
    plain = Engine(target, Autoregressive(), max_rows=3)
    run(plain, requests(PROMPTS))
    layers, kv_heads, head_dim, size = 2, 2, 16, 8
    own = 2 * layers * 3 * drafter.cache.slots * kv_heads * head_dim * size
    assert drafter.cache.slots >= max(len(p) for p in PROMPTS) + 30
    assert engine.cache_nbytes == plain.cache_nbytes + own


def test_weight_bytes_are_counted() -> None:
    network = new_drafter().network
    tensors = zlab_tensors()
    matrices = [t for t in tensors.values() if t.ndim == 2]
    matrices += [
        t for name, t in tensors.items() if "k_proj" in name or "v_proj" in name
    ]  # of the context, side by side
    assert network.nbytes == 8 * sum(t.numel() for t in matrices)
