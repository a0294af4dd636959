"""Weights that were packed before: the same texts, and never anything else than was read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_folders import save_target, save_zlab
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from flashdraft import hub
from flashdraft.errors import CheckpointError
from flashdraft.generate import Model
from flashdraft.loading import Loaded, load, load_target
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.models import native, packed
from flashdraft.models.packed import StoredConfig
from flashdraft.pretrained import Source

SIZES = {**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
    "biases": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SIZES),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which toys are kept, too; the compiled kernels are those of the
    machine.
    """
    folder = tmp_path / "cache"
    folder.mkdir()
    for kernels in hub.cache_dir().glob("step-*.so"):
        shutil.copy2(kernels, folder / kernels.name)
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(folder))
    monkeypatch.setattr(packed, "_LEAST", 0)
    return folder


def save_toy(folder: Path, name: str = "llama") -> Path:
    model = tiny_model("", dtype=torch.float32, config=CONFIGS[name]())
    return save_target(folder, model=model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_toy(tmp_path / "target")


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("packed-*"))


def was_kept(loaded: Loaded) -> bool:
    return isinstance(loaded.target.config, StoredConfig)


def text(loaded: Loaded) -> list[int]:
    model = Model(loaded.target, loaded.tokenizer, Autoregressive, eos=loaded.eos, max_rows=1)
    result = model.generate("Hello there", max_new_tokens=12, temperature=0.7, ignore_eos=True)
    return list(result.tokens)


def bits(loaded: Loaded) -> torch.Tensor:
    target = loaded.target
    return target.prefill(target.new_cache(1, 64), 0, torch.arange(3, 20), ())[0]


