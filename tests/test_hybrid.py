"""Targets whose layers keep running states: logits, features and texts are those of plain passes,
whatever was drafted and rejected before.

Transformers computes these states in float32; the toys here do it in float64, so that nothing but
rounding may differ. States that are left as a read left them, a wrong path, a freed row's state and
states that are not copied are planted, and must be far off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import (
    EOS,
    GDN,
    HYBRIDS,
    SHAPE,
    VOCAB,
    in_float64,
    requests_of,
    tiny_model,
)
from test_prefix import GREEDY, QUESTION, Pair, turns
from test_target import LAYERS, own_model, plain, worst_after_all
from torch import Tensor
from toy_arrivals import request_of
from toy_engine import METHODS, PROMPTS, SAMPLED, generate, made, run
from toy_folders import letter_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    FalconMambaConfig,
    JambaConfig,
    MambaConfig,
    NemotronHConfig,
    Qwen3_5Config,
    Zamba2Config,
)

import flashdraft.models.target
from flashdraft.engine import Engine
from flashdraft.errors import DraftMismatch, InvalidParameter, UnsupportedTarget
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.methods.draft_model import DraftModelDrafter
from flashdraft.models.cache import Running, StateCache, States
from flashdraft.models.hf import HFTarget
from flashdraft.models.states import MERGED, _MixerCache
from flashdraft.models.target import Target
from flashdraft.serve import room
from flashdraft.types import SamplingParams

EXACT, FAR = 1e-9, 0.1  # in standard deviations of what is right
LONG = tuple(3 + 7 * i % 50 for i in range(47))  # a prompt that is longer than what is merged
KINDS = ("qwen3_next", "granitemoehybrid", "lfm2")  # of states: delta rule, Mamba-2, convolution


@pytest.fixture(params=[MERGED, 0], ids=["merged", "moved at once"])
def merged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(HFTarget, "merged_tokens", request.param)
    return int(request.param)


# ---- logits and features -------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYBRIDS)
def test_trees_after_rejected_drafts_in_a_ragged_batch_read_as_plain_text(
    name: str, merged: int
) -> None:
    assert worst_after_all(made(name), own_model(name)) < EXACT


class KeepsFirst(Running):
    """The wrong path: as many nodes as were kept, from the first."""

    def keep(self, path: Sequence[int]) -> None:
        super().keep(range(len(path)))


class StaysBehindAll(Running):
    """The state is left as the whole read left it, rejected nodes included."""

    def keep(self, path: Sequence[int]) -> None:
        end = self.inputs_end
        super().keep(path)
        if end is not None:
            self.moved(end)


class ForgetsWhatWaits(Running):
    """Kept nodes of a draft that was rejected in part never come into the state."""

    def keep(self, path: Sequence[int]) -> None:
        super().keep(path)
        if self.end is None:
            self.waiting = None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, StaysBehindAll) for name in HYBRIDS),
        *((name, fault) for fault in (KeepsFirst, ForgetsWhatWaits) for name in KINDS),
    ],
)
def test_a_planted_fault_of_states_is_far_off(
    name: str, fault: type[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashdraft.models.cache, "Running", fault)
    assert worst_after_all(made(name), own_model(name)) > FAR


def read_twice(name: str) -> float:
    """One token behind a prompt, read twice and kept once, and the next token: off by how much."""
    target = made(name)
    text = list(range(20, 31))
    cache = target.new_cache(1, 16)
    target.prefill(cache, 0, torch.tensor(text[:9]), ())
    one = torch.tensor([[-1]]), torch.tensor([1])
    worst = 0.0
    for place, times in ((9, 2), (10, 1)):
        wanted = plain(own_model(name), text[: place + 1])[0][-1]
        for _ in range(times):
            logits, _ = target.forward(cache, [0], torch.tensor([[text[place]]]), *one, ())
            worst = max(worst, float((logits[0, 0] - wanted).abs().max() / wanted.std()))
        cache.keep(0, [0])
    return worst


def test_a_read_that_is_not_kept_may_be_repeated(merged: int) -> None:
    for name in HYBRIDS:
        assert read_twice(name) < EXACT, name


@pytest.mark.parametrize("name", [name for name in HYBRIDS if name != "qwen3_next"])
def test_states_that_are_not_copied_are_spoilt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixers write into what they are given of one token."""
    right = _MixerCache.__init__

    def lends(self: _MixerCache, states: Sequence[States | None]) -> None:
        right(self, states)
        for own in states:
            if own is not None and len(states) == 1:
                self._states = {kind: tensor[None] for kind, tensor in own.items()}

    monkeypatch.setattr(_MixerCache, "__init__", lends)
    monkeypatch.setattr(HFTarget, "merged_tokens", 0)
    assert read_twice(name) > FAR


