"""Targets against the model's own plain forward: prompts, ragged batches, and trees after rejected
drafts.

Every comparison is of logits and of all features. Forgetting the rollback, the moved path, the tree
mask or the window is planted, and must be far off.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, LEAN, SHAPE, SLIDING, VOCAB, WINDOW, tiny_model, tiny_target
from torch import Tensor
from transformers import (
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    GlmConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
    StableLmConfig,
    Starcoder2Config,
)

import flashdraft.models.lean
import flashdraft.models.target
from flashdraft.decoding.tree import ancestors
from flashdraft.errors import UnsupportedTarget
from flashdraft.models.cache import SlotCache
from flashdraft.models.hf import HFTarget
from flashdraft.models.lean import LeanTarget, unfit
from flashdraft.models.target import Target

CLOSE, FAR = 1e-5, 0.1  # in standard deviations of what is right
LEAN_CLOSE = 1e-4  # transformers computes norms in float32, whatever the model's dtype
LAYERS = tuple(range(SHAPE["num_hidden_layers"] + 1))
PROMPTS = (5, 13, 22)  # lengths; two of the three are beyond the window of the sliding families
TARGETS = [*FAMILIES, *(f"lean {family}" for family in LEAN)]


def made(name: str, dtype: torch.dtype = torch.float64) -> Target:
    return tiny_target(name.removeprefix("lean "), lean=name.startswith("lean "), dtype=dtype)


@functools.cache
def own_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model(family, dtype=dtype)


def close(name: str) -> float:
    return LEAN_CLOSE if name.startswith("lean ") else CLOSE


def plain(model: Any, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    return plain_once(model, tuple(tokens))


@functools.cache
def plain_once(model: Any, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The model's own forward, without any cache: logits [n, vocab] and features [n, (layers + 1) *
    hidden].

    `hidden_states` holds the embedding, the outputs of all blocks but the last, and the final
    normed state.
    """
    raw: list[Tensor] = []
    decoder = model.get_decoder()
    hook = (decoder.layers if hasattr(decoder, "layers") else decoder.h)[-1].register_forward_hook(
        lambda _module, _inputs, output: raw.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    hook.remove()
    states = [*out.hidden_states[1:-1], raw[0], out.hidden_states[-1]]
    return out.logits[0], torch.cat([state[0] for state in states], -1)


@dataclass
class Faults:
    """What is left out, planted by name."""

    rollback: bool = False  # the length stays as if the whole draft had been accepted
    move: bool = False  # the length is right, but the path stays where it was written


@dataclass
class Batch:
    """Three rows of a target's cache, out of order, and what was committed to each."""

    target: Target
    model: Any
    faults: Faults = field(default_factory=Faults)
    slots: tuple[int, ...] = (2, 0, 3)
    texts: list[list[int]] = field(default_factory=list)
    worst: float = 0.0  # difference, in standard deviations of what is right

    def __post_init__(self) -> None:
        self.draw = random.Random(0)
        self.cache = self.target.new_cache(4, 64)
        for slot, length in zip(self.slots, PROMPTS, strict=True):
            self.texts.append(self.tokens(length))
            logits, features = self.target.prefill(
                self.cache, slot, torch.tensor(self.texts[-1]), LAYERS
            )
            wanted, wanted_features = plain(self.model, self.texts[-1])
            self.compare(logits, wanted[-1])
            self.compare(features, wanted_features)

    def tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(3, VOCAB) for _ in range(count)]

    def compare(self, got: Tensor | None, wanted: Tensor) -> None:
        assert got is not None
        assert got.shape == wanted.shape
        self.worst = max(self.worst, float((got - wanted).abs().max() / wanted.std()))

    def step(self, parents: list[list[int]], paths: list[list[int]]) -> None:
        """Read a tree per row, compare every node with a plain forward of a leaf's own text, keep a
        path of it.
        """
        width = max(map(len, parents))
        tokens = [self.tokens(len(own)) for own in parents]
        padded = torch.tensor([[*own, *[0] * (width - len(own))] for own in tokens])
        shape = torch.tensor([[*own, *[0] * (width - len(own))] for own in parents])
        sizes = torch.tensor([len(own) for own in parents])
        logits, features = self.target.forward(self.cache, self.slots, padded, shape, sizes, LAYERS)
        assert features is not None
        for row, own in enumerate(parents):
            for leaf in set(range(len(own))) - set(own):
                path = lineage(own, leaf)
                wanted, wanted_features = plain(
                    self.model, self.texts[row] + [tokens[row][n] for n in path]
                )
                self.compare(logits[row, path], wanted[-len(path) :])
                self.compare(features[row, path], wanted_features[-len(path) :])
            self.texts[row] += [tokens[row][node] for node in paths[row]]
            self.keep(self.slots[row], len(own), paths[row])

    def keep(self, slot: int, size: int, path: list[int]) -> None:
        if self.faults.rollback:
            self.cache.keep(slot, range(size))
        elif self.faults.move:
            self.cache.keep(slot, range(len(path)))
        else:
            self.cache.keep(slot, path)


