"""A folder is loaded whole and as it says, or refused in a line that names the first thing that is
wrong; its code never runs.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_folders import letter_tokenizer, save_target, save_zlab
from transformers import AutoModelForCausalLM

from flashdraft import loading, pretrained
from flashdraft.errors import CheckpointError, FlashDraftError, UnsupportedTarget
from flashdraft.loading import load, load_target
from flashdraft.pretrained import Source, check_folder, read_model, without_bars

Tensors = dict[str, Tensor]
# of its own compiler, when bitnet's file is imported
BY_TORCH = "ignore:.*is deprecated. Please switch to:DeprecationWarning"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(whole, tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def write_shards(folder: Path, shards: int = 2) -> Path:
    """The same weights in several files; returns the index."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def logits(folder: Path, kernel: str = "torch") -> Tensor:
    target = load_target(str(folder), kernel=kernel)[0]
    return target.prefill(target.new_cache(1, 64), 0, torch.arange(3, 20), ())[0]


def same(one: Tensor, other: Tensor) -> bool:
    """To rounding: where a file's bytes lie decides which of torch's kernels runs."""
    return torch.allclose(one, other, atol=1e-3)


def refusal(folder: Path, kind: type[FlashDraftError] = FlashDraftError, **how: str) -> str:
    """What `load` says: one line and one hint."""
    with pytest.raises(kind) as caught:
        load_target(str(folder), **how)
    message, hint = str(caught.value.args[0]), caught.value.hint
    assert hint is not None
    assert "\n" not in message + hint
    return f"{message}\nhint: {hint}"


# Tensors.


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def plus(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "one is gone": (without(DOWN), ("lacks the tensor", DOWN)),
    "two are gone": (without(DOWN, "model.norm.weight"), (DOWN, "and 1 more")),
    "the head is gone": (without("lm_head.weight"), ("lacks the tensor lm_head.weight",)),
    "the embedding is gone": (
        without("model.embed_tokens.weight"),
        ("lacks the tensor model.embed_tokens.weight",),
    ),
    "compiled": (renamed("_orig_mod."), ("called _orig_mod.",)),
    "data parallel": (renamed("module."), ("called module.",)),
    "of a peft model": (renamed("base_model.model."), ("called base_model.model.",)),
    "another shape": (lambda t: t | {DOWN: torch.zeros(32, 48)}, (DOWN, "[32, 48]", "[32, 64]")),
    "a bias too many": (
        plus("model.layers.1.mlp.down_proj.bias", torch.ones(32)),
        ("down_proj.bias", "leaves out"),
    ),
    "scales": (
        plus("model.layers.1.mlp.down_proj.weight_scale", torch.ones(1)),
        ("weight_scale", "leaves out"),
    ),
    "an adapter in it": (
        plus("model.layers.1.mlp.down_proj.lora_A.weight", torch.ones(1)),
        ("lora_A", "leaves out"),
    ),
    "whole numbers": (
        lambda t: t | {DOWN: t[DOWN].to(torch.int8)},
        (DOWN, "I8", "no quantisation"),
    ),
    "nothing in it": (lambda t: {"x": torch.zeros(1)}, ("lacks the tensor",)),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("sharded", [False, True])
def test_the_first_tensor_that_is_not_as_it_should_be_is_named(
    folder: Path, case: str, sharded: bool
) -> None:
    change, words = TENSORS[case]
    edit_tensors(folder, change)
    if sharded:
        write_shards(folder)
    told = refusal(folder, CheckpointError)
    for word in words:
        assert word in told


def test_planted_fault_a_load_that_is_not_looked_at_fills_in_random_numbers(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_tensors(folder, without(DOWN))
    monkeypatch.setattr(pretrained, "_check_whole", lambda *_: None)
    assert not same(logits(folder), logits(whole))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors,
        plus("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4)),
        plus("vision_tower.patch.weight", torch.zeros(4)),
        plus("v_head.summary.weight", torch.zeros(4)),
        lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
    ],
)
def test_what_belongs_to_other_parts_is_left_out_by_right(
    folder: Path, whole: Path, change: Any
) -> None:
    edit_tensors(folder, change)
    assert same(logits(folder), logits(whole))


def test_a_tied_head_may_be_stored_or_not(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    bare = shutil.copytree(folder, tmp_path / "bare")
    edit_tensors(bare, without("lm_head.weight"))
    only_head = shutil.copytree(folder, tmp_path / "only head")
    edit_tensors(only_head, without("model.embed_tokens.weight"))
    assert same(logits(folder), logits(bare))
    assert same(logits(folder), logits(only_head))


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 6}, {"num_hidden_layers": 2}, {"vocab_size": 100}]
)
def test_a_config_of_another_model_is_refused(folder: Path, change: dict[str, int]) -> None:
    edit_config(folder, **change)
    refusal(folder, CheckpointError)