@pytest.mark.parametrize("name", KINDS)
def test_prompts_of_any_lengths_beside_a_running_row_read_as_plain_text(
    name: str, merged: int
) -> None:
    """Longer than what is merged or not, of one length or not, behind nothing or something."""
    target = made(name)
    luck = random.Random(1)
    texts: list[list[int]] = [[] for _ in range(4)]
    cache = target.new_cache(4, 128)
    for counts in ((3, 0, 9, 1), (40, 40, 30, 0), (5, 40, 1, 9), (1, 1, 1, 1)):
        slots = [slot for slot in range(4) if counts[slot] > 0]
        parts = [[luck.randrange(3, VOCAB) for _ in range(counts[slot])] for slot in slots]
        states, features = target.read(cache, slots, [torch.tensor(part) for part in parts], LAYERS)
        assert features is not None
        for slot, part, own, seen in zip(slots, parts, states, features, strict=True):
            texts[slot] += part
            logits, wanted = plain(own_model(name), texts[slot])
            with torch.inference_mode():
                got = target.lm_head(own[-1])
            assert float((got - logits[-1]).abs().max() / logits.std()) < EXACT
            off_by = (seen - wanted[-len(part) :]).abs().max() / wanted.std()
            assert float(off_by) < EXACT


@pytest.mark.parametrize("name", KINDS)
def test_a_row_whose_states_are_no_numbers_spoils_no_padding_of_another(name: str) -> None:
    """Keys and values of padding would come back through a mask: 0 * NaN is NaN."""
    target = made(name)
    text = list(range(20, 31))
    cache = target.new_cache(2, 64)
    assert isinstance(cache, StateCache)
    for row in range(2):
        target.prefill(cache, row, torch.tensor(text[:9]), ())
    for own in cache._running[0].values():
        assert own.end is not None
        own.end = {kind: torch.full_like(state, torch.nan) for kind, state in own.end.items()}

    tokens = torch.tensor([[5, 6, 7, 8], [text[9], 0, 0, 0]])
    chains = torch.arange(-1, 3).expand(2, 4)
    logits, _ = target.forward(cache, [0, 1], tokens, chains, torch.tensor([4, 1]), ())
    assert not bool(logits[0].isfinite().any())
    wanted = plain(own_model(name), text[:10])[0][-1]
    assert float((logits[1, 0] - wanted).abs().max() / wanted.std()) < EXACT


@pytest.mark.parametrize("name", HYBRIDS)
def test_features_come_in_the_order_asked_for(name: str) -> None:
    target, tokens = made(name), torch.arange(10, 19)
    parts = plain(own_model(name), tokens.tolist())[1].chunk(len(LAYERS), -1)
    _, features = target.prefill(target.new_cache(1, 16), 0, tokens, (3, 0, 4))
    assert features is not None
    wanted = torch.cat([parts[i] for i in (3, 0, 4)], -1)
    assert float((features - wanted).abs().max() / wanted.std()) < EXACT


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_head_gives_the_models_own_logits(name: str) -> None:
    """Granite divides them, Falcon-H1 multiplies them."""
    target, tokens = made(name), torch.arange(10, 19)
    logits, _ = target.prefill(target.new_cache(1, 16), 0, tokens, ())
    wanted = plain(own_model(name), tokens.tolist())[0][-1]
    assert torch.allclose(logits, wanted, rtol=1e-9)


# ---- texts ---------------------------------------------------------------------------------------


def check_texts(name: str, method: str, params: Sequence[SamplingParams]) -> None:
    """Three ragged rows write what the target writes alone."""
    short = [replace(own, max_new_tokens=10) for own in params]
    results, wanted = generate(name, method, PROMPTS, short, 4)
    assert [result.tokens for result in results] == wanted


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "cheater") for name in HYBRIDS), *((name, "drawn") for name in KINDS)],
)
def test_greedy_text_is_the_plain_text(name: str, method: str) -> None:
    check_texts(name, method, (GREEDY,) * 3)


@pytest.mark.parametrize("method", ["quoting", "tree", "dflash tree"])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_seeded_sampled_text_is_the_plain_sampled_text(name: str, method: str) -> None:
    check_texts(name, method, SAMPLED)


