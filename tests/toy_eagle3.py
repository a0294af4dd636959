"""EAGLE-3 folders of every dialect as they are published, shrunk, what each means told beside its
config.json, and a slow definition of what it drafts: one pair, one layer and one head at a time.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from conftest import EOS, SHAPE, VOCAB, tiny_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.models.lean import LeanTarget
from flashdraft.types import Rows, SamplingParams

DEPTH, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 8, 32, 48, 4, 2, 10
HISTORIES = ((5, 9, 31), (7, 7, 12, 50, 3, 22, 17, 8, 40, 41, 9))
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True)
KEPT = tuple(range(3, 43))  # the reduced vocabulary: draft id i is token i + 3
IDS = "eagle_aux_hidden_state_layer_ids"

LLAMA: dict[str, Any] = {  # what SafeAILab, SpecForge and AngelSlim publish, shrunk
    "architectures": ["LlamaForCausalLMEagle3"],
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB,
    "draft_vocab_size": len(KEPT),
}
LAYER: dict[str, Any] = {  # speculators' transformer_layer_config
    "attention_bias": False,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "vocab_size": VOCAB,
}
WRAPPER: dict[str, Any] = {
    "architectures": ["Eagle3Speculator"],
    "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
    "draft_vocab_size": len(KEPT),
    IDS: [2, 4, 7],
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some/llama"},
    },
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformer_layer_config": LAYER,
}
DEEPSPEC: dict[str, Any] = {  # a copy of its target's config
    **LLAMA,
    "architectures": ["Qwen3Eagle3Model"],
    "attention_bias": False,
    "layer_types": ["full_attention"],
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_target_layers": DEPTH,
    "sliding_window": None,
    "target_layer_ids": [0, 2, 4, 5, 7],
    "ttt_length": 7,
    "use_sliding_window": False,
}
del DEEPSPEC["draft_vocab_size"]


@dataclass(frozen=True)
class Meaning:
    """What a folder's network computes, told beside its config.json and not by it."""

    outputs: tuple[int, ...] = (1, 3, 6)  # the target's blocks whose outputs are read
    first: str = "midlayer"  # the first layer's name
    num_layers: int = 1
    width: int = HIDDEN  # of the network
    drafts: int = 5
    residual_normed: bool = False
    output_normed: bool = False
    fused: bool = True
    head_norms: bool = False
    biases: bool = False
    norms_before_fc: str = ""  # "one", "each", or "old": three by their old names
    own_embedding: bool = False
    own_head: bool = True
    copies: bool = False  # of the target's embedding and lm_head
    reduced: bool = True


@dataclass(frozen=True)
class Case:
    config: Mapping[str, Any]
    meaning: Meaning


PLAIN = Meaning()
SPECULATORS = Meaning(first="layers.0", residual_normed=True, own_embedding=True, drafts=3)


def flat(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, **changes}