def lineage(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*lineage(parents, parents[node]), node]


DEEP = [
    -1,
    0,
    0,
    *(node - 1 - node % 2 for node in range(3, 22)),
]  # a spine of odd nodes, deeper than the window; even leaves
TREES = [[-1, 0, 0, 1, 1, 2, 4, 2, 6], [-1, 0, 0, 0, 3, 3], DEEP]
TREE_PATHS = [[0, 1, 4, 6, 8], [0, 3, 5], [0, *range(1, 21, 2)]]


def worst_after_all(target: Target, model: Any, faults: Faults | None = None) -> float:
    """A prompt per row, a draft that is rejected at three different places, a tree, a path of it
    kept, and more.
    """
    batch = Batch(target, model, faults or Faults())
    batch.step([[-1, 0, 1, 2, 3], [-1, 0, 1], [-1, 0, 1, 2]], [[0], [0, 1], [0, 1, 2, 3]])
    batch.step(TREES, TREE_PATHS)
    batch.step([[-1], [-1, 0, 0, 1], [-1, 0, 1]], [[0], [0, 2], [0]])
    batch.step([[-1, 0], [-1, 0], [-1, 0]], [[0], [0], [0]])
    return batch.worst


@pytest.mark.parametrize("name", TARGETS)
def test_trees_after_rejected_drafts_in_a_ragged_batch_read_as_plain_text(name: str) -> None:
    assert worst_after_all(made(name), own_model(name.removeprefix("lean "))) < close(name)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("fault", ["rollback", "move"])
def test_a_forgotten_rollback_is_far_off(name: str, fault: str) -> None:
    model = own_model(name.removeprefix("lean "))
    assert worst_after_all(made(name), model, Faults(**{fault: True})) > FAR


@pytest.mark.parametrize("name", TARGETS)
def test_a_tree_read_as_a_chain_is_far_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(parents: Tensor) -> Tensor:
        return torch.ones_like(ancestors(parents)).tril()

    monkeypatch.setattr(flashdraft.models.hf, "ancestors", causal)
    monkeypatch.setattr(flashdraft.models.lean, "ancestors", causal)
    assert worst_after_all(made(name), own_model(name.removeprefix("lean "))) > FAR


