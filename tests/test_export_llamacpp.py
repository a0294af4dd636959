"""llama.cpp's file of a drafter: by its loader's own list of keys and tensors, by our tensors read
back, and by the angles that it turns by; and which drafters are refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from toy_folders import ZLAB, save_target, save_zlab
from toy_tokenizers import byte_tokenizer, piece_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from flashdraft.cli import main
from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.export import gguf_keys, llamacpp
from flashdraft.export.blocks import text_config
from flashdraft.export.gguf_tokens import Tokens, read_tokens
from flashdraft.export.order import Exported, Order, TargetShape, read_target
from flashdraft.export.run import export_draft
from flashdraft.formats.config import DraftConfig
from flashdraft.formats.shapes import tensor_shapes
from flashdraft.methods.network import network_shape
from flashdraft.models.modules import rotary_frequencies

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 280, 32, 4, 2, 16, 48, 2
KEPT = (3, 9, 20, 41, 59)
CHAIN = DraftConfig(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    vocab_size=VOCAB,
    block_size=5,
    mask_token_id=7,
    target_layer_ids=(0, 2),
    num_target_layers=4,
    dtype="float32",
)
SELECTOR = replace(
    CHAIN,
    sequential_head="selector",
    head_rank=6,
    head_choices=4,
    conv_kernel_size=2,
    conv_group_size=8,
)
MARKOV = replace(CHAIN, sequential_head="markov", head_rank=6)
KINDS = {
    "v1": CHAIN,
    "windows": replace(
        CHAIN, layer_types=("sliding_attention", "full_attention"), sliding_window=8, causal=False
    ),
    "causal": replace(CHAIN, causal=True),
    "anchor-first": replace(CHAIN, anchor_first=True),
    "reduced": replace(CHAIN, draft_vocab_size=len(KEPT)),
    "dflash2": SELECTOR,
    "selector without convolutions": replace(SELECTOR, conv_kernel_size=0, conv_group_size=0),
    "dspark": replace(MARKOV, confidence_head=True, confidence_with_markov=True),
    "dspark, anchor-first, reduced": replace(MARKOV, anchor_first=True, draft_vocab_size=len(KEPT)),
    "llama3": replace(
        CHAIN,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


def target(folder: Path, tokenizer: str = "bytes") -> Path:
    """A random llama of 280 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    made = byte_tokenizer() if tokenizer == "bytes" else piece_tokenizer()
    made.save_pretrained(folder)
    return folder


def rewrite_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return target(tmp_path_factory.mktemp("llama"))


def order_of(config: DraftConfig, folder: Path, out: Path, **tensors: torch.Tensor) -> Order:
    generator = torch.Generator().manual_seed(3)
    made = {
        name: torch.randn(shape, generator=generator)
        for name, shape in tensor_shapes(config).items()
    }
    if config.draft_vocab_size is not None:
        made["d2t"] = torch.tensor(KEPT) - torch.arange(len(KEPT))
    out.mkdir(exist_ok=True)
    of_target = read_target(str(folder))
    return Order("toy", config, {**made, **tensors}, of_target, out, config.dtype)


# --- llama.cpp's loader, written again from src/llama-model.cpp and src/models/dflash.cpp ---------

REQUIRED = {
    "context_length": int,
    "embedding_length": int,
    "block_count": int,
    "feed_forward_length": int,
    "attention.head_count": int,
    "attention.layer_norm_rms_epsilon": float,
    "target_layers": list,
}
OPTIONAL = {
    "attention.head_count_kv": int,
    "attention.key_length": int,
    "attention.value_length": int,
    "attention.causal": bool,
    "attention.sliding_window": int,
    "attention.sliding_window_pattern": list,
    "block_size": int,
    "conv_kernel_size": int,
    "conv_group_size": int,
    "selector_rank": int,
    "selector_top_k": int,
    "sample_from_anchor": bool,
    "has_confidence_head": bool,
    "embedding_scale": float,
    "logit_scale": float,
    "final_logit_softcapping": float,
    "rope.freq_base": float,
    "rope.dimension_sections": list,
    "rope.scaling.type": str,
    "rope.scaling.factor": float,
    "rope.scaling.attn_factor": float,
    "rope.scaling.original_context_length": int,
}


class LoaderError(Exception):
    pass