def joined_and_left(name: str) -> bool:
    """Whether five texts in two rows, which come and go, are the plain ones."""
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1][2:], PROMPTS[2][5:]]
    params = [replace(GREEDY, max_new_tokens=count) for count in (3, 9, 5, 7, 4)]
    wanted = [
        generate(name, "autoregressive", [prompt], [own], 1)[1][0]
        for prompt, own in zip(prompts, params, strict=True)
    ]
    texts = [prompt + text for prompt, text in zip(prompts, wanted, strict=True)]
    engine = Engine(made(name), METHODS["cheater"](made(name), texts, 4), max_rows=2)
    results = run(engine, requests_of(prompts, params))
    return [result.tokens for result in results] == wanted


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_join_and_leave_have_their_own_texts(name: str) -> None:
    assert joined_and_left(name)


@pytest.mark.parametrize("name", KINDS)
def test_a_freed_row_s_state_would_change_the_next_text(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(self: StateCache, row: int) -> None:
        self.lengths[row] = 0

    monkeypatch.setattr(StateCache, "free", forgets)
    assert not joined_and_left(name)


# ---- rows that begin as others did ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("granitemoehybrid", "dflash"),
        ("qwen3_next", "plain"),
        ("lfm2", "dflash"),
        ("lfm2", "eagle3"),
    ],
)
def test_a_talk_goes_on_as_if_it_were_read_anew(name: str, method: str) -> None:
    turns(Pair(name, method))


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_samples_of_a_long_prompt_read_it_once(name: str) -> None:
    pair = Pair(name, "dflash", max_rows=3, chunk=64)
    params = SamplingParams(max_new_tokens=4, temperature=0.9)
    requests = [request_of(LONG, replace(params, seed=seed), seed) for seed in range(3)]
    results = pair.run(*requests)
    assert [result.stats.num_cached for result in results] == [0, len(LONG) - 1, len(LONG) - 1]


@pytest.mark.parametrize("name", KINDS)
def test_a_text_that_shares_less_than_a_state_stands_behind_is_read_anew(name: str) -> None:
    pair = Pair(name, "dflash")
    short = replace(GREEDY, max_new_tokens=4)
    pair.run(request_of(LONG[:27], short))
    (other,) = pair.run(request_of([*LONG[:9], *QUESTION], short, 1))
    assert other.stats.num_cached == 0


def test_a_talk_that_shares_less_does_not_cost_another_its_row() -> None:
    """The other one's end is short enough to be lost, were it not its state that is asked for."""
    pair = Pair("lfm2", "plain")
    short = replace(GREEDY, max_new_tokens=4)
    (first,) = pair.run(request_of(LONG[:27], short))
    pair.run(request_of([*LONG[:20], *QUESTION], short, 1))
    talk = [*LONG[:27], *first.tokens, *QUESTION]
    (second,) = pair.run(request_of(talk, short, 2))
    assert second.stats.num_cached == 27 + len(first.tokens) - 2


def filled(target: Target, count: int) -> StateCache:
    """Row 0 has read so many tokens: all but six at once, then four, then two of four."""
    cache = target.new_cache(3, 64)
    assert isinstance(cache, StateCache)
    text = torch.arange(3, 3 + count + 2)
    target.prefill(cache, 0, text[: count - 6], ())
    for start, num_kept in ((count - 6, 4), (count - 2, 2)):
        chain = torch.arange(-1, 3)[None]
        target.forward(cache, [0], text[None, start : start + 4], chain, torch.tensor([4]), ())
        cache.keep(0, range(num_kept))
    return cache


@pytest.mark.parametrize("name", KINDS)
def test_a_row_gives_what_waits_behind_its_state_and_no_less(name: str, merged: int) -> None:
    target = made(name)
    count = 20
    text = list(range(3, 3 + count))
    cache = filled(target, count)
    num_waiting = min(own.num_waiting for own in cache._running[0].values())
    assert num_waiting >= 2
    assert [cache.can_give(0, n) for n in (0, count - num_waiting - 1)] == [0, 0]
    assert cache.can_give(0, 99) == count
    with pytest.raises(AssertionError, match="more than it holds"):
        cache.take(1, 0, count - num_waiting - 1)
    for taken in range(count - num_waiting, count + 1):
        for row in (1, 0) if taken == count - num_waiting else (1,):
            assert cache.resume(row, 0, taken) == taken
            states, _ = target.read(cache, [row], [torch.tensor([40, 41, 42])], ())
            wanted = plain(own_model(name), [*text[:taken], 40, 41, 42])[0][-1]
            with torch.inference_mode():
                got = target.lm_head(states[0][-1])
            assert float((got - wanted).abs().max() / wanted.std()) < EXACT
            cache.free(row)
        cache = filled(target, count)
    assert cache.resume(2, 1, 5) == 0


