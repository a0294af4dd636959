"""A draft LM cut from its target: the kept layers in a standard folder, with or without the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model, tiny_target
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from toy_folders import save_target
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from flashdraft.cut import cut_target, draft_lm
from flashdraft.errors import CheckpointError, InvalidParameter
from flashdraft.methods.draft_model import DraftModelDrafter, check_tokenizers
from flashdraft.target import HFTarget

TOKENS = torch.tensor([[5, 9, 7, 30, 4]])


def kept_by_hand(model: Any, keep: tuple[int, ...]) -> Tensor:
    """Logits of the model whose other layers are taken out in memory."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[i] for i in keep)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(keep)
    with torch.no_grad():
        logits: Tensor = model(TOKENS, use_cache=False).logits
    return logits


def tied_model() -> Any:
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    return tiny_model("llama", config=config, dtype=torch.float32)


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("keep", [(0,), (0, 3), (2, 1, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_cut_model_is_the_target_with_fewer_layers(tmp_path: Path, keep: tuple[int, ...], tied: bool) -> None:
    def made() -> Any:
        return tied_model() if tied else tiny_model("llama", dtype=torch.float32)

    cut_target(save_target(tmp_path / "whole", model=made()), tmp_path / "cut", keep)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits, kept_by_hand(made(), keep))
    target = tiny_target("llama")
    check_tokenizers(AutoTokenizer.from_pretrained(tmp_path / "whole"), tokenizer, target, HFTarget(model, "cut"))
    assert tokenizer.chat_template is not None


@pytest.mark.parametrize("tied", [True, False])
def test_without_its_embedding_a_cut_model_uses_the_targets(tmp_path: Path, tied: bool) -> None:
    whole = tied_model() if tied else tiny_model("llama", dtype=torch.float32)
    cut_target(save_target(tmp_path / "whole", model=whole), tmp_path / "cut", (0, 3), embedding=False)
    assert "model.embed_tokens.weight" not in names(tmp_path / "cut")
    assert ("lm_head.weight" in names(tmp_path / "cut")) == (not tied)
    embedding = whole.get_input_embeddings().weight.detach()
    model = draft_lm(tmp_path / "cut", embedding)
    assert model.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert (model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()) == tied
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits, kept_by_hand(whole, (0, 3)))
    drafter = DraftModelDrafter(HFTarget(model, "cut"))
    assert drafter.vocab_size == len(embedding)


def test_a_trained_folder_gives_up_its_embedding_by_a_second_cut(tmp_path: Path) -> None:
    cut_target(save_target(tmp_path / "whole", model=tied_model()), tmp_path / "cut", (0, 3))
    cut_target(tmp_path / "cut", tmp_path / "bare", (0, 1), embedding=False)
    embedding = tied_model().get_input_embeddings().weight.detach()
    with torch.no_grad():
        logits = [draft_lm(tmp_path / name, embedding)(TOKENS, use_cache=False).logits for name in ("cut", "bare")]
    assert torch.equal(*logits)
    assert names(tmp_path / "cut") - names(tmp_path / "bare") == {"model.embed_tokens.weight"}


def test_kinds_of_layers_go_with_them(tmp_path: Path) -> None:
    whole = tiny_model("gemma3", dtype=torch.float32)
    cut_target(save_target(tmp_path / "whole", model=whole), tmp_path / "cut", (1, 2))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["layer_types"] == ["full_attention", "sliding_attention"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


def test_sharded_weights_become_one_file(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    cut_target(tmp_path / "whole", tmp_path / "cut", (0,))
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize("keep", [(), (4,), (0, -1)])
def test_layers_that_are_not_there_are_refused(tmp_path: Path, keep: tuple[int, ...]) -> None:
    with pytest.raises(InvalidParameter, match="keep is") as raised:
        cut_target(save_target(tmp_path / "whole"), tmp_path / "cut", keep)
    assert "layers from 0 to 3" in str(raised.value.hint)
    assert not (tmp_path / "cut").exists()


def test_other_families_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    folder = save_target(tmp_path / "gpt2", model=tiny_model("", config=config))
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"holds no tensor model.layers.0"):
        cut_target(folder, tmp_path / "cut", (0,))
    cut_target(save_target(tmp_path / "whole"), tmp_path / "cut", (0,))
    embedding = torch.zeros(61, 32)
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "cut" / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot load"):
        draft_lm(tmp_path / "cut", embedding)
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cannot load"):
        draft_lm(tmp_path / "cut", embedding)
    with pytest.raises(CheckpointError, match="cannot load"):
        draft_lm(tmp_path / "nowhere", embedding)