@pytest.mark.parametrize("family", SLIDING)
def test_a_window_counted_in_slots_is_far_off(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tree, a node's slot is not its position."""

    def by_slot(
        self: HFTarget, seen: Tensor, positions: Tensor, held: Tensor, masks: Any = HFTarget._masks
    ) -> Any:
        return masks(self, seen, positions, torch.arange(held.shape[1]).expand_as(held))

    monkeypatch.setattr(HFTarget, "_masks", by_slot)
    assert worst_after_all(made(family), own_model(family)) > FAR


@pytest.mark.parametrize("family", SLIDING)
def test_the_texts_are_longer_than_the_window(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests of the sliding families would show nothing."""
    assert min(PROMPTS[1:]) > WINDOW
    config = made(family).config
    monkeypatch.setattr(config, "sliding_window", None)
    assert worst_after_all(made(family), own_model(family)) > FAR


@pytest.mark.parametrize("name", TARGETS)
def test_a_prompt_read_in_chunks_is_the_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashdraft.models.target, "PREFILL_CHUNK", 5)
    assert worst_after_all(made(name), own_model(name.removeprefix("lean "))) < close(name)


@pytest.mark.parametrize("name", TARGETS)
def test_features_come_in_the_order_asked_for_and_none_if_none_are(name: str) -> None:
    target, tokens = made(name), torch.arange(10, 19)
    parts = plain(own_model(name.removeprefix("lean ")), tokens.tolist())[1].chunk(len(LAYERS), -1)
    cache = target.new_cache(1, 16)
    _, features = target.prefill(cache, 0, tokens, (3, 0, 4))
    assert features is not None
    wanted = torch.cat([parts[i] for i in (3, 0, 4)], -1)
    assert float((features - wanted).abs().max() / wanted.std()) < close(name)
    assert target.prefill(cache, 0, tokens, ())[1] is None
    shape = tokens[None, :2], torch.tensor([[-1, 0]]), torch.tensor([2])
    assert target.forward(cache, [0], *shape, ())[1] is None
    _, again = target.forward(cache, [0], *shape, (4,))  # hooks of other calls are gone
    assert again is not None
    assert again.shape == (1, 2, SHAPE["hidden_size"])


def test_no_hook_stays_on_a_model_that_was_read() -> None:
    model = tiny_model("llama")
    target = HFTarget(model, "llama")
    cache = target.new_cache(1, 16)
    target.prefill(cache, 0, torch.tensor([5, 6]), LAYERS)
    with pytest.raises(IndexError):
        target.prefill(cache, 0, torch.tensor([VOCAB]), LAYERS)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", TARGETS)
def test_embedding_and_head_are_the_models_own(name: str) -> None:
    target, model = made(name), own_model(name.removeprefix("lean "))
    tokens = torch.tensor([[3, 60], [7, 7]])
    with torch.no_grad():
        assert torch.equal(target.embed(tokens), model.get_input_embeddings()(tokens))
        hidden = torch.randn(
            2,
            3,
            SHAPE["hidden_size"],
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
        )
        assert torch.allclose(target.lm_head(hidden), model.lm_head(hidden), atol=1e-9)
        assert torch.equal(target.head_weight(torch.tensor([5, 60])), model.lm_head.weight[[5, 60]])


def scaled(config: Callable[..., Any], **more: Any) -> Callable[[], Any]:
    return lambda: config(**{**SHAPE, **more})


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LEAN_CONFIGS = {
    **{family: FAMILIES[family] for family in LEAN},
    "llama with biases": scaled(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama, one key head": scaled(LlamaConfig, num_key_value_heads=1),
    "llama, all key heads": scaled(LlamaConfig, num_key_value_heads=4),
    "llama, wide heads": scaled(LlamaConfig, head_dim=16),
    "llama, tied": scaled(LlamaConfig, tie_word_embeddings=True),
    "llama, rope llama3": scaled(LlamaConfig, rope_parameters=LLAMA3),
    "llama, rope linear": scaled(
        LlamaConfig, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "qwen3 with biases": scaled(Qwen3Config, head_dim=8, attention_bias=True),
    "qwen3, rope yarn": scaled(Qwen3Config, head_dim=8, rope_parameters=YARN),
    "qwen2, wide": scaled(Qwen2Config, hidden_size=48),
}


def with_random_vectors(model: Any) -> Any:
    """Biases start at zero and norms at one, where leaving them out would go unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("name", LEAN_CONFIGS)
def test_the_lean_target_is_the_hugging_face_target(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashdraft.models.target, "PREFILL_CHUNK", 8)
    model = with_random_vectors(tiny_model("", dtype=torch.float32, config=LEAN_CONFIGS[name]()))
    assert LeanTarget.fits(model.config)
    lean, stock = LeanTarget(model, name), HFTarget(model, name)
    facts = ("vocab_size", "hidden_size", "num_layers", "context_length")
    assert [getattr(lean, fact) for fact in facts] == [getattr(stock, fact) for fact in facts]
    assert worst_after_all(lean, model) < LEAN_CLOSE


@pytest.mark.parametrize(
    "vector", ["input_norm", "post_norm", "q_norm", "k_norm", "qkv", "out", "gate_up", "down"]
)
def test_a_dropped_bias_or_norm_of_the_lean_target_is_far_off(vector: str) -> None:
    biased = vector in ("gate_up", "down")
    model = with_random_vectors(
        tiny_model(
            "", config=LEAN_CONFIGS["llama with biases" if biased else "qwen3 with biases"]()
        )
    )
    lean = LeanTarget(model, "faulty")
    norms, linears = lean.decoder.norms[1], lean.decoder.linears[1]
    if vector in norms:
        norms[vector] = torch.ones_like(norms[vector])
    else:
        linears[vector].bias = None
    assert worst_after_all(lean, model) > FAR


@pytest.mark.parametrize(
    "config",
    [
        scaled(Qwen2Config, hidden_act="gelu"),
        scaled(MistralConfig, sliding_window=8),
        scaled(Qwen3Config, use_sliding_window=True, sliding_window=8, max_window_layers=2),
        scaled(
            LlamaConfig,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        ),
        scaled(
            LlamaConfig,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
        scaled(GlmConfig, head_dim=8),
        scaled(Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=2),
        lambda: SimpleNamespace(
            model_type="qwen3",
            hidden_act="silu",
            layer_types=["full_attention"] * 2,
            rope_parameters={"full_attention": {"rope_theta": 1e6}},
        ),
    ],
)
def test_what_the_lean_target_cannot_compute_is_left_to_transformers(
    config: Callable[[], Any],
) -> None:
    assert not LeanTarget.fits(config())


UNLISTED = {
    "glm": scaled(GlmConfig, head_dim=8),
    "olmo2": scaled(Olmo2Config),
    "stablelm": scaled(StableLmConfig),
    "gemma2": scaled(Gemma2Config, head_dim=8, sliding_window=WINDOW),  # caps its logits
    "granite": scaled(GraniteConfig, logits_scaling=4.0),
    "deepseek_v3": scaled(  # its keys and values differ in size
        DeepseekV3Config,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "starcoder2": scaled(Starcoder2Config, sliding_window=WINDOW),
    "opt": scaled(OPTConfig, ffn_dim=64, word_embed_proj_dim=32),  # learned positions
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_family_that_passes_the_measurement_is_right(name: str) -> None:
    model = tiny_model("", config=UNLISTED[name]())
    assert worst_after_all(HFTarget(model, name), model) < CLOSE


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
            "running state \\(recurrent\\)",
        ),
        (
            lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
            "no max_position_embeddings",
        ),
        (scaled(CohereConfig, logit_scale=0.25), "does not give its own logits"),
    ],
)
def test_a_family_that_would_be_wrong_is_refused_by_name(
    config: Callable[[], Any], reason: str
) -> None:
    made_config = config()
    with pytest.raises(
        UnsupportedTarget, match=f"`tiny` is a `{made_config.model_type}` model.*{reason}"
    ) as raised:
        HFTarget(tiny_model("", config=made_config), "tiny")
    assert "llama" in str(raised.value.hint)


def an_unknown_llama() -> Any:
    model = tiny_model("llama")
    model.config.model_type = "homemade"
    return model


def test_the_measurement_passes_an_unknown_family_that_is_sound() -> None:
    assert HFTarget(an_unknown_llama(), "tiny").name == "tiny"


def test_a_family_that_remembers_rejected_drafts_is_refused() -> None:
    """Every token also sees the embedding before it, which the model keeps between calls, as
    convolutions do.
    """
    model = an_unknown_llama()
    last: dict[SlotCache, Tensor] = {}
    caches: list[SlotCache | None] = [None]

    def enter(_module: Any, _inputs: Any, given: dict[str, Any]) -> None:
        caches[0] = getattr(given.get("past_key_values"), "cache", None)

    def shift(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        before = torch.zeros_like(embedded[:, :1])
        if caches[0] is not None:
            before, last[caches[0]] = last.get(caches[0], before), embedded[:, -1:].clone()
        return embedded + torch.cat([before, embedded[:, :-1]], 1)

    model.model.register_forward_pre_hook(enter, with_kwargs=True)
    model.model.embed_tokens.register_forward_hook(shift)
    with pytest.raises(
        UnsupportedTarget, match="`tiny` is a `homemade` model: a rejected draft left a trace"
    ):
        HFTarget(model, "tiny")


def test_a_family_that_ignores_our_cache_is_refused() -> None:
    model = an_unknown_llama()
    forward = model.model.forward

    def stubborn(**given: Any) -> Any:
        return forward(
            **{**given, "past_key_values": None, "use_cache": False, "attention_mask": None}
        )

    model.model.forward = stubborn
    with pytest.raises(UnsupportedTarget, match="does not give its own logits"):
        HFTarget(model, "tiny")


def test_a_family_whose_passes_give_no_numbers_is_refused() -> None:
    """No maximum shows a NaN behind another number."""
    model = an_unknown_llama()

    def spoil(_module: Any, given: tuple[Tensor]) -> Tensor | None:
        (states,) = given
        return torch.full_like(states, torch.nan) if states.shape[:-1] == (1, 1) else None

    model.lm_head.register_forward_pre_hook(spoil)
    with pytest.raises(UnsupportedTarget, match="read one at a time give another text"):
        HFTarget(model, "tiny")


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_padding_beside_a_row_at_the_end_of_the_context_reads_no_position_beyond_it(
    name: str,
) -> None:
    config = UNLISTED[name]()
    model = tiny_model("", config=config)
    target = HFTarget(model, name)
    cache, text = target.new_cache(2, 300), [3 + i % 50 for i in range(target.context_length)]
    target.prefill(cache, 0, torch.tensor(text[:-1]), ())
    target.prefill(cache, 1, torch.tensor(text[:4]), ())
    tokens = torch.tensor([[text[-1], 0, 0, 0], text[4:8]])
    chain = torch.arange(-1, 3).expand(2, 4)
    logits, _ = target.forward(cache, [0, 1], tokens, chain, torch.tensor([1, 4]), ())
    assert float((logits[0, 0] - plain(model, text)[0][-1]).abs().max()) < CLOSE
    assert float((logits[1] - plain(model, text[:8])[0][-4:]).abs().max()) < CLOSE


def test_longrope_ends_the_context_where_its_frequencies_would_change() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    config = Phi3Config(**SHAPE, original_max_position_embeddings=32, rope_parameters=rope)
    model = tiny_model("", config=config)
    target = HFTarget(model, "phi3")
    assert target.context_length == 32
    cache, text = SlotCache(target.num_layers, 2, 64), list(range(3, 43))
    target.prefill(cache, 0, torch.tensor(text), ())
    target.prefill(cache, 1, torch.tensor(text[:8]), ())
    chain, sizes = torch.tensor([[-1], [-1]]), torch.tensor([1, 1])
    beside, _ = target.forward(cache, [0, 1], torch.tensor([[50], [50]]), chain, sizes, ())
    alone, _ = target.forward(cache, [1], torch.tensor([[50]]), chain[:1], sizes[:1], ())
    assert float((beside[1] - alone[0]).abs().max()) > FAR  # why: a longer neighbour changes a text


# What the lean target takes: only parts whose class it knows.


class OtherLinear(torch.nn.Linear):
    """As a quantised linear or an adapter's: the weight is not all that it computes with."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.0


class OtherParameter(Tensor):
    """As a quantised weight in a plain linear."""


def with_part(model: Any, name: str, part: Any) -> None:
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, part)


def planted(where: str) -> Any:
    """A llama with one part that is not its family's own."""
    model = tiny_model("llama", dtype=torch.float32)
    layer, config = model.model.layers[1], model.config
    if where == "linear":
        with_part(model, "model.layers.1.mlp.down_proj", OtherLinear(64, 32, bias=False))
    elif where == "head":
        with_part(model, "lm_head", OtherLinear(32, VOCAB, bias=False))
    elif where == "norm":
        with_part(model, "model.layers.1.input_layernorm", torch.nn.LayerNorm(32))
    elif where == "activation":
        with_part(model, "model.layers.1.mlp.act_fn", torch.nn.GELU())
    elif where == "attention":
        own = type("OtherAttention", (type(layer.self_attn),), {})
        with_part(model, "model.layers.1.self_attn", own(config, 1))
    elif where == "rotary":
        own = type("OtherRotary", (type(model.model.rotary_emb),), {})
        with_part(model, "model.rotary_emb", own(config))
    elif where == "more":
        with_part(model, "model.layers.1.mlp.lora", torch.nn.Identity())
    elif where == "forward":
        layer.mlp.forward = lambda x: x
    elif where == "hook":
        layer.mlp.register_forward_hook(lambda *_: None)
    elif where == "parameter":
        layer.mlp.down_proj.weight = torch.nn.Parameter(
            layer.mlp.down_proj.weight.detach().as_subclass(OtherParameter)
        )
    elif where == "dtype":
        layer.mlp.down_proj.to(torch.bfloat16)
    return model


PLANTED = {
    "linear": "`model.layers.1.mlp.down_proj` is a OtherLinear",
    "head": "`lm_head` is a OtherLinear",
    "norm": "`model.layers.1.input_layernorm` is a LayerNorm",
    "activation": "`model.layers.1.mlp.act_fn` is a GELU",
    "attention": "`model.layers.1.self_attn` is a OtherAttention",
    "rotary": "`model.rotary_emb` is a OtherRotary",
    "more": "`model.layers.1.mlp.lora` is a Identity",
    "forward": "`model.layers.1.mlp` has a forward of its own",
    "hook": "`model.layers.1.mlp` has a forward of its own",
    "parameter": "`model.layers.1.mlp.down_proj.weight` is a OtherParameter",
    "dtype": "`model.layers.1.mlp.down_proj.weight` is torch.bfloat16",
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_part_of_another_class_is_named_and_left_to_transformers(where: str) -> None:
    assert PLANTED[where] in str(unfit(planted(where)))


@pytest.mark.parametrize("family", LEAN)
def test_a_family_s_own_parts_are_all_known(family: str) -> None:
    assert unfit(tiny_model(family)) is None


def test_an_output_layer_of_another_class_is_refused() -> None:
    """Its rows are read by drafters, and its number is the vocabulary's."""
    with pytest.raises(UnsupportedTarget, match="its output layer is a OtherLinear"):
        HFTarget(planted("head"), "odd")


def test_planted_fault_a_linear_read_as_a_plain_weight_is_another_model() -> None:
    model = planted("linear")
    assert worst_after_all(LeanTarget(model, "faulty"), model) > FAR


# Rotary positions.

SCALED: dict[str, tuple[dict[str, Any], int]] = {
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    "yarn by its old name": ({"type": "yarn", "factor": 4.0}, 256),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 128),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        128,
    ),
    "none": ({"rope_type": "default"}, 64),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SCALED)
def test_context_of_a_scaled_target_is_the_scaled_one(case: str) -> None:
    rope, length = SCALED[case]
    config = LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 64}, rope_scaling={"rope_theta": 1e4, **rope}
    )
    model = tiny_model("", config=config)
    lean, stock = LeanTarget(model, "lean", kernel="torch"), HFTarget(model, "stock")
    assert (lean.context_length, stock.context_length) == (length, length)
    tokens = torch.arange(length) % 50 + 3
    got, wanted = (
        target.prefill(target.new_cache(1, length), 0, tokens, ())[0] for target in (lean, stock)
    )
    assert float((got - wanted).abs().max()) < LEAN_CLOSE * 10