@pytest.mark.parametrize("kernel", ["compact", "float32", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_kept_is_what_was_read(name: str, kernel: str, tmp_path: Path) -> None:
    folder = str(save_toy(tmp_path / name, name))
    first, second = (load_target(folder, kernel=kernel) for _ in range(2))
    assert (was_kept(first), was_kept(second)) == (False, True)
    assert torch.equal(bits(first), bits(second))
    assert text(first) == text(second)
    assert first.eos == second.eos
    for fact in ("kernel", "kernel_name", "nbytes", "context_length", "row_exact", "vocab_size"):
        assert getattr(first.target, fact) == getattr(second.target, fact), fact
    ids = torch.arange(5)
    assert torch.equal(first.target.head_weight(ids), second.target.head_weight(ids))
    assert torch.equal(first.target.embed(ids), second.target.embed(ids))


def test_a_drafter_and_a_chat_read_it_as_before(folder: Path) -> None:
    first, second = (load(folder, draft="prompt_lookup", kernel="compact") for _ in range(2))
    assert was_kept_of(second)
    asked = [{"role": "user", "content": "ab ab ab ab"}]
    one, other = (model.generate(asked, max_new_tokens=20) for model in (first, second))
    assert (one.text, one.tokens) == (other.text, other.tokens)
    assert first.tokenizer.chat_template == second.tokenizer.chat_template


def was_kept_of(model: Model) -> bool:
    return isinstance(model.target.config, StoredConfig)


def test_the_config_is_the_one_that_was_read(folder: Path) -> None:
    first, second = (load_target(str(folder), kernel="compact").target.config for _ in range(2))
    assert isinstance(second, StoredConfig)
    assert second.to_diff_dict() == first.to_diff_dict()
    assert second.to_dict() == first.to_dict()
    assert second.rope_parameters == first.rope_parameters
    assert second.get_text_config().hidden_size == 32
    assert getattr(second, "final_logit_softcapping", None) is None
    with pytest.raises(AttributeError):
        second.no_such_thing  # noqa: B018


def rewrite(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path)
    save_file({n: change(t) for n, t in tensors.items()}, path, metadata={"format": "pt"})


def test_a_folder_that_changed_is_read_anew(folder: Path, cache: Path) -> None:
    weights = folder / "model.safetensors"
    old = bits(load_target(str(folder), kernel="compact"))
    facts = weights.stat()
    rewrite(weights, lambda t: t * 1.5)  # of the same size
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # and of the same time
    again = load_target(str(folder), kernel="compact")
    assert not was_kept(again)
    assert not torch.equal(bits(again), old)
    assert len(entries(cache)) == 1, "the old entry is replaced"
    assert was_kept(load_target(str(folder), kernel="compact"))

    (folder / "adapter_config.json").write_text("{}")  # a new file is refused as it was before
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_target(str(folder), kernel="compact")
    (folder / "adapter_config.json").unlink()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_target(str(folder), kernel="compact")


def test_a_link_that_leads_nowhere_hides_no_file_behind_it(folder: Path) -> None:
    (folder / "README.md").symlink_to("gone.md")  # before the weights, by name
    old = bits(load_target(str(folder), kernel="compact"))
    assert was_kept(load_target(str(folder), kernel="compact"))
    rewrite(folder / "model.safetensors", lambda t: t * 1.5)
    again = load_target(str(folder), kernel="compact")
    assert not was_kept(again)
    assert not torch.equal(bits(again), old)


def test_a_tokenizer_that_its_class_no_longer_makes_is_read_in_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_target(str(folder), kernel="compact")

    def fails(*_: object) -> None:
        raise RuntimeError("a missing package")

    monkeypatch.setattr(packed, "tokenizer_of", fails)
    second = load_target(str(folder), kernel="compact")
    assert was_kept(second)
    assert text(first) == text(second)


def test_shards_in_a_folder_below_are_looked_at(folder: Path) -> None:
    weights = folder / "model.safetensors"
    below = folder / "shards" / "one.safetensors"
    below.parent.mkdir()
    weights.rename(below)
    places = dict.fromkeys(load_file(below), "shards/one.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    old = bits(load_target(str(folder), kernel="compact"))
    assert was_kept(load_target(str(folder), kernel="compact"))
    rewrite(below, lambda t: t * 1.5)
    again = load_target(str(folder), kernel="compact")
    assert not was_kept(again)
    assert not torch.equal(bits(again), old)


def test_a_config_that_is_no_json_is_not_kept(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(_: Any) -> None:
        raise TypeError("keys must be str, int, float, bool or None, not tuple")

    monkeypatch.setattr(StoredConfig, "of", odd)
    assert not was_kept(load_target(str(folder), kernel="compact"))
    assert entries(cache) == []


def test_what_a_killed_process_had_written_is_removed(folder: Path, cache: Path) -> None:
    for name, age in ((".tmp-packed-old", 48 * 3600), (".tmp-packed-new", 60), (".tmp-other", 9e5)):
        (cache / name).mkdir()
        (cache / name / "half").touch()
        then = time.time() - age
        os.utime(cache / name, (then, then))
    load_target(str(folder), kernel="compact")
    assert sorted(path.name for path in cache.glob(".tmp*")) == [".tmp-other", ".tmp-packed-new"]


@pytest.mark.parametrize("what", ["kernels", "code", "version"])
def test_other_kernels_and_another_processor_are_other_entries(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_target(str(folder), kernel="compact")
    if what == "kernels":  # of which the processor's flags are a part
        known = native.fingerprint()
        kernels = native.library()
        monkeypatch.setattr(native, "fingerprint", lambda: known[::-1])
        monkeypatch.setattr(native, "library", lambda: kernels)
    elif what == "code":
        monkeypatch.setattr(packed, "_code", lambda: "other")
    else:
        monkeypatch.setattr(packed, "version", lambda _: "5.99")
    assert not was_kept(load_target(str(folder), kernel="compact"))
    assert was_kept(load_target(str(folder), kernel="compact"))


@pytest.mark.parametrize("error", [PackageNotFoundError("transformers"), FileNotFoundError(2, "x")])
def test_a_bundle_without_sources_or_releases_keeps_nothing(
    error: Exception, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    of_release = isinstance(error, PackageNotFoundError)
    monkeypatch.setattr(packed, "version" if of_release else "_code", fails)
    assert not was_kept(load_target(str(folder), kernel="compact"))
    assert entries(cache) == []


def test_a_folder_whose_name_is_no_text_has_a_place(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"mod\xe8le")
    shelf = packed.Shelf(Source("model", folder), "auto", "compact")
    assert shelf.target() is None


def test_kernels_and_dtypes_have_entries_of_their_own(folder: Path, cache: Path) -> None:
    load_target(str(folder), kernel="compact")
    assert not was_kept(load_target(str(folder), kernel="int8"))
    assert not was_kept(load_target(str(folder), kernel="compact", dtype="float32"))
    assert len(entries(cache)) == 3
    for kernel in ("torch", "transformers"):
        assert not was_kept(load_target(str(folder), kernel=kernel))
    load_target(str(folder), kernel="torch", dtype="bfloat16")
    assert len(entries(cache)) == 3


def test_auto_takes_what_was_kept_where_torch_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashdraft.models.lean.quicker_than", lambda *_: True)
    monkeypatch.setattr(packed, "quicker_than", lambda *_: True)
    load_target(str(folder), kernel="compact")
    assert not was_kept(load_target(str(folder))), "torch's steps are not known yet"
    assert was_kept(load_target(str(folder)))
    monkeypatch.setattr(packed, "quicker_than", lambda *_: False)
    assert not was_kept(load_target(str(folder)))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda whole: whole[: len(whole) // 2],
    "one byte short": lambda whole: whole[:-1],
    "empty": lambda whole: b"",
    "text": lambda whole: b"not a safetensors file, but as long as one may be",
    "a header alone": lambda whole: whole[: 8 + int.from_bytes(whole[:8], "little")],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_passed_over_and_written_anew(
    how: str, folder: Path, cache: Path
) -> None:
    first = bits(load_target(str(folder), kernel="compact"))
    (entry,) = entries(cache)
    entry.write_bytes(DAMAGE[how](entry.read_bytes()))
    again = load_target(str(folder), kernel="compact")
    assert not was_kept(again)
    assert torch.equal(bits(again), first)
    assert was_kept(load_target(str(folder), kernel="compact"))


@pytest.mark.parametrize("damage", ["tensor", "shape", "held", "format"])
def test_an_entry_that_does_not_add_up_is_passed_over(
    damage: str, folder: Path, cache: Path
) -> None:
    first = bits(load_target(str(folder), kernel="compact"))
    (entry,) = entries(cache)
    with safe_open(entry, framework="pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    held = json.loads(told["held"])
    if damage == "tensor":
        del tensors["1.down.weight"]
    elif damage == "shape":
        tensors["head.weight"] = tensors["head.weight"][:-32].clone()
    elif damage == "held":
        del held["linears"]
    else:
        held["linears"]["0.qkv"][0] = "float7"
    save_file(tensors, entry, metadata={**told, "held": json.dumps(held)})
    again = load_target(str(folder), kernel="compact")
    assert not was_kept(again)
    assert torch.equal(bits(again), first)


def test_a_cache_that_cannot_be_written_costs_time_alone(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packed, "_write", full)
        first = bits(load_target(str(folder), kernel="compact"))
    assert entries(cache) == []
    assert list(cache.glob(".tmp*")) == []

    with monkeypatch.context() as patch:  # nearly full: the space is left to others
        patch.setattr(packed.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
        load_target(str(folder), kernel="compact")
    assert entries(cache) == []

    monkeypatch.setenv("FLASHDRAFT_CACHE", str(folder / "config.json"))  # no folder at all
    assert torch.equal(bits(load_target(str(folder), kernel="compact")), first)


def test_nothing_is_kept_in_a_cache_that_goes_with_the_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    gone = tmp_path / "gone with the process"
    gone.mkdir()
    monkeypatch.delenv("FLASHDRAFT_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(hub, "_folder_of_this_process", lambda: gone)
    for _ in range(2):
        assert not was_kept(load_target(str(folder), kernel="compact"))
    assert entries(gone) == []


def test_entries_of_folders_that_are_gone_are_removed(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    other = save_toy(tmp_path / "other", "qwen3")
    load_target(str(other), kernel="compact")
    shutil.rmtree(other)
    load_target(str(folder), kernel="compact")
    assert len(entries(cache)) == 1
    assert was_kept(load_target(str(folder), kernel="compact"))


def test_a_tokenizer_that_its_class_alone_does_not_make_is_read_in_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = packed.read_tokenizer
    asked = []
    monkeypatch.setattr(packed, "_described", lambda tokenizer: {"id": str(id(tokenizer))})
    monkeypatch.setattr(packed, "read_tokenizer", lambda source: asked.append(1) or read(source))
    first, second = (load_target(str(folder), kernel="compact") for _ in range(2))
    assert was_kept(second)
    assert len(asked) == 1
    assert text(first) == text(second)


CODE = """
import sys
from flashdraft.loading import load_target
from flashdraft.models import packed
packed._LEAST = 0
loaded = load_target(sys.argv[1], kernel="compact")
target = loaded.target
import torch
print(target.prefill(target.new_cache(1, 64), 0, torch.arange(3, 20), ())[0].sum().item().hex())
families = "transformers.models."
heavy = [name for name in sys.modules if ".modeling_" in name or name.startswith(families)]
print(type(target.config).__name__, *heavy)
"""


def test_two_processes_at_once_and_what_they_import(folder: Path, cache: Path) -> None:
    """Both write the same entry; a third one reads it, and needs no model of transformers."""
    command = [sys.executable, "-c", CODE, str(folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0].splitlines() for process in both]
    assert told[0][0] == told[1][0]
    assert len(entries(cache)) == 1
    third = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert third == [told[0][0], "StoredConfig"]


COMMAND = """
import sys
from flashdraft.cli import main
from flashdraft.models import packed
packed._LEAST = 0
assert main(sys.argv[1:]) == 0
for name in sorted(sys.modules):
    print(name)
"""
HEAVY = ("accelerate", "gguf", "matplotlib", "scipy", "sklearn", "sympy", "torch._dynamo")


def test_generate_imports_no_file_that_it_does_not_need(folder: Path, tmp_path: Path) -> None:
    draft = save_zlab(tmp_path / "draft")
    words = [
        "generate",
        "Hi",
        "--target",
        str(folder),
        "--draft",
        str(draft),
        "--kernel",
        "compact",
    ]
    command = [sys.executable, "-c", COMMAND, *words, "--max-new-tokens", "3"]
    subprocess.run(command, capture_output=True, check=True)  # the first time, everything
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = done.stdout.splitlines()[1:]
    assert "flashdraft.methods.dflash" in imported
    for name in imported:
        assert not name.startswith(("transformers.models.llama", "transformers.models.qwen")), name
        assert not name.startswith(("transformers.generation", "transformers.modeling_u")), name
        assert name.split(".")[0] not in HEAVY, name
        assert name not in HEAVY, name
        assert not name.startswith(("flashdraft.train", "flashdraft.bench")), name
        assert name not in ("flashdraft.methods.eagle3", "flashdraft.methods.draft_model"), name