def test_bytes_of_states_and_inputs_are_counted_and_go_with_their_row() -> None:
    target = made("qwen3_next")
    cache = filled(target, 20)
    of_slots = cache.slot_nbytes * cache.rows * cache.slots
    own = cache._running[0]
    assert len(own) == 3
    assert cache.nbytes == of_slots + sum(layer.nbytes for layer in own.values())
    (kind, state), *_ = (own[0].state or {}).items()
    assert kind == ("conv", 0)
    assert own[0].nbytes > state.numel() * state.element_size()
    cache.free(0)
    assert cache.nbytes == of_slots


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_row_keeps_no_more_memory_than_is_counted(name: str) -> None:
    """Mamba-2 gives its last state as a view of those behind every chunk of a text."""
    cache = made(name).new_cache(1, 128)
    assert isinstance(cache, StateCache)
    made(name).prefill(cache, 0, torch.tensor(LONG), ())
    storages = {}
    for own in cache._running[0].values():
        tensors = [own.waiting, *(own.state or {}).values(), *(own.end or {}).values()]
        for tensor in tensors:
            assert tensor is not None
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    assert sum(storages.values()) == cache._nbytes_of(0)


def test_a_server_counts_the_states_of_its_rows() -> None:
    lm = Model(made("lfm2"), letter_tokenizer(), Autoregressive, eos=frozenset({EOS}), max_rows=8)
    engine = room.new_engine(lm, 2, 1_000_000)
    assert engine.row_nbytes > 0
    left = 1_000_000 - engine.row_nbytes * engine.scheduler.num_rows
    assert engine.scheduler.max_tokens == left // engine.token_nbytes
    with pytest.raises(InvalidParameter, match="running states") as raised:
        room.new_engine(lm, 2, 1000)
    assert "fewer --max-rows" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_a_row_holds_no_more_than_is_counted_for_it(name: str) -> None:
    """A convolution's inputs that wait are more than its states: a short text has few of them."""
    counted = made(name).new_cache(1, 128)
    made(name).prefill(counted, 0, torch.tensor([3, 4, 5]), ())
    counted.free(0)

    cache = made(name).new_cache(1, 128)
    assert isinstance(cache, StateCache)
    made(name).prefill(cache, 0, torch.tensor(LONG), ())
    most = 0
    for step in range(40):
        shape = torch.tensor([[-1, 0, 1, 2]]), torch.tensor([4])
        made(name).forward(cache, [0], torch.tensor([[7, 8, 9, 10 + step % 3]]), *shape, ())
        most = max(most, cache._nbytes_of(0))
        cache.keep(0, [0])
        most = max(most, cache._nbytes_of(0))
    assert 0.8 * counted.row_nbytes <= most <= counted.row_nbytes


# ---- the model stays as it is --------------------------------------------------------------------


def test_nothing_stays_on_a_model_that_was_read_and_a_failed_read_changes_nothing() -> None:
    model = tiny_model("qwen3_next")
    target = HFTarget(model, "qwen3_next")
    cache = target.new_cache(1, 64)
    text = list(range(20, 33))
    target.prefill(cache, 0, torch.tensor(text[:9]), LAYERS)
    shape = torch.tensor([[-1, 0]]), torch.tensor([2])
    target.forward(cache, [0], torch.tensor([text[9:11]]), *shape, ())
    cache.keep(0, [0])

    fails = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target.forward(cache, [0], torch.tensor([text[10:12]]), *shape, ())
    fails.remove()
    logits, _ = target.forward(cache, [0], torch.tensor([text[10:12]]), *shape, ())
    wanted = plain(own_model("qwen3_next"), text[:12])[0][-1]
    assert float((logits[0, 1] - wanted).abs().max() / wanted.std()) < EXACT
    assert not any(module._forward_hooks for module in model.modules())
    patched = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert patched == ["model"]  # by conftest