def test_lean_target_reads_far_beyond_its_first_table() -> None:
    model = tiny_model("", config=LlamaConfig(**{**SHAPE, "max_position_embeddings": 4096}))
    lean, stock = LeanTarget(model, "lean", kernel="torch"), HFTarget(model, "stock")
    (rotary,) = lean.decoder.rotaries
    assert len(rotary.tables[0]) == 256
    tokens = torch.arange(700) % 50 + 3
    got, wanted = (
        target.prefill(target.new_cache(1, 704), 0, tokens, ())[0] for target in (lean, stock)
    )
    assert float((got - wanted).abs().max()) < LEAN_CLOSE * 10
    assert len(rotary.tables[0]) < 4096
    exact = LeanTarget(tiny_model("", dtype=torch.float32, config=model.config), "kernels")
    assert torch.allclose(
        exact.prefill(exact.new_cache(1, 704), 0, tokens, ())[0].double(), wanted, atol=1e-2
    )


def test_rotary_parameters_by_kinds_that_the_family_does_not_read_are_refused() -> None:
    """Transformers would take its default theta for them."""
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}
    model = tiny_model("", config=LlamaConfig(**SHAPE, rope_parameters=rope))
    assert not LeanTarget.fits(model.config)
    with pytest.raises(UnsupportedTarget, match="told by kinds of layers"):
        HFTarget(model, "odd")