def test_the_folder_of_every_family_is_whole(family: str, tmp_path: Path) -> None:
    """Fused experts, tied heads, buffers:
    what transformers saved is neither missed nor left over.
    """
    model = tiny_model(family, dtype=torch.float32)
    expected = model(torch.arange(3, 20)[None]).logits[0, -1].detach()
    save_target(tmp_path, model=model)
    assert same(logits(tmp_path, "auto"), expected)


def test_a_refused_load_writes_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_tensors(folder, without(DOWN))
    refusal(folder)
    assert capfd.readouterr() == ("", "")


def test_others_hear_of_their_own_loads(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only what is said of a load of ours is swallowed."""
    with without_bars():
        pretrained._loader_log.warning("ours")
    pretrained._loader_log.warning("theirs")
    assert pretrained._loader_log.filters == []


# Files.


def test_shards_are_read_whole(folder: Path, whole: Path) -> None:
    write_shards(folder, 3)
    assert same(logits(folder), logits(whole))


def spoil_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": change(content["weight_map"])}))


def test_a_shard_that_is_gone_is_named(folder: Path) -> None:
    write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    told = refusal(folder, CheckpointError)
    assert "lacks model-00002-of-00002.safetensors" in told
    assert "incomplete" in told


def test_an_index_that_names_another_file_is_refused(folder: Path) -> None:
    write_shards(folder)
    spoil_index(folder, lambda places: places | {DOWN: "other.safetensors"})
    assert "lacks other.safetensors" in refusal(folder, CheckpointError)


def test_an_index_that_promises_a_tensor_in_the_wrong_shard_is_refused(folder: Path) -> None:
    write_shards(folder)
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    spoil_index(folder, lambda places: places | {DOWN: first if places[DOWN] == second else second})
    assert f"lacks the tensor {DOWN}, which the index promises" in refusal(folder, CheckpointError)


def test_a_tensor_that_the_index_does_not_name_is_read_where_it_lies(
    folder: Path, whole: Path
) -> None:
    write_shards(folder)
    spoil_index(
        folder, lambda places: {name: file for name, file in places.items() if name != DOWN}
    )
    assert same(logits(folder), logits(whole))


def test_a_shard_that_the_index_does_not_name_is_missed(folder: Path) -> None:
    write_shards(folder)
    spoil_index(
        folder, lambda places: {name: file for name, file in places.items() if "00001" in file}
    )
    assert "lacks the tensor" in refusal(folder, CheckpointError)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": 5}', "{", "[]", ""]
)
def test_a_bad_index_is_named(folder: Path, content: str) -> None:
    write_shards(folder).write_text(content)
    assert "model.safetensors.index.json" in refusal(folder, CheckpointError)


def test_a_whole_file_beside_shards_of_other_tensors_is_refused(folder: Path, whole: Path) -> None:
    edit_tensors(folder, without(DOWN))
    write_shards(folder)
    shutil.copy(whole / "model.safetensors", folder)
    assert "two sets of weights" in refusal(folder, CheckpointError)


@pytest.mark.parametrize("cut", [0, 4, 100, 20_000])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_torn_file_of_weights_is_named(folder: Path, cut: int, sharded: bool) -> None:
    if sharded:
        write_shards(folder)
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:cut])
    told = refusal(folder, CheckpointError)
    assert path.name in told
    assert "fetch the model's files again" in told


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24\n"
    b"size 9\n"
)
FOREIGN = {"git lfs pull": LFS, "web page": b"<!DOCTYPE html>\n<html>", "is empty": b""}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("word", FOREIGN)
def test_what_lies_in_the_place_of_a_file_is_said(folder: Path, name: str, word: str) -> None:
    (folder / name).write_bytes(FOREIGN[word])
    told = refusal(folder, CheckpointError)
    assert name in told
    assert word in told


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
    ],
)
def test_a_damaged_json_file_is_named(folder: Path, name: str) -> None:
    """End tokens stand in some of them; transformers goes on without."""
    (folder / name).write_text('{"eos_token')
    assert name in refusal(folder, CheckpointError)


ONLY = {
    "pytorch_model.bin": "pickle",
    "pytorch_model-00001-of-00002.bin": "pickle",
    "consolidated.00.pth": "maker's own format",
    "model.gguf": "model.gguf",
    "tf_model.h5": "another framework",
    "model-00001-of-00002.safetensors": "no model.safetensors.index.json",
    "model.fp16.safetensors": "but no model.safetensors",
    "shard-00001-model-00001-of-00001.safetensors": "distributed checkpoint",
    "nothing.txt": "holds no weights",
}


@pytest.mark.parametrize("name", ONLY)
def test_a_folder_without_readable_weights_says_what_it_has(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert ONLY[name] in refusal(folder, CheckpointError)


def test_an_adapter_is_never_left_out(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )
    told = refusal(folder, CheckpointError)
    assert "adapter" in told
    assert "merge" in told


@pytest.mark.parametrize("sharded", [False, True])
def test_a_link_that_leads_nowhere_is_named(folder: Path, sharded: bool) -> None:
    """As in the hub's cache, where somebody took the blobs away."""
    if sharded:
        write_shards(folder)
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.unlink()
    path.symlink_to(folder / "blobs" / "0123")
    told = refusal(folder, CheckpointError)
    assert path.name in told
    assert "link leads nowhere" in told


# Kinds of models.

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no type": ({"model_type": ...}, ("names no model_type",)),
    "a new type": (
        {"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]},
        ("'llama9'", "pip install -U transformers"),
    ),
    "seq2seq": ({"model_type": "t5", "is_encoder_decoder": True}, ("t5", "encoder")),
    "vision": ({"model_type": "vit", "architectures": ["ViTModel"]}, ("vit", "no language model")),
    "masked": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("BertForMaskedLM",)),
    "reward": (
        {"architectures": ["LlamaForSequenceClassification"]},
        ("LlamaForSequenceClassification",),
    ),
    "both sides": ({"is_causal": False}, ("both sides",)),
    "drafter": ({"dflash_config": {}}, ("is a drafter", "dflash_config")),
    "own code": (
        {"model_type": "weird", "auto_map": {"AutoConfig": "a.B"}},
        ("'weird'", "own Python"),
    ),
    "own class": (
        {
            "architectures": ["OddForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "a.OddForCausalLM"},
        },
        ("OddForCausalLM", "own Python"),
    ),
    "a kernel": (
        {"attn_implementation": "kernels-community/flash-attn"},
        ("attn_implementation", "kernels-community"),
    ),
    "flash": (
        {"_attn_implementation": "flash_attention_2"},
        ("attn_implementation", "flash_attention_2"),
    ),
    "experts": ({"experts_implementation": "org/kernel"}, ("experts_implementation", "org/kernel")),
    "fusion": ({"fusion_config": {"patch_embeddings": True}}, ("fusion_config",)),
    "other weights": ({"transformers_weights": "adapter_model.bin"}, ("adapter_model.bin",)),
    "weights that are not there": (
        {"transformers_weights": "b.safetensors"},
        ("lacks b.safetensors",),
    ),
    "exl2": ({"quantization_config": {"quant_method": "exl2"}}, ("exl2",)),
    "modelopt": ({"quantization_config": {"quant_method": "modelopt"}}, ("modelopt",)),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, ("MLX",)),
    "unnamed": ({"quantization_config": {}}, ("does not name",)),
    "a word": ({"quantization_config": "int8"}, ("'int8'",)),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ("awq", "package")),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("gptq", "package")),
    "bnb": ({"quantization_config": {"load_in_4bit": True}}, ("bitsandbytes", "package")),
    "hqq": ({"quantization_config": {"quant_method": "hqq"}}, ("hqq", "package")),
    "torchao": ({"quantization_config": {"quant_method": "torchao"}}, ("torchao", "package")),
    "higgs": ({"quantization_config": {"quant_method": "higgs"}}, ("higgs", "unquantised")),
    "nvfp4": ({"quantization_config": {"quant_method": "nvfp4"}}, ("nvfp4", "unquantised")),
    "bitnet, packed": (
        {
            "quantization_config": {
                "quant_method": "bitnet",
                "linear_class": "bitlinear",
                "quantization_mode": "offline",
            }
        },
        ("lacks the tensor", "weight_scale"),
    ),
}


