"""What published folders of block drafters mean, written from the descriptions of their formats: a
slow draft that reads a folder's own config.json and tensors, and nothing of what our code made of
them. One row, one head and one token at a time, in float64.

Features are `hidden_states` of transformers' own model, 0 being its embeddings.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import tiny_model
from safetensors.torch import load_file
from torch import Tensor

Json = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


class Chain(NamedTuple):
    """Drafts behind one anchor."""

    tokens: list[int]
    scores: list[float]  # their log-probabilities
    chances: list[float]  # what a confidence head says of each instead, a logarithm, too


class Layer(NamedTuple):
    """What the config says of one layer."""

    window: int | None
    causal: bool
    frequencies: list[float]  # angles a position, one for each pair of a head's numbers
    stretch: float  # of cosines and sines (yarn)


# --- The config


class RawConfig:
    """config.json as it lies in the folder."""

    def __init__(self, raw: Json) -> None:
        self.raw = raw
        self.special: Json = raw.get("dflash_config", {})
        self.is_wrapped = "speculators_model_type" in raw
        self.shape: Json = raw["transformer_layer_config"] if self.is_wrapped else raw
        marks = ("markov_rank", "num_anchors", "target_layer_ids")
        has_mark = any(mark in raw for mark in marks)
        self.is_deepspec = has_mark and not self.special and not self.is_wrapped

    def said(self, name: str, default: Any = None) -> Any:
        """A key stands in dflash_config, else at the top, else it has its default."""
        return self.special.get(name, self.raw.get(name, default))

    @property
    def is_domino(self) -> bool:
        return bool(self.said("projector_type") == "domino")

    @property
    def first_row(self) -> int:
        """Of a block, that predicts."""
        for place in (self.special, self.raw):
            for flag in ("sample_from_anchor", "query_zero_predicts_next"):
                if flag in place:
                    return 0 if place[flag] else 1
        if self.is_domino:
            return 0 if self.special["shift_label"] else 1
        if self.is_wrapped:
            return 1
        is_class = "DSpark" in self.raw["architectures"][0]
        is_dspark = is_class or self.is_deepspec or self.said("projector_type") == "dspark"
        return 0 if is_dspark else 1

    @property
    def num_rows(self) -> int:
        return int(self.said("block_size"))

    @property
    def num_drafts(self) -> int:
        return self.num_rows - 1 if self.is_domino else self.num_rows - self.first_row

    def states(self, num_layers: int) -> list[int]:
        """Which hidden_states are read: one higher than the layers whose outputs they are."""
        if self.is_wrapped:
            return list(self.raw["aux_hidden_state_layer_ids"])
        outputs = self.said("target_layer_ids")
        if outputs is None:
            step = (self.raw["num_target_layers"] - 4) / (num_layers - 1)  # from 1 to L - 3
            outputs = [round(1 + step * n) for n in range(num_layers)]
        return [output + 1 for output in outputs]

    def layers(self, count: int, head_dim: int) -> list[Layer]:
        window = self.shape.get("sliding_window")
        if not self.shape.get("use_sliding_window", False):
            window = None
        layers = []
        for kind in self._kinds(window, count):
            own_window = window if kind == SLIDING else None
            if self.special.get("use_swa"):
                own_window = self.special["swa_window_size"]
            frequencies, stretch = turned(self._rope(kind), head_dim)
            layers.append(Layer(own_window, self._is_causal(kind), frequencies, stretch))
        return layers

    def _kinds(self, window: int | None, count: int) -> list[str]:
        if "layer_types" in self.shape:
            return list(self.shape["layer_types"])
        kinds = []
        for index in range(count):
            is_deep = index >= self.shape.get("max_window_layers", 28)
            kinds.append(SLIDING if is_deep and window is not None else FULL)
        return kinds

    def _is_causal(self, kind: str) -> bool:
        if self.is_wrapped:
            return kind == SLIDING and not self.raw.get("sliding_window_non_causal", True)
        for told in (self.raw.get("is_causal"), self.special.get("causal")):
            if told is not None:
                return bool(told)
        return kind == SLIDING

    def _rope(self, kind: str) -> Json:
        rope = self.shape.get("rope_parameters")
        if rope is None:
            scaling = self.shape.get("rope_scaling") or {}
            return {"rope_theta": self.shape["rope_theta"], **scaling}
        if kind not in rope:
            return dict(rope)
        return dict(rope[SLIDING if self.is_wrapped else kind])


def turned(rope: Json, head_dim: int) -> tuple[list[float], float]:
    """Heads turn whole, whatever partial_rotary_factor says."""
    theta = rope["rope_theta"]
    pairs = range(head_dim // 2)
    plain = [theta ** (-2 * i / head_dim) for i in pairs]
    if rope.get("rope_type", "default") == "default":
        return plain, 1.0

    assert rope["rope_type"] == "yarn"
    factor = rope["factor"]
    length = rope["original_max_position_embeddings"]
    ends = []  # the pairs that turn 32 times and once over the trained positions
    for turns in (32, 1):
        ends.append(head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)))
    low = max(math.floor(ends[0]), 0)
    high = min(math.ceil(ends[1]), head_dim - 1)
    frequencies = []
    for i in pairs:
        slowed = min(max((i - low) / (high - low), 0.0), 1.0)
        frequencies.append(plain[i] * (1 - slowed) + plain[i] / factor * slowed)
    return frequencies, 0.1 * math.log(factor) + 1


# --- The network


@functools.cache
def model_of(family: str) -> Any:
    return tiny_model(family)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class SlowDraft:
    """The folder's drafter beside a tiny target of that family."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        self.config = RawConfig(json.loads((folder / "config.json").read_text()))
        self.model = model_of(family)
        self.table = self.model.get_input_embeddings().weight.detach()
        self.w: dict[str, Tensor] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            plain = name.removeprefix("model.").removeprefix("logit_head.").removesuffix(".weight")
            self.w[plain] = tensor.double()
        self.mask_row = self._mask_row(folder / "mask_embedding.pt")

        self.eps = self.config.shape.get("rms_norm_eps", 1e-6)
        self.head_dim = len(self.w["layers.0.self_attn.q_norm"])
        numbers = [int(name.split(".")[1]) for name in self.w if name.startswith("layers.")]
        self.layers = self.config.layers(max(numbers) + 1, self.head_dim)
        self.head, self.ids = self._head()

    def _mask_row(self, file: Path) -> Tensor | None:
        if not file.exists():
            return None
        held = torch.load(file)
        row = held["embedding"] if isinstance(held, dict) else held
        return row.double().flatten()

    def _head(self) -> tuple[Tensor, list[int]]:
        """Rows of the lm_head, and the target ids that they are of. DeepSpec's are copies."""
        own = None if self.config.is_deepspec else self.w.get("lm_head")
        head = self.model.get_output_embeddings().weight.detach() if own is None else own
        ids = list(range(len(head)))
        if "d2t" in self.w:
            ids = [i + int(offset) for i, offset in enumerate(self.w["d2t"])]
        return head, ids

    def embedded(self, token: int) -> Tensor:
        """A row of the block. speculators trains on the raw table, z-lab on the target's own
        embedding, whatever that scales."""
        if self.mask_row is not None and token == self.config.said("mask_token_id"):
            row = self.mask_row
        elif "embed_tokens" in self.w and not self.config.is_deepspec:
            row = self.w["embed_tokens"][token]
        elif self.config.is_wrapped:
            row = self.table[token]
        else:
            row = self.model.get_input_embeddings()(torch.tensor(token)).detach()
        return row * self.config.said("input_embedding_scale", 1.0)

    @torch.no_grad()
    def context(self, history: Sequence[int]) -> list[Tensor]:
        """Of every token before the anchor, which is the last."""
        hidden = self.model(torch.tensor([history]), output_hidden_states=True).hidden_states
        states = self.config.states(len(self.layers))
        context = []
        for position in range(len(history) - 1):
            features = torch.cat([hidden[state][0, position] for state in states])
            fused = self.w["fc"] @ features
            context.append(rms(fused, self.w["hidden_norm"], self.eps))
        return context

    def states(self, history: Sequence[int]) -> list[Tensor]:
        """Of the block's rows, behind the last norm."""
        context = self.context(history)
        mask = self.config.said("mask_token_id")
        tokens = [history[-1]] + [mask] * (self.config.num_rows - 1)
        rows = [self.embedded(token) for token in tokens]
        for index, layer in enumerate(self.layers):
            place = f"layers.{index}."
            attend = functools.partial(self.attended, place + "self_attn.", layer, context)
            rows = self.sublayer(rows, place, "input_layernorm", "attention_conv", attend)
            mlp = functools.partial(self.mlp, place + "mlp.")
            rows = self.sublayer(rows, place, "post_attention_layernorm", "mlp_conv", mlp)
        return [rms(row, self.w["norm"], self.eps) for row in rows]

    def sublayer(
        self, rows: list[Tensor], place: str, norm: str, convolution: str, inner: Any
    ) -> list[Tensor]:
        """Between DFlash 2's convolutions, where there are some."""
        normed = [rms(row, self.w[place + norm], self.eps) for row in rows]
        outer = place + convolution
        if f"{outer}.base_kernel" not in self.w:
            added = inner(normed)
        else:
            before = self.convolved(outer, 0, normed, normed)
            added = self.convolved(outer, 1, normed, inner(before))
        return [row + more for row, more in zip(rows, added, strict=True)]

    def convolved(
        self, place: str, side: int, normed: list[Tensor], values: list[Tensor]
    ) -> list[Tensor]:
        base = self.w[f"{place}.base_kernel"][side]
        group_size = self.config.said("conv_group_size")
        out = []
        for t, own in enumerate(normed):
            dynamic = self.w[f"{place}.kernel_projection"] @ own
            dynamic = dynamic.view(2, len(base), -1)[side]
            total = torch.zeros_like(own)
            for tap in range(min(len(base), t + 1)):  # nothing stands before the anchor's row
                kernel = base[tap] + dynamic[tap].repeat_interleave(group_size)
                total += kernel * values[t - tap]
            out.append(total)
        return out

    def attended(
        self, place: str, layer: Layer, context: list[Tensor], rows: list[Tensor]
    ) -> list[Tensor]:
        start = len(context)
        keys = []
        values = []
        for position, state in enumerate([*context, *rows]):
            keys.append(self.heads(place, "k", state, layer, position))
            values.append(self.projected(place, "v", state).view(-1, self.head_dim))

        out = []
        for row, state in enumerate(rows):
            position = start + row
            queries = self.heads(place, "q", state, layer, position)
            seen = [key for key in range(len(keys)) if is_seen(position, key, layer)]
            gathered: list[Tensor] = []
            for head, query in enumerate(queries):
                shared = head * len(keys[0]) // len(queries)
                own_keys = torch.stack([keys[key][shared] for key in seen])
                own_values = torch.stack([values[key][shared] for key in seen])
                weights = torch.softmax(own_keys @ query / math.sqrt(self.head_dim), dim=0)
                gathered.append(weights @ own_values)
            out.append(self.projected(place, "o", torch.cat(gathered)))
        return out

    def projected(self, place: str, name: str, x: Tensor) -> Tensor:
        out = self.w[f"{place}{name}_proj"] @ x
        bias = self.w.get(f"{place}{name}_proj.bias")
        return out if bias is None else out + bias

    def heads(self, place: str, name: str, x: Tensor, layer: Layer, position: int) -> list[Tensor]:
        """Normed and turned, one after the other."""
        half = self.head_dim // 2  # number i turns with number i + half
        angles = torch.tensor(layer.frequencies, dtype=torch.float64) * position
        cos = angles.cos() * layer.stretch
        sin = angles.sin() * layer.stretch
        heads = []
        for head in self.projected(place, name, x).split(self.head_dim):
            normed = rms(head, self.w[f"{place}{name}_norm"], self.eps)
            first, second = normed.split(half)
            heads.append(torch.cat((first * cos - second * sin, second * cos + first * sin)))
        return heads

    def mlp(self, place: str, rows: list[Tensor]) -> list[Tensor]:
        out = []
        for row in rows:
            gate = silu(self.projected(place, "gate", row))
            up = self.projected(place, "up", row)
            out.append(self.projected(place, "down", gate * up))
        return out

    # Heads.

    def chain(self, history: Sequence[int]) -> Chain:
        """Each draft is the likeliest behind those before it."""
        first = self.config.first_row
        states = self.states(history)[first : first + self.config.num_drafts]
        drafts: list[int] = []
        scores: list[float] = []
        chances: list[float] = []
        for k, state in enumerate(states):
            path = [history[-1], *drafts]
            logits = self.base(state)
            choices = range(len(logits))
            if "candidate_selector.hidden_projection" in self.w:
                num_choices = self.config.said("selector_top_k")
                choices = sorted(choices, key=logits.__getitem__, reverse=True)[:num_choices]
            corrected = logits + self.correction(states, k, path)
            best = max(choices, key=corrected.__getitem__)
            law = corrected[list(choices)].log_softmax(0)
            drafts.append(self.ids[best])
            scores.append(float(law.max()))
            chances.append(scores[k])
            if "confidence_head.proj" in self.w:
                chances[k] = self.confidence(state, path[-1])
        return Chain(drafts, scores, chances)

    def base(self, state: Tensor) -> Tensor:
        logits = self.head @ state * self.config.said("output_multiplier", 1.0)
        cap = self.config.said("final_logit_softcapping")
        return cap * torch.tanh(logits / cap) if cap else logits

    def correction(self, states: list[Tensor], k: int, path: list[int]) -> Tensor:
        """What is added to the logits of row k behind the anchor and the drafts so far."""
        if "candidate_selector.hidden_projection" in self.w:
            return self.pair_scores(states[k], path[-1])
        if "prefix_gru.weight_ih_l0" in self.w:
            return self.domino(states[k], path)
        if "markov_head.markov_w1" not in self.w:
            return torch.zeros(len(self.head), dtype=torch.float64)

        code = self.w["markov_head.markov_w1"][path[-1]]
        if "markov_head.gate_proj" in self.w:
            read = torch.cat((states[k], code))
            code = code * torch.sigmoid(self.through("markov_head.gate_proj", read))
        if "markov_head.joint_proj" in self.w:
            code = self.recurrent(states, path)
        return self.w["markov_head.markov_w2"] @ code

    def pair_scores(self, state: Tensor, before: int) -> Tensor:
        predecessor = self.w["candidate_selector.predecessor_codebook"][before]
        successors = self.w["candidate_selector.successor_codebook"]
        projected = self.w["candidate_selector.hidden_projection"] @ state
        scores = [(predecessor * projected * successors[token]).sum() for token in self.ids]
        return torch.stack(scores)

    def recurrent(self, states: list[Tensor], path: list[int]) -> Tensor:
        """DSpark's rnn over the whole path, from nothing."""
        table = self.w["markov_head.markov_w1"]
        memory = torch.zeros(table.shape[1], dtype=torch.float64)
        out = memory
        for token, state in zip(path, states[: len(path)], strict=True):
            read = torch.cat((memory, table[token], state))
            gate, candidate, out = self.through("markov_head.joint_proj", read).chunk(3)
            kept = torch.sigmoid(gate)
            memory = kept * memory + (1 - kept) * torch.tanh(candidate)
        return torch.tanh(out)

    def domino(self, state: Tensor, path: list[int]) -> Tensor:
        """A GRU over the raw embeddings of the path; the first row is as it is."""
        inputs = self.w["prefix_gru.weight_ih_l0"]
        recurrent = self.w["prefix_gru.weight_hh_l0"]
        outer = self.w["embed_proj.2"]
        if len(path) == 1:
            return torch.zeros(len(outer), dtype=torch.float64)

        memory = torch.zeros(recurrent.shape[1], dtype=torch.float64)
        for token in path:
            reset_in, update_in, new_in = (inputs @ self.table[token]).chunk(3)
            reset_by, update_by, new_by = (recurrent @ memory).chunk(3)
            update = torch.sigmoid(update_in + update_by)
            new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_by) * new_by)
            memory = (1 - update) * new + update * memory
        return outer @ silu(self.w["embed_proj.0"] @ torch.cat((state, memory)))

    def confidence(self, state: Tensor, before: int) -> float:
        """The logarithm of the chance that the row is accepted."""
        read = state
        if self.config.said("confidence_head_with_markov"):
            read = torch.cat((state, self.w["markov_head.markov_w1"][before]))
        chance = torch.sigmoid(self.through("confidence_head.proj", read))
        return math.log(float(chance))

    def through(self, name: str, x: Tensor) -> Tensor:
        return self.w[name] @ x + self.w[f"{name}.bias"]


def is_seen(query: int, key: int, layer: Layer) -> bool:
    """By places in the text: q and k of the formats' descriptions."""
    if layer.causal and key > query:
        return False
    if layer.window is None:
        return True
    is_near = query - key < layer.window
    return is_near and (layer.causal or key - query < layer.window)