def wrapped(layer: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    inner = {**LAYER, **(layer or {})}
    return {**WRAPPER, "transformer_layer_config": inner, **changes}


CASES: dict[str, Case] = {
    "SafeAILab, no ids": Case(flat(), replace(PLAIN, outputs=(1, 3, 4))),
    "SafeAILab, the target's head": Case(
        flat(draft_vocab_size=VOCAB),
        replace(PLAIN, outputs=(1, 3, 4), own_head=False, reduced=False),
    ),
    "SpecForge, outputs": Case(flat(eagle_config={IDS: [1, 3, 6]}), PLAIN),
    "SpecForge, norms each": Case(
        flat(eagle_config={IDS: [1, 3, 6]}, fc_norm=True),
        replace(PLAIN, norms_before_fc="each"),
    ),
    "SpecForge, norms by old names": Case(
        flat(eagle_config={IDS: [1, 3, 6]}, use_aux_norm=True),
        replace(PLAIN, norms_before_fc="old"),
    ),
    "NVIDIA, states up to the last": Case(
        flat(
            architectures=["Eagle3LlamaForCausalLM"],
            eagle_config={IDS: [2, 5, 8], "use_aux_hidden_state": True},
        ),
        replace(PLAIN, outputs=(1, 4, 7)),
    ),
    "NVIDIA, one norm before fc": Case(
        flat(eagle_config={IDS: [1, 3, 6], "norm_before_fc": True}),
        replace(PLAIN, norms_before_fc="one"),
    ),
    "NVIDIA, one feature": Case(
        flat(eagle_config={"use_aux_hidden_state": False}),
        replace(PLAIN, outputs=(DEPTH,), fused=False),
    ),
    "vLLM, ids at the top": Case(
        flat(architectures=["LlamaEagle3DraftModel"], **{IDS: [2, 4, 8]}, norm_output=True),
        replace(PLAIN, outputs=(1, 3, 7), output_normed=True),
    ),
    "a width of its own": Case(
        flat(hidden_size=24, target_hidden_size=HIDDEN, eagle_config={IDS: [1, 3, 6]}),
        replace(PLAIN, width=24, own_embedding=True),
    ),
    "tied to its own embedding": Case(
        flat(draft_vocab_size=VOCAB, tie_word_embeddings=True),
        replace(PLAIN, outputs=(1, 3, 4), own_embedding=True, own_head=False, reduced=False),
    ),
    "speculators, a Llama's layer": Case(wrapped(), SPECULATORS),
    "speculators, two of Qwen3's layers": Case(
        wrapped(
            {"model_type": "qwen3", "num_hidden_layers": 2},
            architectures=["Eagle3DraftModel"],
            norm_before_residual=False,
            norm_output=True,
            fc_norm=True,
        ),
        replace(
            SPECULATORS,
            num_layers=2,
            head_norms=True,
            residual_normed=False,
            output_normed=True,
            norms_before_fc="each",
        ),
    ),
    "speculators, biases": Case(
        wrapped({"attention_bias": True}, **{IDS: None}),
        replace(SPECULATORS, outputs=(1, 3, 4), biases=True),
    ),
    "DeepSpec": Case(
        DEEPSPEC,
        Meaning(
            outputs=(0, 2, 4, 5, 7),
            first="layers.0",
            head_norms=True,
            own_head=False,
            copies=True,
            reduced=False,
            drafts=7,
        ),
    ),
}


# --- The folders


def tensors_of(meaning: Meaning, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor under its published name."""
    width = meaning.width
    num_features = len(meaning.outputs)
    queries = HEADS * HEAD_DIM
    keys = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"norm": (width,)}
    for index in range(meaning.num_layers):
        place = meaning.first if index == 0 else f"layers.{index}"
        inputs = 2 * width if index == 0 else width
        shapes |= {
            f"{place}.self_attn.q_proj": (queries, inputs),
            f"{place}.self_attn.k_proj": (keys, inputs),
            f"{place}.self_attn.v_proj": (keys, inputs),
            f"{place}.self_attn.o_proj": (width, queries),
            f"{place}.mlp.gate_proj": (INNER, width),
            f"{place}.mlp.up_proj": (INNER, width),
            f"{place}.mlp.down_proj": (width, INNER),
            f"{place}.input_layernorm": (width,),
            f"{place}.post_attention_layernorm": (width,),
        }
        if meaning.head_norms:
            shapes[f"{place}.self_attn.q_norm"] = (HEAD_DIM,)
            shapes[f"{place}.self_attn.k_norm"] = (HEAD_DIM,)
    shapes[f"{meaning.first}.hidden_norm"] = (width,)
    if meaning.fused:
        shapes["fc"] = (width, num_features * HIDDEN)
    for name in norm_names(meaning):
        shapes[name] = (HIDDEN,) if len(norm_names(meaning)) > 1 else (num_features * HIDDEN,)
    if meaning.own_embedding:
        shapes["embed_tokens"] = (VOCAB, width)
    if meaning.own_head:
        shapes["lm_head"] = (len(KEPT) if meaning.reduced else VOCAB, width)

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator) * 0.3
        tensors[f"{name}.weight"] = noise + 1 if len(shape) == 1 else noise
    if meaning.biases:
        for name in [name for name in tensors if "self_attn" in name]:
            rows = len(tensors[name])
            noise = torch.randn(rows, generator=generator) * 0.3
            tensors[name.replace(".weight", ".bias")] = noise
    if meaning.copies:
        everything = torch.arange(VOCAB)
        tensors["embed_tokens.weight"] = the_target().embed(everything).float()
        tensors["lm_head.weight"] = the_target().head_weight(everything).float()
    if meaning.reduced:
        kept = torch.tensor(KEPT)
        tensors["d2t"] = kept - torch.arange(len(KEPT))
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True)
    return tensors


def norm_names(meaning: Meaning) -> list[str]:
    """Of the norms before fc."""
    return {
        "": [],
        "one": ["input_norm"],
        "each": [f"fc_norm.{index}" for index in range(len(meaning.outputs))],
        "old": ["aux_norm_low", "aux_norm_mid", "aux_norm_high"],
    }[meaning.norms_before_fc]


def published(folder: Path, name: str, **changes: Any) -> Path:
    case = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**case.config, **changes}))
    save_file(tensors_of(case.meaning), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def the_target() -> LeanTarget:
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": DEPTH})
    return LeanTarget(tiny_model("llama", config=config), "llama")


@functools.cache
def features_of(tokens: tuple[int, ...]) -> Tensor:
    """[n, layers + 1, hidden], of every layer."""
    target = the_target()
    text = torch.tensor(tokens)
    _, features = target.prefill(target.new_cache(1, 64), 0, text, range(DEPTH + 1))
    assert features is not None
    return features.view(len(tokens), DEPTH + 1, HIDDEN)


def rows_of(history: Sequence[int]) -> Rows:
    return Rows([0], [list(history)], [GREEDY], [1])


def drafted(folder: Path, history: Sequence[int], **options: Any) -> Any:
    """What a fresh drafter proposes behind `history`, which it observed in two pieces."""
    drafter = Eagle3DraftModel.from_pretrained(folder).drafters(the_target())(**options)
    seen = features_of(tuple(history[:-1]))[:, list(drafter.layers)].flatten(1)
    for part in torch.arange(len(history) - 1).tensor_split(2):
        if len(part):
            drafter.observe(rows_of(history), [torch.tensor(history)[part]], [seen[part]])
    return drafter.propose(rows_of(history), 99)


# --- The definition


@dataclass
class Definition:
    """What one folder drafts. faults: mistakes by name."""

    meaning: Meaning
    fault: str = ""

    def __post_init__(self) -> None:
        self.tensors = {name: t.double() for name, t in tensors_of(self.meaning).items()}

    def weight(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = self.weight(name) @ x
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None or self.fault == "biases are left out" else y + bias

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + 1e-6).sqrt() * self.weight(name)

    def embed(self, token: int) -> Tensor:
        if self.meaning.own_embedding and self.fault != "the embedding is the target's":
            return self.weight("embed_tokens")[token]
        return the_target().embed(torch.tensor(token))

    def fused(self, history: Sequence[int]) -> list[Tensor]:
        """g of every position that the target has read."""
        shift = {"ids are one too high": 1, "ids are one too low": -1}.get(self.fault, 0)
        outputs = [layer + shift for layer in self.meaning.outputs]
        states = []
        for position in features_of(tuple(history[:-1])):
            parts = [position[layer] for layer in outputs]
            names = norm_names(self.meaning)
            if self.fault == "norms before fc are left out":
                names = []
            if len(names) > 1:
                parts = [self.norm(x, name) for x, name in zip(parts, names, strict=True)]
            both = torch.cat(parts)
            if len(names) == 1:
                both = self.norm(both, names[0])
            states.append(self.linear(both, "fc") if self.meaning.fused else both)
        return states

    def law(self, state: Tensor) -> Tensor:
        """Log-probabilities [draft vocabulary] behind a normed state."""
        target_head = the_target().head_weight(torch.arange(VOCAB))
        if self.meaning.own_head and self.fault != "the head is the target's":
            head = self.weight("lm_head")
        elif self.meaning.own_head:
            head = target_head[list(KEPT)] if self.meaning.reduced else target_head
        elif self.meaning.own_embedding:
            head = self.weight("embed_tokens")
        else:
            head = target_head
        return (head @ state).log_softmax(-1)

    def token_of(self, draft: int) -> int:
        if not self.meaning.reduced:
            return draft
        offset = int(self.tensors["d2t"][draft])
        return offset if self.fault == "d2t holds ids" else draft + offset

    def step(self, place: int, x: Tensor, residual: Tensor, index: int, seen: Any) -> Tensor:
        """One layer at one position; seen: its keys and values so far, which grow."""
        layer = self.meaning.first if index == 0 else f"layers.{index}"
        attention = f"{layer}.self_attn"
        q, k, v = (
            self.linear(x, f"{attention}.{name}_proj").view(-1, HEAD_DIM)
            for name in ("q", "k", "v")
        )
        if self.meaning.head_norms and self.fault != "norms of q and k are left out":
            q = torch.stack([self.norm(head, f"{attention}.q_norm") for head in q])
            k = torch.stack([self.norm(head, f"{attention}.k_norm") for head in k])
        seen.append((rotated(k, place), v))
        heads = []
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            query = rotated(q, place)[head]
            scores = torch.stack([query @ keys[group] for keys, _ in seen]) / math.sqrt(HEAD_DIM)
            heads.append(scores.softmax(0) @ torch.stack([values[group] for _, values in seen]))
        x = residual + self.linear(torch.cat(heads), f"{attention}.o_proj")
        y = self.norm(x, f"{layer}.post_attention_layernorm")
        gate = self.linear(y, f"{layer}.mlp.gate_proj")
        inner = gate * torch.sigmoid(gate) * self.linear(y, f"{layer}.mlp.up_proj")
        return x + self.linear(inner, f"{layer}.mlp.down_proj")

    def scores(self, history: Sequence[int], path: Callable[[int, Tensor], int | None]) -> list:
        """The log-probability of every drafted token.

        path: which draft id follows in a depth, by its law; None: the path ends.
        """
        meaning = self.meaning
        states = self.fused(history)
        first = history[0]
        tokens = list(history[1:])
        if self.fault == "the embedding is of the token before":
            tokens = [first, *tokens][:-1]
        seen: list[list[Any]] = [[] for _ in range(meaning.num_layers)]
        found: list[float] = []
        num_layers = 1 if self.fault == "plain layers are left out" else meaning.num_layers
        place = 0
        while True:
            state = states[place]
            normed = self.norm(state, f"{meaning.first}.hidden_norm")
            is_normed = meaning.residual_normed != (self.fault == "the residual is the other one")
            embedded = self.norm(self.embed(tokens[place]), f"{meaning.first}.input_layernorm")
            x = self.step(
                place,
                torch.cat((embedded, normed)),
                normed if is_normed else state,
                0,
                seen[0],
            )
            for index in range(1, num_layers):
                inputs = self.norm(x, f"layers.{index}.input_layernorm")
                x = self.step(place, inputs, x, index, seen[index])
            place += 1
            if place < len(history) - 1:
                continue
            output = self.norm(x, "norm")
            law = self.law(output)
            draft = path(len(found), law)
            if draft is None:
                return found
            found.append(float(law[draft]))
            tokens.append(self.token_of(draft))
            feeds_normed = meaning.output_normed != (self.fault == "what is fed back is the other")
            states.append(output if feeds_normed else x)

    def chain(self, history: Sequence[int], depth: int) -> tuple[list[int], list[float]]:
        """The likeliest tokens one behind the other, and their scores."""
        tokens: list[int] = []

        def likeliest(step: int, law: Tensor) -> int | None:
            if step == depth:
                return None
            draft = int(law.argmax())
            tokens.append(self.token_of(draft))
            return draft

        scores = self.scores(history, likeliest)
        return tokens, scores


def rotated(x: Tensor, position: int) -> Tensor:
    """x: [heads, head_dim]"""
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position / 500000.0 ** (i / half)
        first, second = x[:, i], x[:, i + half]
        out[:, i] = first * math.cos(angle) - second * math.sin(angle)
        out[:, i + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


FAULTS: dict[str, Callable[[Meaning], bool]] = {
    "ids are one too high": lambda meaning: meaning.outputs[-1] < DEPTH,
    "ids are one too low": lambda meaning: meaning.outputs[0] > 0,
    "the residual is the other one": lambda meaning: True,
    "what is fed back is the other": lambda meaning: True,
    "norms of q and k are left out": lambda meaning: meaning.head_norms,
    "norms before fc are left out": lambda meaning: bool(meaning.norms_before_fc),
    "biases are left out": lambda meaning: meaning.biases,
    "plain layers are left out": lambda meaning: meaning.num_layers > 1,
    "d2t holds ids": lambda meaning: meaning.reduced,
    "the embedding is of the token before": lambda meaning: True,
    "the embedding is the target's": lambda meaning: (
        meaning.own_embedding and meaning.width == HIDDEN
    ),
    "the head is the target's": lambda meaning: meaning.own_head and meaning.width == HIDDEN,
}