@pytest.mark.filterwarnings(BY_TORCH)
@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_config_asks_for_is_done_or_refused_by_name(folder: Path, case: str) -> None:
    changes, words = CONFIGS[case]
    edit_config(folder, **changes)
    told = refusal(folder)
    for word in words:
        assert word in told
    assert "fetch the model's files again" not in told or "lacks" in told


def test_a_model_that_embeds_sentences_is_named(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaModel"])
    (folder / "modules.json").write_text("[]")
    assert "sentence-transformers" in refusal(folder, UnsupportedTarget)


@pytest.mark.filterwarnings(BY_TORCH)
def test_a_quantised_linear_is_left_to_transformers(folder: Path) -> None:
    how = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(folder, quantization_config=how)
    assert load_target(str(folder))[0].kernel_name == "transformers"
    assert "AutoBitLinear" in refusal(folder, kernel="torch")


# Tokenizers.


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_without_a_vocabulary_is_refused(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).unlink()
    assert "holds no tokenizer" in refusal(folder, CheckpointError)


def test_a_tokenizer_of_a_larger_model_is_refused(folder: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    model.resize_token_embeddings(VOCAB - 20)
    with without_bars():
        model.save_pretrained(folder)
    told = refusal(folder, CheckpointError)
    assert f"{VOCAB} tokens" in told
    assert f"only {VOCAB - 20}" in told


def test_added_tokens_may_lie_beyond_the_embedding(folder: Path) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    load(folder).generate("zebra", max_new_tokens=1)


# Code.


def write_spy(folder: Path, name: str, ran: Path) -> None:
    code = f"open({str(ran)!r}, 'a').write('x')\n"
    code += "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
    code += "class C(PretrainedConfig):\n    model_type = 'weird'\n"
    code += "class M(PreTrainedModel): ...\nclass T(PreTrainedTokenizerFast): ...\n"
    code += "def generate(*a, **k): ...\n"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(code)


def spy_on_config(folder: Path) -> None:
    edit_config(
        folder,
        model_type="weird",
        auto_map={"AutoConfig": "spy.C", "AutoModelForCausalLM": "spy.M"},
    )


def spy_on_model(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoConfig": "spy.C", "AutoModelForCausalLM": "spy.M"})


def spy_on_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    changes = {"auto_map": {"AutoTokenizer": ["spy.T", "spy.T"]}, "tokenizer_class": "OddTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spy_on_generate(_folder: Path) -> None:
    """The spy in custom_generate lies there in every case."""


SPIES = {
    "config": spy_on_config,
    "model": spy_on_model,
    "tokenizer": spy_on_tokenizer,
    "generate": spy_on_generate,
}


@pytest.mark.parametrize("where", SPIES)
def test_no_code_of_a_folder_runs_whatever_is_piped_in(
    folder: Path,
    tmp_path: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = tmp_path / "ran"
    SPIES[where](folder)
    write_spy(folder, "spy.py", ran)
    write_spy(folder, "custom_generate/generate.py", ran)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    if where in ("model", "generate"):
        load(folder).generate("zebra", max_new_tokens=1)
    else:
        assert "own Python" in refusal(folder, CheckpointError)
    assert not ran.exists()
    assert "trust_remote_code" not in capsys.readouterr().out


def test_a_command_with_a_yes_piped_in_asks_nothing(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    spy_on_config(folder)
    write_spy(folder, "spy.py", ran)
    call = [sys.executable, "-m", "flashdraft", "chat", "--target", str(folder)]
    done = subprocess.run(
        call, input="y\ny\n", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "y/N" not in done.stdout + done.stderr
    assert not ran.exists()


def test_no_code_of_a_draft_runs(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    edit_config(folder, model_type="weird", architectures=["OddForCausalLM"])
    edit_config(folder, auto_map={"AutoConfig": "spy.C", "AutoModelForCausalLM": "spy.M"})
    write_spy(folder, "spy.py", ran)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="own Python"):
        load(whole, draft=folder)
    assert not ran.exists()


def test_every_call_of_transformers_says_that_it_trusts_no_code() -> None:
    """No call of from_pretrained of theirs stands anywhere but in this module, which passes
    Source.options.
    """
    package = Path(pretrained.__file__).parent
    theirs = (
        "AutoTokenizer",
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "GenerationConfig",
    )
    for path in sorted(package.rglob("*.py")):
        if path.name == "pretrained.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_loading = isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
            assert not is_loading or ast.unparse(node.value).split(".")[-1] not in theirs, path
    assert Source("x", Path()).options["trust_remote_code"] is False
    assert Path(pretrained.__file__).read_text().count(".from_pretrained(source.folder, **") == 2


def test_a_native_model_with_code_beside_it_runs_natively(folder: Path, whole: Path) -> None:
    edit_config(
        folder, auto_map={"AutoConfig": "a.C", "AutoModelForCausalLM": "a.LlamaForCausalLM"}
    )
    assert same(logits(folder), logits(whole))


# Causes.


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), ("not enough memory", "--dtype")),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
            ("not enough memory",),
        ),
        (PermissionError(13, "Permission denied", "model.safetensors"), ("who owns",)),
        (OSError(28, "No space left on device"), ("free some space",)),
        (ImportError("needs `sentencepiece`"), ("sentencepiece", "install that package")),
        (ValueError("requires you to pass trust_remote_code=True"), ("own Python",)),
        (KeyError("x"), ("cannot load",)),
    ],
)
def test_a_cause_has_its_own_hint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: tuple[str, ...]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    told = refusal(folder, CheckpointError)
    for word in words:
        assert word in told
    assert "fetch the model's files again" not in told


def test_a_folder_that_may_not_be_read_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pretrained, "_read_object", fails)
    assert "may not be read" in refusal(folder, CheckpointError)


# The same for draft models and for what trains from a folder.


def test_a_draft_model_is_loaded_by_the_same_rules(folder: Path, whole: Path) -> None:
    edit_tensors(folder, without(DOWN))
    with pytest.raises(CheckpointError, match=DOWN):
        load(whole, draft=folder)


def test_a_drafter_is_no_target(tmp_path: Path) -> None:
    assert "is a drafter" in refusal(save_zlab(tmp_path / "draft"), CheckpointError)


def test_a_kernel_is_refused_with_its_cause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "head size (head_dim) is 8, which is no multiple of 16" in refusal(folder, kernel="int8")
    edit_config(folder, num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    edit_tensors(folder, with_one_head)
    assert "bfloat16" in refusal(folder, kernel="compact", dtype="bfloat16")
    monkeypatch.setattr(loading.LeanTarget, "fits", staticmethod(lambda _: False))
    assert "not llama-shaped" in refusal(folder, kernel="torch")


def with_one_head(tensors: Tensors) -> Tensors:
    for layer in range(4):
        for name in ("k_proj", "v_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.randn(32, 32)
    return tensors


def test_a_folder_is_looked_at_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert check_folder(Source("m", folder))["model_type"] == "llama"
    write_shards(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00001"):
        check_folder(Source("m", folder))


def test_read_model_gives_the_folder_s_weights(whole: Path) -> None:
    model = read_model(Source("m", whole))
    stored = load_file(whole / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


ODD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "bf16"}, "has dtype 'bf16', which torch does not know"),
    "kind of rope": (
        {"rope_parameters": ..., "rope_scaling": {"type": "foo", "factor": 2}},
        "has rotary positions of type 'foo'",
    ),
    "theta as text": (
        {"rope_parameters": ..., "rope_theta": "500000"},
        "has rope_theta '500000': text, not a number",
    ),
    "no factor": (
        {"rope_parameters": ..., "rope_scaling": {"rope_type": "linear"}},
        "cannot be used: ",
    ),
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_config_that_no_class_takes_is_named(folder: Path, name: str) -> None:
    changes, cause = ODD_CONFIGS[name]
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_target(str(folder))
    assert str(error.value).startswith(f"config.json of `{folder}` {cause}")
    assert error.value.hint == "mend it, or fetch it again"


def test_template_in_a_file_of_its_own_is_read(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": "Q {{ messages[0]['content'] }} A "})
    )
    lm = load(str(folder))
    assert lm.tokenizer.decode(lm.encode("hi")) == "Q hi A "