def loaded(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Keys without `dflash.`, and tensors as numpy has them.

    Raises LoaderError where llama.cpp would, and for a key that it does not know.
    """
    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    keys = {name.removeprefix("dflash."): v for name, v in meta.items() if "dflash." in name}
    if meta["general.architecture"] != "dflash" or keys.keys() & {"vocab_size"}:
        raise LoaderError("architecture")
    for name, value in keys.items():
        kind = {**REQUIRED, **OPTIONAL}.get(name)
        if kind is None or type(value) is not kind:
            raise LoaderError(f"key {name} {value!r}")
    if REQUIRED.keys() - keys.keys():
        raise LoaderError("a key is missing")

    held = {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
    wanted, optional = loader_tensors(keys, held, len(meta["tokenizer.ggml.tokens"]))
    for name, shape in wanted.items():
        if held.get(name) != shape:
            raise LoaderError(f"tensor {name}: {held.get(name)}, not {shape}")
    for name in held.keys() - wanted.keys():
        if held[name] != optional.get(name):
            raise LoaderError(f"tensor {name}: {held[name]}, not {optional.get(name)}")
    if meta["tokenizer.ggml.mask_token_id"] >= len(meta["tokenizer.ggml.tokens"]):
        raise LoaderError("mask token")
    arrays = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors if t.name != "d2t"}
    ids = {t.name: t.data for t in reader.tensors if t.name == "d2t"}
    return {**meta, **keys}, {**arrays, **ids}


def loader_tensors(
    keys: dict[str, Any], held: dict[str, tuple[int, ...]], vocab: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """What must be there and what may be; shapes in ggml's order, the innermost first."""
    hidden, inner = keys["embedding_length"], keys["feed_forward_length"]
    heads, width = keys["attention.head_count"], keys["attention.key_length"]
    groups = keys["attention.head_count_kv"] * width
    drafts = held["d2t"][0] if "d2t" in held else vocab
    wanted = {
        "fc.weight": (len(keys["target_layers"]) * hidden, hidden),
        "enc.output_norm.weight": (hidden,),
        "output_norm.weight": (hidden,),
    }
    optional = {
        "token_embd.weight": (hidden, vocab),
        "output.weight": (hidden, drafts),
        "rope_freqs.weight": (width // 2,),
        "d2t": (drafts,),
    }
    if "markov_w1.weight" in held:
        rank = held["markov_w1.weight"][0]
        wanted |= {"markov_w1.weight": (rank, vocab), "markov_w2.weight": (rank, drafts)}
        optional |= {"conf_proj.weight": (hidden + rank, 1), "conf_proj.bias": (1,)}
    has_selector = "selector_hidden.weight" in held
    if has_selector:
        rank, top_k = keys["selector_rank"], keys["selector_top_k"]
        if hidden % keys["conv_group_size"] or hidden < top_k * (top_k + 1):
            raise LoaderError("the selector's sizes")
        wanted |= {
            f"selector_{name}.weight": (rank, vocab) for name in ("predecessor", "successor")
        }
        wanted["selector_hidden.weight"] = (hidden, rank)
    for i in range(keys["block_count"]):
        layer = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (hidden, heads * width),
            "attn_k.weight": (hidden, groups),
            "attn_v.weight": (hidden, groups),
            "attn_output.weight": (heads * width, hidden),
            "attn_q_norm.weight": (width,),
            "attn_k_norm.weight": (width,),
            "ffn_norm.weight": (hidden,),
            "ffn_gate.weight": (hidden, inner),
            "ffn_up.weight": (hidden, inner),
            "ffn_down.weight": (inner, hidden),
        }
        if has_selector:
            taps = keys["conv_kernel_size"]
            projected = 2 * taps * (hidden // keys["conv_group_size"])
            for part in ("attn", "ffn"):
                layer[f"{part}_conv_base"] = (hidden, taps, 2)
                layer[f"{part}_conv_proj.weight"] = (hidden, projected)
        wanted |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return wanted, optional


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_its_loader_accepts_the_file_and_finds_our_numbers(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    order = order_of(KINDS[kind], llama, tmp_path / "out")
    llamacpp.export(order, order.out)
    keys, tensors = loaded(order.out / "draft.gguf")
    for name, tensor in order.tensors.items():
        if name != "d2t":
            written = tensors[gguf_keys.tensor_name(name)]
            assert np.array_equal(written, tensor.numpy()), name
    assert keys["target_layers"] == [1, 3]  # the inputs of layers
    assert keys["tokenizer.ggml.mask_token_id"] == 7


def test_keys_of_each_kind(llama: Path, tmp_path: Path) -> None:
    keys = {}
    for kind, config in KINDS.items():
        order = order_of(config, llama, tmp_path / kind)
        llamacpp.export(order, order.out)
        keys[kind] = loaded(order.out / "draft.gguf")[0]

    assert keys["v1"]["block_size"] == 5
    assert keys["anchor-first"]["block_size"] == 4  # as many drafts as rows
    assert keys["anchor-first"]["sample_from_anchor"] is True
    assert keys["dspark"]["sample_from_anchor"] is False
    assert keys["dspark"]["has_confidence_head"] is True
    assert "sample_from_anchor" not in keys["dflash2"]
    assert keys["windows"]["attention.sliding_window"] == 8
    assert keys["windows"]["attention.sliding_window_pattern"] == [True, False]
    assert "attention.causal" not in keys["windows"]
    assert keys["causal"]["attention.causal"] is True
    assert [keys["dflash2"][k] for k in ("conv_kernel_size", "conv_group_size")] == [2, 8]
    assert [keys["dflash2"][k] for k in ("selector_rank", "selector_top_k")] == [6, 4]
    assert keys["selector without convolutions"]["conv_kernel_size"] == 1


@pytest.mark.parametrize("fault", ["layer", "head", "key", "tokens", "kernel"])
def test_planted_faults_are_seen(
    fault: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "layer":
        monkeypatch.setitem(gguf_keys._LAYER_NAMES, "mlp.up_proj", "ffn_gate_up")
    elif fault == "head":
        monkeypatch.setitem(gguf_keys._NAMES, "candidate_selector.hidden_projection", "hidden")
    elif fault == "key":
        monkeypatch.setattr(llamacpp, "keys_of", lambda c: {**gguf_keys.keys_of(c), "top_k": 4})
    elif fault == "tokens":
        monkeypatch.setattr(llamacpp, "read_tokens", cut_tokens)
    else:
        suffixed = "attn_conv_base.weight"
        monkeypatch.setitem(gguf_keys._LAYER_NAMES, "attention_conv.base_kernel", suffixed)
    order = order_of(SELECTOR, llama, tmp_path / "out")
    llamacpp.export(order, order.out)
    with pytest.raises((LoaderError, KeyError)):
        loaded(order.out / "draft.gguf")


def cut_tokens(of_target: TargetShape) -> Tokens:
    tokens = read_tokens(of_target)
    return tokens._replace(texts=tokens.texts[:-1], types=tokens.types[:-1])


def test_reduced_vocabulary_is_absolute_with_rows_of_the_targets_head(
    llama: Path, tmp_path: Path
) -> None:
    order = order_of(KINDS["reduced"], llama, tmp_path / "out")
    llamacpp.export(order, order.out)
    _, tensors = loaded(order.out / "draft.gguf")
    assert tensors["d2t"].dtype == np.int64
    assert tensors["d2t"].tolist() == list(KEPT)
    head = load_file(llama / "model.safetensors")["lm_head.weight"]
    assert np.array_equal(tensors["output.weight"], head[list(KEPT)].numpy())


def test_tables_of_its_own_are_kept_and_copies_are_not(llama: Path, tmp_path: Path) -> None:
    theirs = load_file(llama / "model.safetensors")
    embedding, head = theirs["model.embed_tokens.weight"], theirs["lm_head.weight"]
    copies = {"embed_tokens.weight": embedding, "lm_head.weight": head}
    order = order_of(CHAIN, llama, tmp_path / "copies", **copies)
    llamacpp.export(order, order.out)
    _, tensors = loaded(order.out / "draft.gguf")
    assert not tensors.keys() & {"token_embd.weight", "output.weight"}

    # An embedding alone would be its lm_head, too: the target's goes with it.
    order = order_of(CHAIN, llama, tmp_path / "own", **{"embed_tokens.weight": embedding * 2})
    llamacpp.export(order, order.out)
    _, tensors = loaded(order.out / "draft.gguf")
    assert np.array_equal(tensors["token_embd.weight"], (embedding * 2).numpy())
    assert np.array_equal(tensors["output.weight"], head.numpy())

    row = torch.full((HIDDEN,), 0.5)
    order = order_of(CHAIN, llama, tmp_path / "row", mask_embedding=row)
    llamacpp.export(order, order.out)
    _, tensors = loaded(order.out / "draft.gguf")
    expected = embedding.clone()
    expected[7] = row
    assert np.array_equal(tensors["token_embd.weight"], expected.numpy())


def test_tokens_are_the_targets(llama: Path, tmp_path: Path) -> None:
    order = order_of(CHAIN, llama, tmp_path / "bytes")
    llamacpp.export(order, order.out)
    keys, _ = loaded(order.out / "draft.gguf")
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.merges"] == ["h i", "Ġ h", "Ã ©"]
    assert keys["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"]
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD279]"  # embedded, but no token
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    types = keys["tokenizer.ggml.token_type"]
    assert (types[0], types[5], types[-1]) == (3, 1, 5)  # control, normal, unused

    pieces = target(tmp_path / "pieces-target", "pieces")
    order = order_of(CHAIN, pieces, tmp_path / "pieces")
    llamacpp.export(order, order.out)
    keys, _ = loaded(order.out / "draft.gguf")
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.token_type"][20] == 6  # a byte
    assert "tokenizer.ggml.merges" not in keys


@pytest.mark.parametrize(
    ("dtype", "stored", "error"),
    [("float16", "F16", 1e-3), ("bfloat16", "BF16", 1e-2), ("q8_0", "Q8_0", 2e-2)],
)
def test_matrices_are_stored_as_asked(
    dtype: str, stored: str, error: float, llama: Path, tmp_path: Path
) -> None:
    order = replace(order_of(SELECTOR, llama, tmp_path / "out"), dtype=dtype)
    llamacpp.export(order, order.out)
    reader = GGUFReader(order.out / "draft.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == stored
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_conv_base"] == "F32"  # it is added to float32
    # Rows of 6 are no blocks of 32.
    assert kinds["selector_successor.weight"] == ("F16" if stored == "Q8_0" else stored)
    _, tensors = loaded(order.out / "draft.gguf")
    wanted = order.tensors["layers.0.self_attn.q_proj.weight"].numpy()
    assert np.abs(tensors["blk.0.attn_q.weight"] - wanted).max() < error * np.abs(wanted).max()


# --- Rotary positions -----------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": YARN,
    "yarn, attention": YARN | {"attention_factor": 1.3},
    "yarn, betas": YARN | {"beta_fast": 8.0},
    "llama3": KINDS["llama3"].rope_parameters,
}


def ggml_angles(keys: dict[str, Any], divisors: Any) -> tuple[list[float], float]:
    """What llama.cpp multiplies positions by, and cos and sin: llama-context.cpp and ggml's
    rope_yarn, with its betas 32 and 1."""
    base, kind = keys["rope.freq_base"], keys.get("rope.scaling.type", "linear")
    scale = 1 / keys.get("rope.scaling.factor", 1.0)
    gain = keys.get("rope.scaling.attn_factor", 1.0)
    if kind == "none":
        scale = 1.0
    low, high = 0.0, 0.0
    if kind == "yarn":
        original = keys["rope.scaling.original_context_length"]
        places = []
        for beta in (32.0, 1.0):
            turns = math.log(original / (beta * 2 * math.pi))
            places.append(HEAD_DIM * turns / (2 * math.log(base)))
        low, high = max(0.0, math.floor(places[0])), min(HEAD_DIM - 1.0, math.ceil(places[1]))
        gain *= 1 + 0.1 * math.log(1 / scale)
    angles = []
    for i in range(HEAD_DIM // 2):
        angle = base ** (-2 * i / HEAD_DIM) / (1.0 if divisors is None else float(divisors[i]))
        ramp = 1 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
        mix = ramp if kind == "yarn" else 0.0
        angles.append(angle * scale * (1 - mix) + angle * mix)
    return angles, gain


@pytest.mark.parametrize("name", ROPES)
def test_it_turns_by_our_angles(name: str) -> None:
    rope = {"rope_theta": 1e4, **ROPES[name]}
    config = replace(CHAIN, rope_parameters=rope, max_position_embeddings=256)
    keys, divisors = gguf_keys.rope_of(config, by_sections=False)
    angles, gain = ggml_angles(keys, divisors)
    ours = rotary_frequencies(network_shape(config, rope))
    assert angles == pytest.approx(ours.inv_freq.tolist(), rel=1e-5)
    assert gain == pytest.approx(ours.scaling, rel=1e-5)


# --- What is refused, and what is told ------------------------------------------------------------

RAISED = {
    "biases": (replace(CHAIN, attention_bias=True), "q, k, v and o projections have biases"),
    "gated": (replace(MARKOV, sequential_head="markov_gated"), "markov_gated"),
    "rnn": (replace(MARKOV, sequential_head="markov_rnn"), "markov_rnn"),
    "domino": (replace(MARKOV, sequential_head="domino", head_states=8), "domino"),
    "eagle3": (replace(CHAIN, method="eagle3"), "drafter of eagle3"),
    "choices": (replace(SELECTOR, head_choices=6), "scores pairs of 6 choices, 42 numbers a row"),
    "selector, anchor-first": (replace(SELECTOR, anchor_first=True), "anchor's row predicts"),
    "convolutions": (replace(SELECTOR, sequential_head=None), "without a candidate selector"),
    "capped": (replace(MARKOV, final_logit_softcapping=30.0), "scaled or capped before its Markov"),
    "two ropes": (
        replace(
            KINDS["windows"],
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        "turn by different rotary positions",
    ),
    "last layer": (replace(CHAIN, target_layer_ids=(0, 3)), "the target's last layer"),
    "another vocabulary": (replace(MARKOV, vocab_size=VOCAB - 8), "knows 272 tokens"),
}


@pytest.mark.parametrize("name", RAISED)
def test_what_it_cannot_run_is_refused_by_name(name: str, llama: Path, tmp_path: Path) -> None:
    config, words = RAISED[name]
    order = order_of(config, llama, tmp_path / "out")
    with pytest.raises(CheckpointError, match=words) as caught:
        llamacpp.export(order, order.out)
    assert caught.value.hint
    assert not list(order.out.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "family qwen2"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"model_type": "gemma4_text", "final_logit_softcapping": 30.0}, "caps logits"),
    ],
)
def test_targets_beside_which_it_cannot_draft(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    order = order_of(MARKOV, target(tmp_path / "target"), tmp_path / "out")
    rewrite_config(tmp_path / "target", changes)
    with pytest.raises(CheckpointError, match=words):
        llamacpp.export(order, order.out)


def test_scaled_embedding_of_gemma_and_several_axes_of_positions(tmp_path: Path) -> None:
    changes = {"model_type": "gemma4_text", "rope_parameters": {"mrope_section": [4, 2, 2]}}
    order = order_of(CHAIN, target(tmp_path / "target"), tmp_path / "out")
    rewrite_config(tmp_path / "target", changes)
    of_target = text_config(read_target(str(tmp_path / "target")))
    assert order.target is not None
    keys, _ = llamacpp._written(order, order.target, of_target)
    assert keys["embedding_scale"] == pytest.approx(math.sqrt(HIDDEN))
    assert keys["rope.dimension_sections"] == [HEAD_DIM // 2, 0, 0, 0]


def told(config: DraftConfig, llama: Path, out: Path) -> Exported:
    order = order_of(config, llama, out)
    return llamacpp.export(order, order.out)


def test_commands_and_what_is_lost(llama: Path, tmp_path: Path) -> None:
    exported = told(CHAIN, llama, tmp_path / "v1")
    file = str(tmp_path / "v1" / "draft.gguf")
    start = ("llama-server", "-m", "TARGET.gguf", "-md", file)
    assert exported.command == (*start, "--spec-type", "draft-dflash", "--spec-draft-n-max", "4")
    assert exported.losses == ()

    assert "draft-dspark" in told(MARKOV, llama, tmp_path / "markov").command
    first = told(KINDS["anchor-first"], llama, tmp_path / "first")
    assert "draft-dspark" in first.command  # no other of its drafters predicts in row 0
    swiglu = replace(CHAIN, sequential_head="swiglu", head_rank=8)
    assert "swiglu" in told(swiglu, llama, tmp_path / "swiglu").losses[0]
    mixed = replace(KINDS["windows"], causal=None)
    assert "causal" in told(mixed, llama, tmp_path / "mixed").losses[0]
    confident = replace(CHAIN, confidence_head=True)
    assert "confidence" in told(confident, llama, tmp_path / "confident").losses[0]


def test_command_line_names_the_server(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = save_zlab(tmp_path / "draft", config={**ZLAB, "vocab_size": VOCAB})
    out = tmp_path / "out"
    common = ["export", str(draft), "--to", "llamacpp", "--out", str(out)]
    assert main(common) == 1
    assert "--target" in capsys.readouterr().err
    assert not out.exists()
    assert main([*common, "--target", str(llama), "--dtype", "float16"]) == 0
    assert f"-md {out}/draft.gguf --spec-type draft-dflash" in capsys.readouterr().out
    loaded(out / "draft.gguf")
    with pytest.raises(InvalidParameter, match="as they are stored"):
        export_draft(str(draft), "zlab", tmp_path / "other", dtype="q8_0")


def test_other_tokenizers_and_packed_tables_are_named(tmp_path: Path) -> None:
    words = save_target(tmp_path / "words")
    order = order_of(CHAIN, words, tmp_path / "out")
    with pytest.raises(CheckpointError, match="WordLevel, which llama"):
        llamacpp.export(order, order.out)

    packed = target(tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, packed / "model.safetensors")
    order = order_of(KINDS["reduced"], packed, tmp_path / "reduced")
    with pytest.raises(CheckpointError, match="is int8"):
        llamacpp.export(order, order.out)