def test_a_forward_that_was_on_a_mixer_before_is_used_and_stays() -> None:
    """As accelerate's."""
    model = tiny_model("lfm2")
    mixer = model.model.layers[1].conv
    stock = mixer.forward
    calls = []

    def counted(**given: Any) -> Tensor:
        calls.append(given["hidden_states"].shape)
        return stock(**given)

    mixer.forward = counted
    target = HFTarget(model, "lfm2")
    target.prefill(target.new_cache(1, 16), 0, torch.arange(5, 12), ())
    assert calls == [(1, 7, SHAPE["hidden_size"])]
    assert mixer.__dict__["forward"] is counted


# ---- which models are taken ----------------------------------------------------------------------


MAMBA1 = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: MambaConfig(**MAMBA1), "Mamba-1 layer as if nothing were before"),
        (lambda: FalconMambaConfig(**MAMBA1), "Mamba-1 layer as if nothing were before"),
        (
            lambda: JambaConfig(
                **{**SHAPE, "num_hidden_layers": 2}, mamba_d_state=4, num_experts=2
            ),
            "Mamba-1 layer as if nothing were before",
        ),
        (
            lambda: NemotronHConfig(
                **{**SHAPE, "num_hidden_layers": 2},
                layers_block_type=["mamba", "attention"],
                mamba_num_heads=4,
                mamba_head_dim=16,
                ssm_state_size=8,
                n_groups=1,
            ),
            "time_step_min",
        ),
        (
            lambda: Zamba2Config(
                **{**SHAPE, "num_hidden_layers": 2},
                layers_block_type=["mamba", "hybrid"],
                n_mamba_heads=4,
                mamba_d_state=8,
                mamba_ngroups=1,
                num_mem_blocks=1,
            ),
            "time_step_min",
        ),
    ],
)
def test_a_family_whose_own_passes_differ_is_refused_by_name(
    config: Callable[[], Any], reason: str
) -> None:
    made_config = config()
    named = f"`tiny` is a `{made_config.model_type}` model.*{reason}"
    with pytest.raises(UnsupportedTarget, match=named):
        HFTarget(tiny_model("", config=made_config), "tiny")


def unlisted(name: str) -> Any:
    model = tiny_model(name)
    model.config.model_type = "homemade"
    return model


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_unlisted_family_that_is_sound_passes_the_measurement(name: str) -> None:
    assert HFTarget(unlisted(name), "tiny").name == "tiny"


@pytest.mark.parametrize("fault", [StaysBehindAll, ForgetsWhatWaits])
def test_an_unlisted_family_whose_states_keep_rejected_drafts_is_refused(
    fault: type[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashdraft.models.cache, "Running", fault)
    for name in ("qwen3_5", "lfm2"):
        with pytest.raises(UnsupportedTarget, match="`homemade` model: a rejected draft left"):
            HFTarget(unlisted(name), "tiny")


def test_an_unlisted_family_whose_single_tokens_are_read_otherwise_is_refused() -> None:
    model = unlisted("lfm2")
    conv = model.model.layers[0].conv
    stock = conv.forward

    def odd(**given: Any) -> Tensor:
        single = given["hidden_states"].shape[1] == 1
        return stock(**given) * (2.0 if single else 1.0)

    conv.forward = odd
    with pytest.raises(UnsupportedTarget, match="`homemade` model: its tokens read one at a time"):
        HFTarget(model, "tiny")


def test_a_mamba_1_model_under_another_name_fails_the_measurement() -> None:
    config = JambaConfig(**{**SHAPE, "num_hidden_layers": 2}, mamba_d_state=4, num_experts=2)
    model = tiny_model("", config=config)
    model.config.model_type = "homemade"
    with pytest.raises(UnsupportedTarget, match="`homemade` model"):
        HFTarget(model, "tiny")


def test_a_draft_model_with_running_states_is_refused() -> None:
    with pytest.raises(DraftMismatch, match="`lfm2` keeps running states"):
        DraftModelDrafter(made("lfm2"))


# ---- inside a multimodal wrapper -----------------------------------------------------------------


def test_the_text_part_of_a_wrapper_reads_as_the_wrapper_does() -> None:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
    }
    text = {**SHAPE, **GDN}
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20.0)
    model = model.double().eval()
    decoder = model.get_decoder()
    decoder.forward = in_float64(decoder.forward)
    target = HFTarget(model, "wrapped")
    assert target.config.model_type == "qwen3_5_text"
    assert worst_after_all(target, model) < EXACT
